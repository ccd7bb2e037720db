"""Trains the teacher and the students of one job, each from where a kill left it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastdistill.distill import engine, models, objectives, store
from fastdistill.distill.config import Config
from fastdistill.distill.data import Dataset, Normalisation
from fastdistill.distill.directory import Directory
from fastdistill.distill.errors import JobError
from fastdistill.distill.listener import Listener
from fastdistill.distill.snapshot import Curve, Snapshot

TEACHER = "teacher"
TEACHER_LOGITS = "teacher-logits"
NETWORK = "network"  # the kind of checkpoint that `fastdistill evaluate` takes


@dataclass(frozen=True)
class Network:
    """A trained network.

    Attributes:
        name: "teacher", or the student's, such as "distilled".
        seed: it was trained with.
        labelled: number of training images whose label it saw.
        model: the network itself.
        curve: one entry per epoch.
        test_logits: [N_test, classes] on the CPU.
    """

    name: str
    seed: int
    labelled: int
    model: models.ConvNet
    curve: Curve
    test_logits: Tensor


def plan(config: Config) -> Iterator[tuple[str, int]]:
    """Name and seed of each network, in the order of training."""
    yield TEACHER, config.seed
    for student in config.students:
        for seed in range(config.seed, config.seed + config.seeds):
            yield student, seed


def file_name(name: str, seed: int) -> str:
    """Of the checkpoint of a network."""
    return f"{TEACHER if name == TEACHER else f'{name}-seed{seed}'}.safetensors"


def files(config: Config) -> list[str]:
    """Names of all finished checkpoints of a job."""
    return [*(file_name(*network) for network in plan(config)), f"{TEACHER_LOGITS}.safetensors"]


def labelled_count(config: Config, data: Dataset) -> int:
    """How many training images show the students their label.

    Raises:
        JobError: more than there are.
    """
    count = len(data.train)
    if config.labelled is None:
        return min(500, max(1, count // 8))
    if config.labelled > count:
        raise JobError(
            "A setting cannot be used.",
            f"labelled: {config.labelled} images asked for, {count} to train.",
            f"Choose at most {count}.",
        )
    return config.labelled


def draw_labelled(count: int, total: int, seed: int) -> Tensor:
    """`count` of `total` rows, sorted: the images that have a label, the same for all students."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(total, generator=generator)[:count].sort().values


