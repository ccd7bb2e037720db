"""Trains the teacher and the students of one job, each from where a kill left it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdistill.distill import engine, factories, models, objectives, store
from fastdistill.distill.config import Config
from fastdistill.distill.data import Dataset, Normalisation
from fastdistill.distill.directory import Directory
from fastdistill.distill.distiller import Distiller, Hint, feature_shapes
from fastdistill.distill.errors import JobError
from fastdistill.distill.factories import Factory
from fastdistill.distill.listener import Listener
from fastdistill.distill.snapshot import Curve, Snapshot

TEACHER = "teacher"
TEACHER_LOGITS = "teacher-logits"
HINT_DISTILLED = "hint_distilled"
NETWORK = "network"  # the kind of checkpoint that `fastdistill evaluate` takes


@dataclass(frozen=True)
class Network:
    """A trained network.

    Attributes:
        name: "teacher", or the student's, such as "distilled".
        seed: it was trained with.
        labelled: number of training images whose label it saw; None if it came trained.
        model: the network itself.
        curve: one entry per epoch.
        test_logits: [N_test, classes] on the CPU.
    """

    name: str
    seed: int
    labelled: int | None
    model: nn.Module
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


def hint_epochs(config: Config) -> tuple[int, int]:
    """Epochs of "hint_distilled": of the hint, and of the distillation after it.

    Together as many as the other students have (with one epoch in all, one each).
    """
    hint = max(1, config.epochs // 5)
    return hint, max(1, config.epochs - hint)


def architecture(who: str, config: Config, data: Dataset) -> models.Architecture | Factory:
    """Of the teacher or the students: the user's own, or the job's.

    Raises:
        JobError: a checkpoint without a network that it belongs to.
    """
    size = (*data.train.pixels.shape[1:], data.source.classes)
    where = config.teacher if who == TEACHER else config.student
    checkpoint = config.teacher_checkpoint if who == TEACHER else config.student_checkpoint
    if where is not None:
        return Factory(where, *size)
    if checkpoint is not None:
        raise JobError(
            "A setting cannot be used.",
            f"{who}_checkpoint: {checkpoint} needs the network that it belongs to.",
            f"Name it with --{who} module:factory.",
        )
    return (models.teacher if who == TEACHER else models.student)(*size)


def check_networks(config: Config, data: Dataset) -> None:
    """Build the user's own networks and try them, before anything is replaced or trained.

    Raises:
        JobError: one cannot be used, or the layers of the hint are not there.
    """
    made = {}
    normalisation = Normalisation.of if config.normalise else Normalisation.none
    few = normalisation(data.train).apply(data.train[np.arange(2)], torch.device("cpu"))
    for who, path in ((TEACHER, config.teacher_checkpoint), ("student", config.student_checkpoint)):
        made[who] = models.build(architecture(who, config, data), config.seed)
        where = config.teacher if who == TEACHER else config.student
        if path is not None:
            factories.load(made[who], path)
        if where is not None:
            trained = who != TEACHER or path is None
            again = models.build(architecture(who, config, data), config.seed)
            factories.check_apart(again, made[who], where)
            factories.check(again, where, few, data.source.classes, trained)
    if config.student is not None:
        factories.check_apart(made["student"], made[TEACHER], config.student)
    if HINT_DISTILLED in config.students:
        hint_between(config, made["student"], made[TEACHER], few)


def hint_between(config: Config, student: nn.Module, teacher: nn.Module, images: Tensor) -> Hint:
    """The pair of layers that "hint_distilled" matches, with a regressor of their widths.

    Raises:
        JobError: a layer is not there, or the two differ in more than their widths.
    """
    title = "The student hint_distilled cannot be trained."
    layers = config.hint_layers
    if layers is None:
        if config.teacher is not None or config.student is not None:
            raise JobError(
                title,
                "Which layers it is to match is not known of your own networks.",
                "Name them with hint_layers, or leave it out of students.",
            )
        layers = (models.HINT_LAYER, models.HINT_LAYER)
    try:
        Distiller(student, teacher, hints=[Hint(*layers)])
        ours, theirs = (
            feature_shapes(who, model, name, images)
            for who, model, name in zip(
                ("student", "teacher"), (student, teacher), layers, strict=True
            )
        )
    except (ValueError, RuntimeError) as error:
        raise JobError(title, f"{error}.", "Correct hint_layers.") from None
    channel = 1 if len(ours) == 4 else len(ours) - 1
    kept = [[n for i, n in enumerate(shape) if i != channel] for shape in (ours, theirs)]
    if len(ours) < 2 or len(ours) != len(theirs) or kept[0] != kept[1]:
        raise JobError(
            title,
            f"The layers {layers[0]} and {layers[1]} have the shapes {list(ours)} and "
            f"{list(theirs)}; only their widths may differ.",
            "Choose other hint_layers.",
        )
    widths = (ours[channel], theirs[channel])
    return Hint(*layers, widths=widths, channel_dim=1 if len(ours) == 4 else -1, name="hint")


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
        normalisation = Normalisation.of if config.normalise else Normalisation.none
        self.normalisation = normalisation(data.train)
        self.images = self.normalisation.apply(data.train, device)
        self.test_images = self.normalisation.apply(data.test, device)
        self.labels = torch.from_numpy(data.train.labels).to(device)
        self.test_labels = torch.from_numpy(data.test.labels)
        self.labelled = labelled_count(config, data)
        self.size = (*data.train.pixels.shape[1:], data.source.classes)
        self.teacher_architecture = architecture(TEACHER, config, data)
        self.student_architecture = architecture("student", config, data)

    def train_all(self) -> tuple[Network, list[Network]]:
        """The teacher and its students, in the order of `plan`."""
        self.listener.begin(sum(self._epochs(name) for name, _ in plan(self.config)))
        teacher = self._teacher()
        says = self._teacher_logits(teacher)
        students = [
            self._student(name, seed, teacher.model, says, teacher.test_logits.argmax(1))
            for name, seed in plan(self.config)
            if name != TEACHER
        ]
        return teacher, students

    def _epochs(self, name: str) -> int:
        """All epochs of one network, those of its hint included."""
        config = self.config
        if name == TEACHER:
            return 0 if config.teacher_checkpoint else config.teacher_epochs
        return sum(hint_epochs(config)) if name == HINT_DISTILLED else config.epochs

    def _teacher(self) -> Network:
        if self.config.teacher_checkpoint is not None:
            return self._given_teacher(self.config.teacher_checkpoint)
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
            TEACHER, self.teacher_architecture, recipe, rows, loss, len(rows), None
        )

    def _given_teacher(self, path: str) -> Network:
        """The user's own, with its weights: one entry, of epoch 0, stands for its training."""
        model = models.build(self.teacher_architecture, self.config.seed)
        factories.load(model, path)
        model.to(self.images.device)
        logits, test_logits = (engine.logits(model, x) for x in (self.images, self.test_images))
        entry = {
            "epoch": 0,
            "loss": float(F.cross_entropy(logits, self.labels)),
            "accuracy": share(test_logits.argmax(1).cpu(), self.test_labels),
            "seconds": 0.0,
        }
        about = self._about(TEACHER, self.teacher_architecture, [entry])
        store.save(self._path(file_name(TEACHER, 0)), model.state_dict(), about)
        return Network(TEACHER, self.config.seed, None, model, [entry], test_logits.cpu())

    def _student(
        self, name: str, seed: int, teacher: nn.Module, says: Tensor, test_says: Tensor
    ) -> Network:
        config = self.config
        epochs = hint_epochs(config)[1] if name == HINT_DISTILLED else config.epochs
        recipe = engine.Recipe(epochs, config.batch_size, config.learning_rate, seed)
        rows = torch.arange(len(self.images))
        visible = draw_labelled(self.labelled, len(rows), seed)
        labels = objectives.hide(self.labels, visible.to(self.labels.device))
        labelled = self.labelled
        if name == "labels_only":
            rows, loss = visible, objectives.labels_only(labels)
        elif name in ("distilled", HINT_DISTILLED):
            labelled, loss = 0, objectives.distilled(says, config.temperature)
        else:
            loss = objectives.both(says, labels, config.temperature)
        prepare = None
        if name == HINT_DISTILLED:

            def prepare(model: nn.Module) -> None:
                self._hint(model, teacher, seed)

        return self._network(
            name, self.student_architecture, recipe, rows, loss, labelled, test_says, prepare
        )

    def _hint(self, model: nn.Module, teacher: nn.Module, seed: int) -> None:
        """FitNets' first stage: the student's lower layers learn the teacher's middle layer.

        Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", equation 3: the student's guided
        layer, through a regressor (a 1x1 convolution) that is thrown away afterwards. Layers above
        the guided one get no gradient.
        """
        path = self._path(file_name(HINT_DISTILLED, seed)).with_suffix(".hint.safetensors")
        snapshot = Snapshot(path.with_suffix(".training.safetensors"), self.run)
        if path.exists():
            tensors, about = store.load(path)
            if about.get("run") == self.run:
                model.load_state_dict(tensors)
                snapshot.remove()  # a kill may have come between the two files
                return
        config = self.config
        hint = hint_between(self.config, model, teacher, self.images[:2])
        with torch.random.fork_rng(devices=[]):  # of the regressor's start
            torch.default_generator.manual_seed(seed)
            distiller = Distiller(model, teacher, hints=[hint])
        count = len(self.images)
        batch = min(config.batch_size, count)
        steps = count // batch

        def batches(generator: torch.Generator, _: int) -> Iterator[Tensor]:
            return iter(torch.randperm(count, generator=generator)[: steps * batch].split(batch))

        recipe = engine.Recipe(hint_epochs(config)[0], batch, config.learning_rate, seed)
        engine.loop(
            distiller,
            batches,
            lambda drawn: distiller(self.images[drawn.to(self.images.device)]).losses.total,
            recipe,
            steps,
            snapshot=snapshot,
            measure=lambda _: {},
            after_epoch=lambda curve: self.listener.progress(path.stem, recipe.epochs, curve),
        )
        store.save(path, model.state_dict(), {"kind": "hint stage", "run": self.run})
        snapshot.remove()

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
        architecture: models.Architecture | Factory,
        recipe: engine.Recipe,
        rows: Tensor,
        loss: objectives.Loss,
        labelled: int,
        teacher_says: Tensor | None,
        prepare: Callable[[nn.Module], None] | None = None,
    ) -> Network:
        """Train one network, or load it where it is finished.

        `prepare` makes its first stage, unless a kill left it in the second one.
        """
        path = self._path(file_name(name, recipe.seed))
        snapshot = Snapshot(path.with_suffix(".training.safetensors"), self.run)
        model = models.build(architecture, recipe.seed)
        if name != TEACHER and self.config.student_checkpoint is not None:
            factories.load(model, self.config.student_checkpoint)
        model = model.to(self.images.device)

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
            if prepare is not None:
                prepare(model)
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
        path.with_suffix(".hint.safetensors").unlink(missing_ok=True)
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
        self, name: str, architecture: models.Architecture | Factory, curve: Curve
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
