"""An attack that a reader can run: what a student gives away, against what is claimed of it.

One run with many coins (Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training
Run"): each of m examples is put among the private records or left out by a fair coin; the student
is trained; the attacker names the r examples that look most and least like members. If the
training is (epsilon, delta)-private, hardly more than r e^epsilon / (1 + e^epsilon) names are
right. Too many prove a larger epsilon; few prove nothing: the claim is then "consistent with" what
was measured. With r names all of them right, no more than about log(r / 3) can be proven.

Examples are ordinary records (membership inference), and canaries: public images with a wrong
label, which are themselves the queries that the teachers answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill.distill import checks, environment, extras, store
from fastdistill.distill.checks import Settings
from fastdistill.distill.config import BUNDLED, MAX_SEED
from fastdistill.distill.data import load
from fastdistill.distill.errors import JobError
from fastdistill.distill.listener import Listener
from fastdistill.distill.private import committee, recipes, shards
from fastdistill.distill.private.accounting import noise_for
from fastdistill.distill.private.answers import SENSITIVITY, Answers
from fastdistill.distill.private.auditing import CONFIDENCE, correct_guesses, lower_bound
from fastdistill.distill.private.committee import Linear
from fastdistill.distill.private.config import PrivateConfig
from fastdistill.distill.private.experiment import Experiment
from fastdistill.distill.private.features import Head
from fastdistill.distill.private.ledger import Ledger
from fastdistill.distill.private.provenance import DisjointShards
from fastdistill.distill.private.training import (
    DPSGD,
    Training,
    dp_train,
    fit,
    loss_value_noise,
)

TEACHER_RIDGE = 0.01  # teachers fit their records exactly: the attacker's best case
PARTS = 50
TEMPERATURE = 0.1
STUDENT = Training(300, 10_000, 0.02, 0.0)
RATE, STEPS = 0.1, 100
GRADIENT_STEPS = 30
OUTPUTS = ("audit.json", "audit.md")


@dataclass(frozen=True)
class AuditConfig(Settings):
    """The settings of `fastdistill audit`.

    Attributes:
        out: where audit.json and audit.md go.
        data: as in `fastdistill distill-private`.
        seed: of everything, the coins included.
        canaries: public images with a wrong label, each among the records by a coin.
        records: ordinary records, the same.
        epsilons: claimed by the private rows.
        delta: of each.
        resume: has no meaning here; false.

    Raises:
        JobError: a value has the wrong type or is out of range.
    """

    out: str = "out/audit"
    data: str = BUNDLED
    seed: int = 0
    canaries: int = 300
    records: int = 1500
    epsilons: tuple[float, ...] = (2.0, 8.0)
    delta: float = 1e-5
    resume: bool = False

    CHECKS: ClassVar[Mapping[str, checks.Check]] = {
        **{name: PrivateConfig.CHECKS[name] for name in ("out", "data", "epsilons", "delta")},
        "seed": checks.integer(0, MAX_SEED),
        "canaries": checks.integer(20),
        "records": checks.integer(100),
        "resume": checks.flag,
    }


def attack(scores: Tensor, member: Tensor, delta: float) -> dict[str, Any]:
    """Name the third of the examples with the highest and with the lowest score.

    Args:
        scores: [m], higher for what looks like a member.
        member: bool [m], the coins.
        delta: of the claim.

    Returns:
        examples, guesses, right, auc, and epsilon_lower at 95 %.
    """
    m = len(scores)
    each = m // 3
    order = scores.argsort()
    right = correct_guesses(scores, member, 2 * each)
    ranks = torch.empty(m, dtype=torch.float64)
    ranks[order] = torch.arange(1, m + 1, dtype=torch.float64)
    inside = int(member.sum())
    pairs = inside * (m - inside)
    auc = (float(ranks[member].sum()) - inside * (inside + 1) / 2) / pairs if pairs else 0.5
    return {
        "examples": m,
        "guesses": 2 * each,
        "right": right,
        "auc": auc,
        "epsilon_lower": lower_bound(m, 2 * each, right, delta),
    }


@dataclass(frozen=True)
class Scene:
    """Records and canaries, the coins, and what all recipes start from.

    Attributes:
        records: features of the ordinary records [n, d].
        labels: theirs.
        member: their coins.
        canaries: features of the canaries [m, d], which are the queries.
        wrong: their wrong labels.
        planted: their coins.
        classes: number of classes.
        seed: of the training.
        delta: of the claims.
    """

    records: Tensor
    labels: Tensor
    member: Tensor
    canaries: Tensor
    wrong: Tensor
    planted: Tensor
    classes: int
    seed: int
    delta: float

    @property
    def private(self) -> tuple[Tensor, Tensor, list[str]]:
        """Features, labels and ids of what is among the records."""
        x = torch.cat([self.records[self.member], self.canaries[self.planted]])
        y = torch.cat([self.labels[self.member], self.wrong[self.planted]])
        ids = [f"record {i}" for i in self.member.nonzero()[:, 0].tolist()]
        return x, y, ids + [f"canary {i}" for i in self.planted.nonzero()[:, 0].tolist()]

    @property
    def most(self) -> int:
        """How many records there could be: public, unlike the coins."""
        return len(self.records) + len(self.canaries)

    def student(self) -> Head:
        """Untrained."""
        return Head(self.records.shape[1], self.classes, self.seed)

    def teachers(self, k: int) -> Linear:
        """One on each of k parts of the records; a single one is without any privacy."""
        x, y, ids = self.private
        parts = shards.assign(ids, k, "audit")
        return Linear(committee.fit_linear(x, y, parts, self.classes, TEACHER_RIDGE))

    def ledger(self, *trainings: DPSGD) -> Ledger:
        """In memory; of these trainings, fixed in advance, if any."""
        planned = [settings.mechanism("private") for settings in trainings]
        if not planned:
            return Ledger(delta=self.delta, adjacency="add_remove")
        return Ledger(delta=self.delta, adjacency="add_remove", accountant="prv", schedule=planned)

    def dpsgd(self, epsilon: float, trainings: int = 1) -> list[DPSGD]:
        """So many trainings within epsilon; rate and expected batch do not come from the coins."""
        noise = noise_for(epsilon, self.delta, sampling_rate=RATE, steps=trainings * STEPS)
        batch = RATE * self.most / 2
        return [DPSGD(RATE, STEPS, noise, 1.0, batch, 0.5, self.seed + i) for i in range(trainings)]


def scene(config: AuditConfig, say: Callable[[str], None]) -> Scene:
    """Toss the coins.

    Raises:
        JobError: the data have too few images.
    """
    data = load(config.data, config.seed)
    settings = PrivateConfig(out=config.out, data=config.data, seed=config.seed, labelled=1)
    x = Experiment(settings, data, "audit", say)
    if x.sizes.public < config.canaries or x.sizes.private < config.records:
        raise JobError(
            "A setting cannot be used.",
            f"canaries: {config.canaries} of {x.sizes.public} public images; records: "
            f"{config.records} of {x.sizes.private} private ones.",
            "Choose fewer.",
        )
    generator = torch.Generator().manual_seed(config.seed + 1)
    drawn = torch.randperm(x.sizes.private, generator=generator)[: config.records]
    canaries = torch.randperm(x.sizes.public, generator=generator)[: config.canaries]
    shift = torch.randint(1, x.classes, (config.canaries,), generator=generator)
    return Scene(
        x.private[drawn],
        x.labels[drawn],
        torch.rand(config.records, generator=generator) < 0.5,
        x.public[canaries],
        (x.public_labels[canaries] + shift) % x.classes,
        torch.rand(config.canaries, generator=generator) < 0.5,
        x.classes,
        config.seed,
        config.delta,
    )


def _non_private(s: Scene, epsilon: float | None) -> tuple[Head, Ledger | None]:
    student = s.student()
    says = s.teachers(1).logits(s.canaries)[0] / TEMPERATURE
    recipes.distil(student, s.canaries, says, 1.0, None, STUDENT)
    return student, None


def _as_released(s: Scene, epsilon: float | None) -> tuple[Head, Ledger | None]:
    student, noise = s.student(), torch.Generator().manual_seed(s.seed)
    says = s.teachers(1).logits(s.canaries)[0] / TEMPERATURE
    fit(
        student, len(says),
        lambda rows: loss_value_noise(student(s.canaries[rows]), says[rows], 1.0, 10.0, noise),
        STUDENT,
    )  # fmt: skip
    return student, None


def _r1(s: Scene, epsilon: float | None) -> tuple[Head, Ledger | None]:
    assert epsilon is not None
    x, y, _ = s.private
    (settings,) = s.dpsgd(epsilon)
    teacher, student, ledger = s.student(), s.student(), s.ledger(settings)
    made = dp_train(
        teacher, x, y, F.cross_entropy, settings, dataset_id="private", ledger=ledger, key="teacher"
    )
    recipes.dp_teacher(
        student, teacher, made, s.canaries, ledger=ledger, training=STUDENT, teacher_key="teacher"
    )
    return student, ledger


def _r2(s: Scene, epsilon: float | None) -> tuple[Head, Ledger | None]:
    """Both trainings on all records, so that they compose."""
    assert epsilon is not None
    x, y, _ = s.private
    first, second = s.dpsgd(epsilon, 2)
    teacher, student, ledger = s.student(), s.student(), s.ledger(first, second)
    made = dp_train(
        teacher, x, y, F.cross_entropy, first, dataset_id="private", ledger=ledger, key="teacher"
    )
    recipes.dp_student(
        student, teacher, made, x, second, dataset_id="private", ledger=ledger, key="student",
        teacher_key="teacher",
    )  # fmt: skip
    return student, ledger


def _r3(s: Scene, epsilon: float | None) -> tuple[Head, Ledger | None]:
    assert epsilon is not None
    student, teachers, ledger = s.student(), s.teachers(PARTS), s.ledger()
    queries = len(s.canaries)
    answers = Answers(
        teachers, DisjointShards(PARTS), s.canaries, temperature=TEMPERATURE,
        noise_std=noise_for(epsilon, s.delta, sensitivity=SENSITIVITY, releases=queries),
        ledger=ledger, generator=torch.Generator().manual_seed(s.seed),
    )  # fmt: skip
    recipes.knowledge_perturbation(
        student, teachers, DisjointShards(PARTS), answers, queries=queries, training=STUDENT
    )
    return student, ledger


def _r3_gradient(s: Scene, epsilon: float | None) -> tuple[Head, Ledger | None]:
    assert epsilon is not None
    student, ledger = s.student(), s.ledger()
    noise = noise_for(
        epsilon, s.delta, sensitivity=2.0, releases=len(s.canaries), steps=GRADIENT_STEPS
    )
    recipes.gradient_perturbation(
        student, s.teachers(PARTS), DisjointShards(PARTS), s.canaries, max_norm=1.0,
        noise_multiplier=noise, ledger=ledger, temperature=TEMPERATURE,
        training=Training(GRADIENT_STEPS, 10_000, 0.02, 0.0),
        generator=torch.Generator().manual_seed(s.seed),
    )  # fmt: skip
    return student, ledger


MAKERS: dict[str, Callable[[Scene, float | None], tuple[Head, Ledger | None]]] = {
    "non_private": _non_private,
    "as_released": _as_released,
    "R1": _r1,
    "R2": _r2,
    "R3": _r3,
    "R3 gradient": _r3_gradient,
}


def examine(s: Scene, recipe: str, epsilon: float | None) -> dict[str, Any]:
    """Train a student of the recipe and attack it.

    Returns:
        recipe, claimed (epsilon; None: none), canaries and membership (see `attack`), and the
        verdict in words.
    """
    student, ledger = MAKERS[recipe](s, epsilon)
    with torch.no_grad():
        canary = F.log_softmax(student(s.canaries), 1).gather(1, s.wrong[:, None])[:, 0]
        record = F.log_softmax(student(s.records), 1).gather(1, s.labels[:, None])[:, 0]
    found = {
        "canaries": attack(canary, s.planted, s.delta),
        "membership": attack(record, s.member, s.delta),
    }
    claimed = None if ledger is None else ledger.epsilon()
    lower = max(result["epsilon_lower"] for result in found.values())
    if claimed is None:
        verdict = f"no claim; at least {lower:.2f}"
    elif lower > claimed:
        verdict = f"REFUTED: claimed {claimed:.2f}, at least {lower:.2f}"
    else:
        verdict = f"consistent with {claimed:.2f}"
    return {"recipe": recipe, "claimed": claimed, **found, "verdict": verdict}


HEADINGS = ("Student", "Claimed", "Canaries, at least", "Records, at least", "Verdict")


def table(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row per student, for the terminal and the page alike."""
    return [
        (
            run["recipe"],
            "none" if run["claimed"] is None else f"{run['claimed']:.2f}",
            *(
                f"{run[kind]['epsilon_lower']:.2f} ({run[kind]['right']}/{run[kind]['guesses']})"
                for kind in ("canaries", "membership")
            ),
            run["verdict"],
        )
        for run in figures["runs"]
    ]


