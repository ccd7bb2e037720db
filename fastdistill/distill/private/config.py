"""The settings of `fastdistill distill-private`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fastdistill.distill import checks
from fastdistill.distill.checks import Settings
from fastdistill.distill.config import BUNDLED, MAX_SEED

NOISE = ("reproducible", "secure")
FILTERS, STUDENT_FILTERS = 200, 48


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters, the same for every row, epsilon and data set.

    They were chosen on public images alone: 8000 of Fashion-MNIST's public 10,000 stood in for the
    private ones, with noise of the same size on the mean; `TRIED` says how many.

    Attributes:
        ridge: penalty of the teachers on the parts.
        temperature: of their softmax; their logits are regressed one-hot labels.
        weight_decay: of the student.
        learning_rate: of the student.
        steps: of the student.
        sampling_rate: of DP-SGD.
        dp_steps: of DP-SGD.
        dp_learning_rate: of DP-SGD.
        max_grad_norm: of DP-SGD.
    """

    ridge: float = 150.0
    temperature: float = 0.05
    weight_decay: float = 3.0
    learning_rate: float = 0.01
    steps: int = 150
    sampling_rate: float = 0.05
    dp_steps: int = 200
    dp_learning_rate: float = 0.5
    max_grad_norm: float = 1.0


RECIPE = Recipe()
TRIED = {"R3 and the students": 33, "R1 and R2": 6, "R3 gradient": 5}


@dataclass(frozen=True)
class PrivateConfig(Settings):
    """Everything that decides the outcome of `fastdistill distill-private`, and where it goes.

    Attributes:
        out: directory of all results.
        data: as in `fastdistill distill`; five training images in six are private.
        seed: of the split, the representation, and the first student.
        seeds: students per row, with seed, seed + 1, ... None: 5, or 1 for the bundled data.
        labelled: public images with a label.
        parts: teachers, one per part of the private records. None: one for 200 records.
        queries: public images that they are asked about. None: one in ten.
        epsilons: of each private row.
        delta: of each.
        noise: "reproducible", from the seed, is not for release; "secure" is ChaCha20, keyed by
            the operating system.
        resume: continue an interrupted job in `out`.

    Raises:
        JobError: a value has the wrong type or is out of range.
    """

    out: str = "out/distill-private"
    data: str = BUNDLED
    seed: int = 0
    seeds: int | None = None
    labelled: int = 100
    parts: int | None = None
    queries: int | None = None
    epsilons: tuple[float, ...] = (2.0, 4.0, 8.0)
    delta: float = 1e-5
    noise: str = "reproducible"
    resume: bool = False

    CHECKS: ClassVar[Mapping[str, checks.Check]] = {
        "out": checks.text,
        "data": checks.text,
        "seed": checks.integer(0, MAX_SEED),
        "seeds": checks.optional(checks.integer(1, 1000)),
        "labelled": checks.integer(1),
        "parts": checks.optional(checks.integer(2)),
        "queries": checks.optional(checks.integer(4)),
        "epsilons": lambda value: _epsilons(value),
        "delta": lambda value: _delta(value),
        "noise": checks.choice(*NOISE),
        "resume": checks.flag,
    }

    @property
    def count(self) -> int:
        """Students per row."""
        return self.seeds or (1 if self.data == BUNDLED else 5)


def _epsilons(value: object) -> tuple[float, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"expected a list of numbers > 0, ascending; got {value!r}")
    numbers = tuple(checks.positive(number) for number in value)
    if list(numbers) != sorted(set(numbers)):
        raise ValueError(f"expected a list of numbers > 0, ascending; got {value!r}")
    return numbers


def _delta(value: object) -> float:
    number = checks.positive(value)
    if number >= 1:
        raise ValueError(f"expected a number in (0, 1), got {number}")
    return number