class Workbench:
    """The images of a job as tensors, and what trains and keeps its networks.

    Args:
        config: all settings.
        directory: where checkpoints are kept.
        run: id of the job; checkpoints of others are ignored.
        data: training and test images.
        device: of all networks.
        listener: is told of each epoch.
    """

    def __init__(
        self,
        config: Config,
        directory: Directory,
        run: str,
        data: Dataset,
        device: torch.device,
        listener: Listener,
    ) -> None:
        self.config = config
        self.directory = directory
        self.run = run
        self.data = data
        self.listener = listener
        self.normalisation = Normalisation.of(data.train)
        self.images = self.normalisation.apply(data.train, device)
        self.test_images = self.normalisation.apply(data.test, device)
        self.labels = torch.from_numpy(data.train.labels).to(device)
        self.test_labels = torch.from_numpy(data.test.labels)
        self.labelled = labelled_count(config, data)
        self.size = (*data.train.pixels.shape[1:], data.source.classes)

    def train_all(self) -> tuple[Network, list[Network]]:
        """The teacher and its students, in the order of `plan`."""
        teacher = self._teacher()
        says = self._teacher_logits(teacher)
        students = [
            self._student(name, seed, says, teacher.test_logits.argmax(1))
            for name, seed in plan(self.config)
            if name != TEACHER
        ]
        return teacher, students

    def _teacher(self) -> Network:
        recipe = engine.Recipe(
            self.config.teacher_epochs,
            self.config.batch_size,
            self.config.learning_rate,
            self.config.seed,
            # Moved digits are still digits: 2 pixels of 28 gain the teacher half a point. The
            # students see the images as they are, for which the teacher's logits are kept.
            shift=min(self.size[1:3]) // 14,
        )
        rows = torch.arange(len(self.images))
        loss = objectives.labels_only(self.labels)
        return self._network(
            TEACHER, models.teacher(*self.size), recipe, rows, loss, len(rows), None
        )

    def _student(self, name: str, seed: int, says: Tensor, test_says: Tensor) -> Network:
        config = self.config
        recipe = engine.Recipe(config.epochs, config.batch_size, config.learning_rate, seed)
        rows = torch.arange(len(self.images))
        visible = draw_labelled(self.labelled, len(rows), seed)
        labels = objectives.hide(self.labels, visible.to(self.labels.device))
        labelled = self.labelled
        if name == "labels_only":
            rows, loss = visible, objectives.labels_only(labels)
        elif name == "distilled":
            labelled, loss = 0, objectives.distilled(says, config.temperature)
        else:
            loss = objectives.both(says, labels, config.temperature)
        architecture = models.student(*self.size)
        return self._network(name, architecture, recipe, rows, loss, labelled, test_says)

    def _teacher_logits(self, teacher: Network) -> Tensor:
        """The teacher's logits [N, classes] of the training images, computed once in a job."""
        path = self._path(f"{TEACHER_LOGITS}.safetensors")
        if path.exists():
            tensors, about = store.load(path)
            if about.get("run") == self.run:
                return tensors["train"].to(self.images.device)
        logits = engine.logits(teacher.model, self.images)
        store.save(path, {"train": logits}, {"kind": "logits", "run": self.run})
        return logits

    def _network(
        self,
        name: str,
        architecture: models.Architecture,
        recipe: engine.Recipe,
        rows: Tensor,
        loss: objectives.Loss,
        labelled: int,
        teacher_says: Tensor | None,
    ) -> Network:
        """Train one network, or load it where it is finished."""
        path = self._path(file_name(name, recipe.seed))
        snapshot = Snapshot(path.with_suffix(".training.safetensors"), self.run)
        model = models.build(architecture, recipe.seed).to(self.images.device)

        def measure(model: nn.Module) -> dict[str, float]:
            says = engine.logits(model, self.test_images).argmax(1).cpu()
            found = {"accuracy": share(says, self.test_labels)}
            if teacher_says is not None:
                found["agreement"] = share(says, teacher_says)
            return found

        def after_epoch(curve: Curve) -> None:
            self.listener.progress(path.stem, recipe.epochs, curve)

        curve = self._finished(path, model)
        if curve is None:
            curve = engine.train(
                model,
                self.images,
                rows,
                loss,
                recipe,
                snapshot=snapshot,
                measure=measure,
                after_epoch=after_epoch,
            )
            store.save(path, model.state_dict(), self._about(path.stem, architecture, curve))
        else:
            after_epoch(curve)
        snapshot.remove()
        test_logits = engine.logits(model, self.test_images).cpu()
        return Network(name, recipe.seed, labelled, model, curve, test_logits)

    def _path(self, name: str) -> Path:
        return self.directory.checkpoints / name

    def _finished(self, path: Path, model: nn.Module) -> Curve | None:
        """Load a finished network of this job into `model`; its curve, or None if there is none."""
        if not path.exists():
            return None
        tensors, about = store.load(path)
        if about.get("run") != self.run:
            return None
        model.load_state_dict(tensors)
        curve: Curve = about["curve"]
        return curve

    def _about(
        self, name: str, architecture: models.Architecture, curve: Curve
    ) -> dict[str, object]:
        """What `fastdistill evaluate` needs to build the network and find its test images."""
        return {
            "kind": NETWORK,
            "run": self.run,
            "name": name,
            "architecture": architecture.to_json(),
            "normalisation": self.normalisation.to_json(),
            "data": self.data.source.describe() | {"source": self.config.data},
            "split_seed": self.config.seed,
            "curve": curve,
        }


def share(ours: Tensor, theirs: Tensor) -> float:
    """Share of equal entries of two class vectors [N]: an accuracy, or an agreement."""
    return int((ours == theirs).sum()) / len(ours)
