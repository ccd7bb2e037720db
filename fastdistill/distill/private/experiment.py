"""The rows of the job, and what makes one student of a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill.distill.data import Dataset, Normalisation
from fastdistill.distill.errors import JobError
from fastdistill.distill.private import committee, features, recipes, shards
from fastdistill.distill.private.accounting import noise_for
from fastdistill.distill.private.answers import SENSITIVITY, Answers
from fastdistill.distill.private.committee import Linear
from fastdistill.distill.private.config import FILTERS, RECIPE, STUDENT_FILTERS, PrivateConfig
from fastdistill.distill.private.features import Head, PatchFeatures
from fastdistill.distill.private.ledger import Ledger
from fastdistill.distill.private.provenance import DisjointShards
from fastdistill.distill.private.recipes import Labels
from fastdistill.distill.private.selection import STRATEGIES
from fastdistill.distill.private.training import DPSGD, Training, dp_train, fit, loss_value_noise

UNIT = "one image with its label"
PRIVATE, TEACHERS_HALF, STUDENTS_HALF = "private", "private, first half", "private, second half"
SALT = "fastdistill distill-private"
ROUNDS = 3  # of the strategies that look at the student
GRADIENT_NORM, GRADIENT_STEPS, GRADIENT_RATE = 1.0, 30, 0.03


@dataclass(frozen=True)
class Row:
    """One configuration.

    Attributes:
        recipe: "labels", "non_private", "as_released", "R1", "R2", "R3" or "R3 gradient".
        k: teachers; None where there is one, not of a part.
        queries: to them; None: all public images.
        strategy: of the queries.
        target: the epsilon that the noise is calibrated for; None: none.
    """

    recipe: str
    k: int | None = None
    queries: int | None = None
    strategy: str | None = None
    target: float | None = None

    @property
    def name(self) -> str:
        """For files, scopes and people."""
        parts = [self.recipe.replace(" ", "_")]
        if self.k is not None:
            parts.append(f"k{self.k}-n{self.queries}-{self.strategy}")
        return "-".join(parts + ([] if self.target is None else [f"eps{self.target:g}"]))


@dataclass(frozen=True)
class Sizes:
    """How many records, queries and parts.

    Attributes:
        private: records.
        public: images.
        parts: k of the central row.
        queries: of the central row.
        all_parts: k of the rows around it.
        all_queries: queries of the rows around it.
    """

    private: int
    public: int
    parts: int
    queries: int
    all_parts: tuple[int, ...]
    all_queries: tuple[int, ...]

    @classmethod
    def of(cls, config: PrivateConfig, train: int) -> Sizes:
        """For so many training images.

        Raises:
            JobError: they are too few for the settings.
        """
        public = train // 6
        private = train - public
        left = public - config.labelled
        if left < 8 or private < 100:
            raise JobError(
                "The data are too few for a private distillation.",
                f"{train} training images make {private} private and {public} public ones, of "
                f"which {config.labelled} have a label.",
                "Give more images, or a smaller labelled.",
            )
        parts = config.parts or max(private // 200, 2)
        queries = config.queries or max(public // 10, 4)
        if parts > private or queries > left:
            raise JobError(
                "A setting cannot be used.",
                f"parts: {parts} of {private} private images; queries: {queries} of {left} public "
                "ones without a label.",
                "Choose smaller ones.",
            )
        ks = {1, max(2 * parts // 5, 1), parts, min(2 * parts, private)}
        asked = {max(queries // 4, 1), queries, min(4 * queries, left)}
        return cls(private, public, parts, queries, tuple(sorted(ks)), tuple(sorted(asked)))


def rows(config: PrivateConfig, sizes: Sizes) -> list[Row]:
    """All configurations: one factor varied at a time around the central row."""
    k, n = sizes.parts, sizes.queries
    found = [Row("labels"), Row("non_private"), Row("as_released")]
    for target in config.epsilons:
        found += [Row("R1", target=target), Row("R2", target=target)]
        r3 = [Row("R3", k, n, "random", target)]
        r3 += [Row("R3", other, n, "random", target) for other in sizes.all_parts]
        r3 += [Row("R3", k, other, "random", target) for other in sizes.all_queries]
        r3 += [Row("R3", k, n, strategy, target) for strategy in STRATEGIES]
        found += dict.fromkeys(r3)
        found.append(Row("R3 gradient", k, n, "random", target))
    return found


@dataclass(frozen=True)
class Made:
    """A trained student of a row and what was debited for it."""

    student: Head
    ledger: Ledger


class Experiment:
    """The data of a job, its teachers, and what trains a student.

    Args:
        config: all settings.
        data: training and test images.
        run: id of the job.
        say: told what is being prepared.
    """

    def __init__(
        self, config: PrivateConfig, data: Dataset, run: str, say: Callable[[str], None]
    ) -> None:
        self.config = config
        self.data = data
        self.run = run
        self.say = say
        self.out = Path(config.out).expanduser()
        self.sizes = Sizes.of(config, len(data.train))
        self.classes = data.source.classes
        # Which image is public is decided by its number in the source, before any is looked at.
        generator = torch.Generator().manual_seed(config.seed)
        order = torch.randperm(len(data.train), generator=generator)
        self.private_rows = order[: self.sizes.private].sort().values
        self.public_rows = order[self.sizes.private :].sort().values
        labels = torch.from_numpy(data.train.labels)
        self.labels, self.public_labels = labels[self.private_rows], labels[self.public_rows]
        self.test_labels = torch.from_numpy(data.test.labels)
        self._teachers: dict[int, Linear] = {}

    def images(self, rows: Tensor | None) -> Tensor:
        """Pixels of training images, or of the test images: no statistic of any is in them."""
        part = self.data.test if rows is None else self.data.train[rows.numpy()]
        return Normalisation.none(part).apply(part, torch.device("cpu"))

    @cached_property
    def representation(self) -> PatchFeatures:
        """Learnt from the public images."""
        self.say("Learning a representation from the public images.")
        return features.learn(self.images(self.public_rows), FILTERS, self.config.seed)

    @cached_property
    def private(self) -> Tensor:
        """Features of the private images."""
        self.say("Representing the private images.")
        return features.apply(self.representation, self.images(self.private_rows))

    @cached_property
    def public(self) -> Tensor:
        """Features of the public images."""
        return features.apply(self.representation, self.images(self.public_rows))

    @cached_property
    def test(self) -> Tensor:
        """Features of the test images that a student sees."""
        return features.apply(self.representation.first(STUDENT_FILTERS), self.images(None))

    @cached_property
    def width(self) -> int:
        """Features that a student sees."""
        return STUDENT_FILTERS * self.representation.pool**2

    def ids(self) -> list[int]:
        """Of the private records: their numbers in the source, which none of them shares."""
        return [int(row) for row in self.private_rows]

    def teachers(self, k: int) -> Linear:
        """One on each of k parts. What they say raw stays in this process."""
        if k not in self._teachers:
            self.say(f"Training {k} teacher{'s' if k > 1 else ''}.")
            parts = shards.assign(self.ids(), k, SALT)
            weights = committee.fit_linear(
                self.private, self.labels, parts, self.classes, RECIPE.ridge
            )
            self._teachers[k] = Linear(weights)
        return self._teachers[k]

    def make(self, row: Row, seed: int) -> Made:
        """Train one student."""
        ledger, maker = self.ledger(row, seed), _MAKERS[row.recipe]
        student = Head(self.width, self.classes, seed)
        maker(self, row, seed, student, ledger)
        return Made(student, ledger)

    def ledger(self, row: Row, seed: int) -> Ledger:
        """Of one student of a row, with its debits so far.

        Its schedule is fixed in advance: an interrupted release stands in it twice.
        """
        settings: dict[str, Any] = {"adjacency": "zero_out"}
        if row.recipe.startswith("R3"):
            settings = {"adjacency": "replace"}
        elif row.recipe in ("R1", "R2"):
            names = [PRIVATE] if row.recipe == "R1" else [TEACHERS_HALF, STUDENTS_HALF]
            planned = [self.dpsgd(row, seed, name).mechanism(name) for name in names]
            settings |= {
                "accountant": "prv", "schedule": planned, "disjoint": row.recipe == "R2",
            }  # fmt: skip
        return Ledger(
            delta=self.config.delta, unit=UNIT, path=self.out / "ledger.jsonl",
            scope=f"{self.run} {row.name} seed {seed}", **settings,
        )  # fmt: skip

    def replay(self, ledger: Ledger, key: str) -> bool:
        """Whether a seeded training that a kill interrupted is made again, bit by bit."""
        return self.config.noise == "reproducible" and key in ledger.keys

    def generator(self, seed: int) -> torch.Generator | None:
        """Of the noise."""
        if self.config.noise == "secure":
            return None
        return torch.Generator().manual_seed(1_000_003 * (seed + 1))

    def visible(self, seed: int) -> Labels:
        """The public images with a label, drawn anew for each seed."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(self.sizes.public, generator=generator)[: self.config.labelled]
        return Labels(drawn, self.public_labels[drawn])

    def training(self, seed: int) -> Training:
        """Of a student."""
        return Training(RECIPE.steps, 1000, RECIPE.learning_rate, RECIPE.weight_decay, seed)

    def dpsgd(self, row: Row, seed: int, dataset: str) -> DPSGD:
        """Of one training of row R1 or R2, on the records that `dataset` names."""
        assert row.target is not None
        part = self.sizes.private if dataset == PRIVATE else len(self.halves[dataset])
        rate, steps = RECIPE.sampling_rate, RECIPE.dp_steps
        if row.target not in self._multipliers:
            self._multipliers[row.target] = noise_for(
                row.target, self.config.delta, sampling_rate=rate, steps=steps
            )
        return DPSGD(
            rate, steps, self._multipliers[row.target], RECIPE.max_grad_norm, rate * part,
            RECIPE.dp_learning_rate, None if self.config.noise == "secure" else seed,
        )  # fmt: skip

    @cached_property
    def _multipliers(self) -> dict[float, float]:
        return {}

    @cached_property
    def halves(self) -> dict[str, Tensor]:
        """The private records in two, by their own ids."""
        first, second = shards.assign(self.ids(), 2, f"{SALT}, halves")
        return {TEACHERS_HALF: first, STUDENTS_HALF: second}

    def accuracy(self, student: Head) -> float:
        """On the test images."""
        with torch.no_grad():
            return float((student(self.test).argmax(1) == self.test_labels).double().mean())


