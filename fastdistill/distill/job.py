"""The main job: train the teacher, then its students, and write down how they compare."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import fastdistill
from fastdistill import _backend
from fastdistill.distill import environment, extras, factories, resume, speed
from fastdistill.distill.config import BUNDLED, Config
from fastdistill.distill.data import Dataset, load
from fastdistill.distill.directory import Directory
from fastdistill.distill.errors import JobError
from fastdistill.distill.listener import Listener
from fastdistill.distill.workbench import (
    HINT_DISTILLED,
    Network,
    Workbench,
    check_networks,
    files,
    labelled_count,
)

MODULES = ("rich", "safetensors", "matplotlib")


@dataclass(frozen=True)
class Outcome:
    """All that a job trained and measured, and on what.

    Attributes:
        config: the settings, the device resolved.
        directory: where the report goes.
        data: training and test images.
        teacher: the teacher.
        students: all students, seed by seed.
        inference: see `speed.compare`.
        environment: see `environment.describe`.
    """

    config: Config
    directory: Directory
    data: Dataset
    teacher: Network
    students: list[Network]
    inference: dict[str, Any]
    environment: dict[str, Any]


def run(
    config: Config, explicit: Collection[str] = (), listener: Listener | None = None
) -> dict[str, Any]:
    """Run the job, or the rest of an interrupted one, and write everything into `config.out`.

    Args:
        config: all settings.
        explicit: names of those that the user gave. With `config.resume` these must agree with
            the earlier run's; the others are taken from it.
        listener: is told of the progress.

    Returns:
        The content of results.json.

    Raises:
        JobError: for whatever the user can put right.
    """
    extras.require("fastdistill distill", *MODULES)
    from fastdistill.distill import report, results

    listener = listener or Listener()
    directory = Directory(config.out)
    with directory.locked():
        config, earlier = resume.settle(directory, config, explicit, _resolve, listener)
        if earlier is None:
            config = _without_hint(config, explicit, listener)
        device = torch.device(config.device)
        data = load(config.data, config.seed)
        labelled_count(config, data)  # these refuse before anything is replaced
        check_networks(config, data)
        with reproducible(None if earlier is None else earlier["threads"], listener):
            sha256 = data.source.sha256
            run_id = resume.begin(
                directory, config, sha256, earlier, files(config), listener, _checkpoints(config)
            )
            bench = Workbench(config, directory, run_id, data, device, listener)
            teacher, students = _train(bench, config)
            inference = speed.compare(teacher.model, students[0].model, bench.test_images)
            about = environment.describe(device)
        outcome = Outcome(config, directory, data, teacher, students, inference, about)
        figures = results.figures(outcome)
        report.write(outcome, figures)
        directory.sweep()
    return figures


def _train(bench: Workbench, config: Config) -> tuple[Network, list[Network]]:
    try:
        with fastdistill.backend(config.backend):
            return bench.train_all()
    except torch.OutOfMemoryError as error:
        raise JobError(
            f"The memory of {config.device} does not suffice.",
            str(error).splitlines()[0],
            "Continue with --resume on a free device, or start over with a smaller batch_size.",
        ) from None


def _resolve(config: Config) -> Config:
    """Say what "auto" means here, and the data's absolute path: both must hold in a resumed run.

    Another backend rounds otherwise, so a resumed run must not choose anew.
    """
    device = choose_device(config.device)
    paths = {
        name: str(Path(value).expanduser().resolve())
        for name in ("data", "teacher_checkpoint", "student_checkpoint")
        if (value := getattr(config, name)) not in (None, BUNDLED)
    }
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0]], device=device)
    backend = probe(
        "kd_loss", lambda: fastdistill.kd_loss(logits, 2 * logits), config.backend, device
    )
    changes: dict[str, Any] = {"device": device.type, "backend": backend, **paths}
    return replace(config, **changes)


def _without_hint(config: Config, explicit: Collection[str], listener: Listener) -> Config:
    """The default students, but the one whose layers are not known, where networks are given."""
    own = config.teacher is not None or config.student is not None
    if not own or config.hint_layers is not None or "students" in explicit:
        return config
    students = tuple(name for name in config.students if name != HINT_DISTILLED)
    listener.say(f"Without {HINT_DISTILLED}: that takes hint_layers, the layers to match.")
    return replace(config, students=students)


def _checkpoints(config: Config) -> dict[str, str]:
    """sha256 of the weights that the user gave, by setting."""
    names = ("teacher_checkpoint", "student_checkpoint")
    given = {name: getattr(config, name) for name in names}
    return {name: factories.sha256(path) for name, path in given.items() if path is not None}


def choose_device(name: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda" means here.

    Raises:
        JobError: there is no CUDA device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise JobError(
            "The device cuda cannot be used.",
            "torch finds no CUDA device here.",
            "Use --device cpu or --device auto.",
        )
    return torch.device(name)


def probe(op: str, call: Callable[[], object], backend: str, device: torch.device) -> str:
    """Try the backend before anything is trained; the name of the one that ran.

    Args:
        op: name of the op.
        call: runs it on a few rows of float32.
        backend: as the user asked for it.
        device: where the rows are.

    Raises:
        JobError: it cannot run here.
    """
    case = _backend.Case(device.type, (torch.float32, torch.float32), False)
    # "auto" leaves the choice to FASTDISTILL_BACKEND, which a block would override
    asked: AbstractContextManager[object]
    asked = nullcontext() if backend == "auto" else fastdistill.backend(backend)
    try:
        with asked:
            call()
            return _backend.choose(op, case)
    except (RuntimeError, ValueError) as error:
        raise JobError(
            f"The backend {backend} of {op} cannot be used on {device.type}.",
            str(error),
            "Use --backend reference, which runs everywhere.",
        ) from None


@contextmanager
def reproducible(threads: int | None, listener: Listener) -> Iterator[None]:
    """One algorithm per operation, and as many threads as the run that is continued."""
    before = torch.get_num_threads()
    if threads is not None and threads != before:  # a sum split otherwise has other last bits
        listener.say(f"Using {threads} threads, as the interrupted run did.")
        torch.set_num_threads(threads)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield
    finally:
        torch.set_num_threads(before)
