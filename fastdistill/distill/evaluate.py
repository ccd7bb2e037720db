"""`fastdistill evaluate`: load a network from its checkpoint alone and measure it again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdistill.distill import engine, extras, factories, models, store
from fastdistill.distill.data import Images, Normalisation, Source, read, split
from fastdistill.distill.errors import JobError
from fastdistill.distill.job import choose_device
from fastdistill.distill.workbench import NETWORK


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        name: of the network.
        data: what the images are, for people.
        correct: images whose class the network names.
        total: all images.
        parameters: of the network.
    """

    name: str
    data: str
    correct: int
    total: int
    parameters: int

    @property
    def accuracy(self) -> float:
        """As a fraction."""
        return self.correct / self.total


def evaluate(
    checkpoint: str, data: str | None = None, device: str = "auto", model: str | None = None
) -> Evaluation:
    """Measure the network in `checkpoint`.

    Args:
        checkpoint: a file in `checkpoints/` of a job's output directory.
        data: as for `fastdistill distill`; None: what the network was trained with. If the data
            are those of the training, only the images held out of it count. Otherwise the source's
            test part, and if it has none, all its images.
        device: "auto", "cpu" or "cuda".
        model: "module:factory" of a network of your own. It must be said here: a checkpoint is
            data, and reading it runs no code that it names.

    Raises:
        JobError: no such checkpoint, data that do not fit it, or a network of your own unnamed.
    """
    extras.require("fastdistill evaluate", "safetensors")
    network, about = load_network(Path(checkpoint).expanduser(), model)
    where = choose_device(device)
    trained_on = about["data"]
    source = read(data or trained_on["source"])
    images, what = _images(source, trained_on["sha256"], about["split_seed"])
    architecture = models.from_json(about["architecture"])
    _check(images, architecture, data or trained_on["source"])
    normalisation = Normalisation.from_json(about["normalisation"])
    inputs = normalisation.apply(images, where)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        says = engine.logits(network.to(where), inputs).argmax(1).cpu()
    correct = int((says == torch.from_numpy(images.labels)).sum())
    return Evaluation(
        about["name"], f"{source.name}, {what}", correct, len(images), models.parameters(network)
    )


def load_network(path: Path, where: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a checkpoint (on the CPU) and its description.

    Args:
        path: of the checkpoint.
        where: "module:factory" that builds it, for a network of the user's own.

    Raises:
        JobError: not a finished network of ours, or of the user's own with another `where`.
    """
    tensors, about = store.load(path)
    title = f"The checkpoint {path} cannot be evaluated."
    if about.get("kind") != NETWORK:
        raise JobError(
            title,
            f"It holds a {about.get('kind')}, not a finished network.",
            "Finish the job with --resume, or give another file of checkpoints/.",
        )
    try:
        architecture = models.from_json(about["architecture"])
        if isinstance(architecture, factories.Factory) and where != architecture.where:
            raise JobError(
                title,
                f"Its network comes from {architecture.where}, which is code of your own"
                + ("." if where is None else f"; {where} was named."),
                f"Add --model {architecture.where} to run that code.",
            )
        model = models.build(architecture, 0)
        model.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        raise JobError(
            title,
            f"Its header does not describe its tensors: {error}.",
            "Train it again with `fastdistill distill`.",
        ) from None
    return model, about


def _images(source: Source, sha256: str, split_seed: int) -> tuple[Images, str]:
    if source.test is not None:
        return source.test, "its test images"
    if source.sha256 == sha256:
        return split(source, split_seed).test, "the test images held out of the training"
    return source.train, "all images"


def _check(
    images: Images, architecture: models.Architecture | factories.Factory, source: str
) -> None:
    title = f"The data {source} do not fit this network."
    wanted = [architecture.channels, architecture.height, architecture.width]
    if list(images.pixels.shape[1:]) != wanted:
        raise JobError(
            title,
            f"Its images are {list(images.pixels.shape[1:])}; the network takes {wanted}.",
            "Give data of that size with --data.",
        )
    largest = int(images.labels.max())
    if largest >= architecture.classes:
        raise JobError(
            title,
            f"A label is {largest}; the network knows the classes 0..{architecture.classes - 1}.",
            "Give data of the same classes with --data.",
        )