def _labels(x: Experiment, row: Row, seed: int, student: Head, ledger: Ledger) -> None:
    recipes.learn(student, x.public, x.visible(seed), x.training(seed))


def _non_private(x: Experiment, row: Row, seed: int, student: Head, ledger: Ledger) -> None:
    """What `recipes` refuses (R4): a teacher on all private records, asked without noise."""
    says = x.teachers(1).logits(x.public)[0] / RECIPE.temperature
    recipes.distil(student, x.public, says, 1.0, x.visible(seed), x.training(seed))


def _as_released(x: Experiment, row: Row, seed: int, student: Head, ledger: Ledger) -> None:
    """The same with RONA's noise on the value of the loss."""
    says, labels = x.teachers(1).logits(x.public)[0] / RECIPE.temperature, x.visible(seed)
    noise = torch.Generator().manual_seed(seed + 1)

    def loss(drawn: Tensor) -> Tensor:
        value = loss_value_noise(student(x.public[drawn]), says[drawn], 1.0, 10.0, noise)
        hard = F.cross_entropy(student(x.public[labels.rows]), labels.classes)
        return value + recipes.HARD_WEIGHT * hard

    fit(student, len(x.public), loss, x.training(seed))


def _r1(x: Experiment, row: Row, seed: int, student: Head, ledger: Ledger) -> None:
    teacher = Head(x.width, x.classes, seed)
    made = dp_train(
        teacher, x.private[:, : x.width], x.labels, F.cross_entropy, x.dpsgd(row, seed, PRIVATE),
        dataset_id=PRIVATE, ledger=ledger, key="teacher", replay=x.replay(ledger, "teacher"),
    )  # fmt: skip
    recipes.dp_teacher(
        student, teacher, made, x.public, ledger=ledger, labels=x.visible(seed),
        training=x.training(seed), teacher_key="teacher",
    )  # fmt: skip


