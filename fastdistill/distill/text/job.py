"""The job: cut the student from its teacher, train it, and write down how they compare."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastdistill
from fastdistill.distill import environment, extras, resume, speed
from fastdistill.distill.directory import Directory
from fastdistill.distill.errors import JobError
from fastdistill.distill.job import choose_device, probe, reproducible
from fastdistill.distill.listener import Listener
from fastdistill.distill.snapshot import Curve
from fastdistill.distill.text import encoder, sentences
from fastdistill.distill.text.config import ASV, MINILM, TextConfig
from fastdistill.distill.text.sentences import Corpus
from fastdistill.distill.text.training import FILES, Training, choose_layers
from fastdistill.hint import hint_loss

JOB = "distill-text"
MODULES = ("rich", "safetensors", "matplotlib", "transformers")
SPEED_BATCH = 32  # sentences


@dataclass(frozen=True)
class Outcome:
    """All that a run trained and measured, and on what.

    Attributes:
        config: the settings, device and backend resolved.
        directory: where the report goes.
        corpus: the sentences.
        training: teacher and student, and the similarities before.
        curve: one entry per epoch.
        after: similarities [N, N] of the held-out sentences at the end.
        inference: see `speed.compare`.
        environment: see `environment.describe`.
    """

    config: TextConfig
    directory: Directory
    corpus: Corpus
    training: Training
    curve: Curve
    after: Tensor
    inference: dict[str, Any]
    environment: dict[str, Any]


def run(
    config: TextConfig, explicit: Collection[str] = (), listener: Listener | None = None
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
    extras.require("fastdistill distill-text", *MODULES, extra="text")
    from fastdistill.distill.text import report, results

    listener = listener or Listener()
    directory = Directory(config.out, report.OUTPUTS, JOB)
    with directory.locked():
        config, earlier = resume.settle(directory, config, explicit, _resolve, listener)
        device = torch.device(config.device)
        corpus = sentences.load(config.data, config.held_out, config.seed)
        teacher = encoder.load(config.teacher, device)
        choose_layers(config, teacher)  # refuses before anything is replaced
        with reproducible(None if earlier is None else earlier["threads"], listener):
            sha256 = hashlib.sha256(f"{corpus.sha256} {teacher.sha256}".encode()).hexdigest()
            run_id = resume.begin(directory, config, sha256, earlier, FILES, listener)
            listener.begin(config.epochs)
            with fastdistill.backend(config.backend):
                training = Training(config, directory, run_id, corpus, teacher, listener)
                curve = _train(training, config)
            outcome = Outcome(
                config,
                directory,
                corpus,
                training,
                curve,
                training.similarities(training.student),
                _speed(training),
                environment.describe(device) | {"transformers": _transformers()},
            )
        figures = results.figures(outcome)
        report.write(outcome, figures)
        directory.sweep()
    return figures


def _train(training: Training, config: TextConfig) -> Curve:
    try:
        return training.train()
    except torch.OutOfMemoryError as error:
        raise JobError(
            f"The memory of {config.device} does not suffice.",
            str(error).splitlines()[0],
            "Continue with --resume on a free device, or start over with a smaller batch_size.",
        ) from None


def _speed(training: Training) -> dict[str, Any]:
    ids, _ = encoder.pad(training.held_out[:SPEED_BATCH], training.padding)
    models = (training.teacher.model, training.student)
    teacher, student = (encoder.Embedder(model, training.padding) for model in models)
    return speed.compare(teacher, student, ids.to(training.device))


def _resolve(config: TextConfig) -> TextConfig:
    """Say what "auto" means here, and absolute paths: all must hold in a resumed run."""
    device = choose_device(config.device)
    x = torch.ones(2, 4, device=device)
    backend = probe("hint_loss", lambda: hint_loss(x, 2 * x), config.backend, device)
    paths: dict[str, Any] = {
        name: str(Path(value).expanduser().resolve())
        for name, value in (("data", config.data), ("teacher", config.teacher))
        if value not in (ASV, MINILM)
    }
    return replace(config, device=device.type, backend=backend, **paths)


def _transformers() -> str:
    import transformers

    return str(transformers.__version__)
