"""The job: every row of private distillation, trained, accounted for and written down."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdistill.distill import environment, extras, models, resume, speed, store
from fastdistill.distill.config import BUNDLED
from fastdistill.distill.data import Dataset, load
from fastdistill.distill.directory import Directory
from fastdistill.distill.errors import JobError
from fastdistill.distill.job import reproducible
from fastdistill.distill.listener import Listener
from fastdistill.distill.private.config import STUDENT_FILTERS, PrivateConfig
from fastdistill.distill.private.experiment import Experiment, Made, Row, Sizes, epsilon_of, rows
from fastdistill.distill.private.features import Head
from fastdistill.distill.private.ledger import BudgetExceeded, Ledger

JOB = "distill-private"
MODULES = ("rich", "safetensors", "matplotlib", "sklearn")

CIFAR = (
    models.Architecture(3, 32, 32, 10, (128, 256, 512), 360),
    models.Architecture(3, 32, 32, 10, (32, 64, 128), 40),
)
"""Networks of the sizes of RONA's teacher and student for CIFAR-10 (4.43M and 0.177M parameters);
their layers are our own."""


@dataclass(frozen=True)
class Run:
    """One student of a row.

    Attributes:
        row: its configuration.
        seed: its own.
        accuracy: on the test images.
        ledger: its debits.
        epsilon: what may be claimed; None: nothing.
    """

    row: Row
    seed: int
    accuracy: float
    ledger: Ledger
    epsilon: float | None


@dataclass(frozen=True)
class Outcome:
    """All that a job trained and measured, and on what.

    Attributes:
        config: the settings.
        directory: where the report goes.
        data: training and test images.
        sizes: of the parts of the data.
        runs: every student, row by row.
        parameters: of teacher and student.
        inference: see `speed.compare`; of teacher and student.
        cifar: the same of `CIFAR`, with their parameters.
        environment: see `environment.describe`.
    """

    config: PrivateConfig
    directory: Directory
    data: Dataset
    sizes: Sizes
    runs: list[Run]
    parameters: tuple[int, int]
    inference: dict[str, Any]
    cifar: dict[str, Any]
    environment: dict[str, Any]


def run(
    config: PrivateConfig, explicit: Collection[str] = (), listener: Listener | None = None
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
    extras.require(f"fastdistill {JOB}", *MODULES)
    from fastdistill.distill.private import report, results

    listener = listener or Listener()
    directory = Directory(config.out, report.OUTPUTS, JOB)
    with directory.locked():
        config, earlier = resume.settle(directory, config, explicit, _resolve, listener)
        data = load(config.data, config.seed)
        sizes = Sizes.of(config, len(data.train))  # refuses before anything is replaced
        with reproducible(None if earlier is None else earlier["threads"], listener):
            files = [_file(row, seed) for row, seed in _plan(config, sizes)]
            run_id = resume.begin(directory, config, data.source.sha256, earlier, files, listener)
            if config.data == BUNDLED:
                listener.say(
                    "A smoke test: on so few images knowledge perturbation is useless. The "
                    "published figures are on Fashion-MNIST: --data."
                )
            experiment = Experiment(config, data, run_id, listener.say)
            runs = list(_runs(experiment, directory, listener))
            parameters, inference, cifar = _compare(experiment)
        outcome = Outcome(
            config, directory, data, sizes, runs, parameters, inference, cifar,
            environment.describe(torch.device("cpu")) | _versions(),
        )  # fmt: skip
        figures = results.figures(outcome)
        report.write(outcome, figures)
        directory.sweep()
    return figures


def _plan(config: PrivateConfig, sizes: Sizes) -> Iterator[tuple[Row, int]]:
    for row in rows(config, sizes):
        for seed in range(config.seed, config.seed + config.count):
            yield row, seed


def _file(row: Row, seed: int) -> str:
    return f"{row.name}-seed{seed}.safetensors"


def _runs(experiment: Experiment, directory: Directory, listener: Listener) -> Iterator[Run]:
    """Every student, trained or loaded where it is finished."""
    plan = list(_plan(experiment.config, experiment.sizes))
    listener.begin(len(plan))
    for row, seed in plan:
        path = directory.checkpoints / _file(row, seed)
        accuracy = _finished(path, experiment.run)
        if accuracy is None:
            made = _make(experiment, row, seed)
            accuracy, ledger = experiment.accuracy(made.student), made.ledger
            about = {
                "kind": "private student", "run": experiment.run, "row": row.name, "seed": seed,
                "accuracy": accuracy,
            }  # fmt: skip
            store.save(path, made.student.state_dict(), about)
        else:
            ledger = experiment.ledger(row, seed)
        entry: dict[str, float] = {"epoch": 1, "loss": 0.0, "accuracy": accuracy}
        listener.progress(f"{row.name}, seed {seed}", 1, [entry])
        yield Run(row, seed, accuracy, ledger, epsilon_of(row, ledger))


def _make(experiment: Experiment, row: Row, seed: int) -> Made:
    try:
        return experiment.make(row, seed)
    except BudgetExceeded as error:
        raise JobError(
            f"{row.name}, seed {seed}, cannot be continued.",
            f"Its training was interrupted after its debit, and fresh noise is a second one: "
            f"{error}.",
            "Start over without --resume.",
        ) from None


def _finished(path: Path, run_id: str) -> float | None:
    if not path.exists():
        return None
    _, about = store.load(path)
    return float(about["accuracy"]) if about.get("run") == run_id else None


def _compare(
    experiment: Experiment,
) -> tuple[tuple[int, int], dict[str, Any], dict[str, Any]]:
    """Parameters of teacher and student, their speed, and both of `CIFAR`."""
    whole = experiment.representation
    banks = (whole, whole.first(STUDENT_FILTERS))
    nets = [
        nn.Sequential(bank, Head(bank.mean.numel(), experiment.classes, 0)).eval() for bank in banks
    ]
    sizes = [
        models.parameters(net) + bank.parameters_learnt
        for net, bank in zip(nets, banks, strict=True)
    ]
    inference = speed.compare(nets[0], nets[1], experiment.images(None))
    shapes = [models.build(shape, 0) for shape in CIFAR]
    counts = [models.parameters(net) for net in shapes]
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    cifar = {
        "teacher_parameters": counts[0], "student_parameters": counts[1],
        "compression": counts[0] / counts[1], **speed.compare(shapes[0], shapes[1], images),
    }  # fmt: skip
    return (sizes[0], sizes[1]), inference, cifar


def _versions() -> dict[str, str]:
    import opacus
    import sklearn

    return {"opacus": opacus.__version__, "scikit-learn": sklearn.__version__}


def _resolve(config: PrivateConfig) -> PrivateConfig:
    """An absolute path for the data, which holds in a resumed run."""
    if config.data == BUNDLED:
        return config
    return replace(config, data=str(Path(config.data).expanduser().resolve()))