def _r2(x: Experiment, row: Row, seed: int, student: Head, ledger: Ledger) -> None:
    teacher = Head(x.width, x.classes, seed)
    ours, theirs = x.halves[STUDENTS_HALF], x.halves[TEACHERS_HALF]
    made = dp_train(
        teacher, x.private[theirs, : x.width], x.labels[theirs], F.cross_entropy,
        x.dpsgd(row, seed, TEACHERS_HALF), dataset_id=TEACHERS_HALF, ledger=ledger,
        key="teacher", replay=x.replay(ledger, "teacher"),
    )  # fmt: skip
    recipes.dp_student(
        student, teacher, made, x.private[ours, : x.width],
        x.dpsgd(row, seed + 500, STUDENTS_HALF), dataset_id=STUDENTS_HALF, ledger=ledger,
        key="student", teacher_key="teacher", replay=x.replay(ledger, "student"),
    )  # fmt: skip


def _r3(x: Experiment, row: Row, seed: int, student: Head, ledger: Ledger) -> None:
    assert row.k is not None and row.queries is not None and row.strategy is not None
    assert row.target is not None
    teachers, provenance = x.teachers(row.k), DisjointShards(row.k, PRIVATE)
    answers = Answers(
        teachers, provenance, x.public, temperature=RECIPE.temperature,
        noise_std=noise_for(
            row.target, x.config.delta, sensitivity=SENSITIVITY, releases=row.queries
        ),
        ledger=ledger, folder=x.out / "answers" / x.run / f"{row.name}-seed{seed}",
        generator=x.generator(seed),
    )  # fmt: skip
    recipes.knowledge_perturbation(
        student, teachers, provenance, answers, queries=row.queries, strategy=row.strategy,
        rounds=1 if row.strategy == "random" else min(ROUNDS, row.queries), seed=seed,
        labels=x.visible(seed), training=x.training(seed),
    )  # fmt: skip