def notes(figures: dict[str, Any]) -> list[str]:
    """What one must know to read the table."""
    m, n = figures["settings"]["canaries"], figures["settings"]["records"]
    best = lower_bound(m, 2 * (m // 3), 2 * (m // 3), figures["settings"]["delta"])
    return [
        f"Lower bounds on epsilon at {CONFIDENCE:.0%} confidence, each by itself, at delta = "
        f"{figures['settings']['delta']:g}: right guesses in brackets, of {m} canaries and {n} "
        "records, each among the private records by a fair coin.",
        f"All guesses right would prove {best:.1f}. A bound below the claim proves nothing: the "
        "claim is consistent with the measurement, the proof is in docs/privacy.md.",
    ]


def run(config: AuditConfig, listener: Listener | None = None) -> dict[str, Any]:
    """Attack a student of each recipe; writes audit.json and audit.md.

    Raises:
        JobError: for whatever the user can put right.
    """
    extras.require("fastdistill audit", "rich", "sklearn")
    listener = listener or Listener()
    folder = Path(config.out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    s = scene(config, listener.say)
    plan: list[tuple[str, float | None]] = [("non_private", None), ("as_released", None)]
    plan += [(recipe, e) for recipe in list(MAKERS)[2:] for e in config.epsilons]
    runs = []
    for recipe, epsilon in plan:
        runs.append(examine(s, recipe, epsilon))
        listener.say(f"{recipe}: {runs[-1]['verdict']}")
    figures = {
        "runs": runs,
        "confidence": CONFIDENCE,
        "settings": config.settings(),
        "environment": environment.describe(torch.device("cpu")),
    }
    lines = [f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in table(figures)]
    text = "\n".join(["# Audit", "", *lines, "", *notes(figures), ""])
    store.write_atomic(folder / "audit.md", text.encode())
    store.write_json(folder / "audit.json", figures)
    return figures