def _r3_gradient(x: Experiment, row: Row, seed: int, student: Head, ledger: Ledger) -> None:
    assert row.k is not None and row.queries is not None and row.target is not None
    labels = x.visible(seed)
    free = torch.ones(x.sizes.public, dtype=torch.bool)
    free[labels.rows] = False
    rows = free.nonzero()[:, 0]
    chosen = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    std = noise_for(
        row.target, x.config.delta, sensitivity=2 * GRADIENT_NORM,
        releases=row.queries, steps=GRADIENT_STEPS,
    )  # fmt: skip
    recipe = Training(GRADIENT_STEPS, row.queries, GRADIENT_RATE, RECIPE.weight_decay, seed)
    recipes.gradient_perturbation(
        student, x.teachers(row.k), DisjointShards(row.k, PRIVATE),
        x.public[chosen[: row.queries]], max_norm=GRADIENT_NORM,
        noise_multiplier=std / GRADIENT_NORM, ledger=ledger, training=recipe, labels=labels,
        label_inputs=x.public, temperature=RECIPE.temperature, generator=x.generator(seed),
    )  # fmt: skip


_MAKERS: dict[str, Callable[[Experiment, Row, int, Head, Ledger], None]] = {
    "labels": _labels,
    "non_private": _non_private,
    "as_released": _as_released,
    "R1": _r1,
    "R2": _r2,
    "R3": _r3,
    "R3 gradient": _r3_gradient,
}


def epsilon_of(row: Row, ledger: Ledger) -> float | None:
    """What may be claimed: None for rows without a guarantee, 0 where no private record is used."""
    if row.recipe in ("non_private", "as_released"):
        return None
    return 0.0 if row.recipe == "labels" else ledger.epsilon()
