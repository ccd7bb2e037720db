"""The recipes of private distillation. Each takes only the provenance for which it is private.

- R1 `dp_teacher`: a public or differentially private teacher, public queries: post-processing.
- R2 `dp_student`: a public or differentially private teacher; the student by DP-SGD on private x.
- R3 `knowledge_perturbation`: teachers on disjoint parts, public queries, noise on their sum.
- R4, a teacher without noise and a student without output perturbation, is refused: see `refuse`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdistill import kd_loss
from fastdistill.distill.distiller import Distiller, Hint
from fastdistill.distill.private import selection
from fastdistill.distill.private.answers import Answers, target_logits, trust
from fastdistill.distill.private.committee import Committee, fingerprint
from fastdistill.distill.private.ledger import Ledger
from fastdistill.distill.private.mechanism import Mechanism, count
from fastdistill.distill.private.provenance import (
    DisjointShards,
    DPTrained,
    NoGuarantee,
    NonPrivate,
    check,
)
from fastdistill.distill.private.training import DPSGD, Training, dp_train, fit
from fastdistill.privacy import noisy_gradient_sum

HARD_WEIGHT = 0.1
"""Of the public labels beside the answers."""

SELF_LEARNING = 0.01
"""Learning rate of the last stage over that of the others: at their rate, a few labels undo what
the answers have taught."""

_R4 = (
    "a teacher without noise gives no guarantee: what it says of any query, z_t(x), depends on all "
    "records that it was trained on, and nothing bounds by how much. DP-SGD on the student does "
    "not help: it bounds what the student's own records do to it, not what the teacher's records "
    "do to every target. Instead: train the teacher by DP-SGD (DPTrained, then dp_teacher), or "
    "release its answers with noise (knowledge_perturbation; a single teacher on all records is "
    "DisjointShards(1))"
)


class Labels(NamedTuple):
    """Public labels.

    Attributes:
        rows: int64 [m], of the public queries.
        classes: int64 [m].
    """

    rows: Tensor
    classes: Tensor


def refuse(recipe: str, provenance: object) -> None:
    """Raise with the reason where `recipe` has no guarantee for this provenance.

    Raises:
        NoGuarantee: there is none.
        TypeError: it is no provenance.
    """
    given = check(provenance)
    if isinstance(given, NonPrivate):
        raise NoGuarantee(f"provenance: {recipe} with NonPrivate(): {_R4}")
    if recipe == "knowledge_perturbation":
        if not isinstance(given, DisjointShards):
            raise NoGuarantee(
                f"provenance: {recipe} with {type(given).__name__}: its noise is scaled to one "
                "teacher of disjoint parts that changes. A public or DP-trained teacher needs no "
                "such noise: use dp_teacher"
            )
    elif isinstance(given, DisjointShards):
        raise NoGuarantee(
            f"provenance: {recipe} with {given}: the parts keep records apart from each other's "
            "teachers, but each teacher is without noise. Use knowledge_perturbation, which adds "
            "noise to their sum"
        )


def dp_teacher(
    student: nn.Module,
    teacher: nn.Module,
    provenance: object,
    public_queries: Tensor,
    *,
    ledger: Ledger,
    temperature: float = 1.0,
    training: Training | None = None,
    labels: Labels | None = None,
    hints: Sequence[Hint] = (),
    teacher_key: str | None = None,
) -> None:
    """R1: distil a public or DP-trained teacher on public queries, in place.

    The student is post-processing: it has the teacher's epsilon, whatever is done here. Layers may
    be matched first (FitNets), as the teacher's layers are private too.

    Args:
        student: a network of queries to logits [n, classes].
        teacher: of the same classes; put into evaluation mode.
        provenance: `Public()` or `DPTrained(...)`.
        public_queries: [n, ...]. They must be public: nothing counts them.
        ledger: is debited with the teacher's history, once for a teacher.
        temperature: of `kd_loss`.
        training: steps and sizes; a third of the steps is for the hints, if any.
        labels: public labels to learn beside.
        hints: layers to match first; see `Distiller`.
        teacher_key: under which `ledger` was debited when this teacher was trained, if it was.

    Raises:
        NoGuarantee: the provenance is another one; the message has the remedy.
        BudgetExceeded: the teacher's history does not fit into the ledger's budget.
    """
    refuse("dp_teacher", provenance)
    training = training or Training()
    _debit(teacher, provenance, ledger, teacher_key)
    if hints:
        distiller = Distiller(student, teacher, hints=hints)
        stage = replace(training, steps=max(training.steps // 3, 1))
        fit(
            distiller, len(public_queries),
            lambda rows: distiller(public_queries[rows]).losses.total, stage,
        )  # fmt: skip
        training = replace(training, steps=max(training.steps - stage.steps, 1))
    says = _outputs(teacher, public_queries)
    distil(student, public_queries, says, temperature, labels, training)


def dp_student(
    student: nn.Module,
    teacher: nn.Module,
    provenance: object,
    private_inputs: Tensor,
    settings: DPSGD,
    *,
    dataset_id: str,
    ledger: Ledger,
    temperature: float = 1.0,
    key: str = "",
    teacher_key: str | None = None,
    replay: bool = False,
) -> DPTrained:
    """R2: train the student by DP-SGD on private inputs, towards a teacher that is private itself.

    Record i's target is what the teacher says of record i: a function of that record and of a
    public or differentially private teacher. On disjoint data sets (`Ledger(disjoint=True)`)
    epsilon is the larger of teacher's and student's; on one data set they compose.

    Args:
        student: trained in place; see `training.dp_train`.
        teacher: in evaluation mode, as in training it would mix records.
        provenance: `Public()` or `DPTrained(...)`.
        private_inputs: [N, ...].
        settings: all numbers of DP-SGD.
        dataset_id: names these records.
        ledger: is debited with the teacher's history and with this training.
        temperature: T of the soft targets and of the student, times T^2, as in `kd_loss`.
        key: names this release in the ledger's journal.
        teacher_key: as for `dp_teacher`.
        replay: as for `training.dp_train`.

    Returns:
        The student's provenance: the history of this training; its teacher's is inherited.

    Raises:
        NoGuarantee, BudgetExceeded: as for `dp_teacher`.
        ValueError: the teacher mixes the records of a batch even in evaluation mode.
    """
    refuse("dp_student", provenance)
    _refuse_batch_statistics(teacher)
    _debit(teacher, provenance, ledger, teacher_key)
    targets = (_outputs(teacher, private_inputs) / temperature).softmax(1)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return -(temperature**2) * (target * F.log_softmax(output / temperature, 0)).sum()

    made = dp_train(
        student, private_inputs, targets, loss, settings,
        dataset_id=dataset_id, ledger=ledger, key=key, replay=replay,
    )  # fmt: skip
    if not isinstance(provenance, DPTrained):
        return made
    return replace(made, inherited=(*provenance.inherited, *provenance.history))


def knowledge_perturbation(
    student: nn.Module,
    committee: Committee,
    provenance: object,
    answers: Answers,
    *,
    queries: int,
    strategy: str = "random",
    rounds: int = 1,
    seed: int = 0,
    labels: Labels | None = None,
    training: Training | None = None,
) -> Tensor:
    """R3: distil teachers on disjoint parts through noisy answers to public queries, in place.

    Wang et al. 2019 (RONA), with the noise on what the teachers say instead of on the value of the
    loss. Each round: choose queries by the student's outputs, release their answers, train the
    student from its start on all answers so far and on the public labels, then on the public
    labels alone with a tenth of the steps and a hundredth of the rate ("self-learning").

    Args:
        student: a network of queries to logits.
        committee: the teachers.
        provenance: `DisjointShards(k)`.
        answers: of the same committee; releases, debits and keeps. It holds the pool of queries.
        queries: in all, spread over the rounds.
        strategy: see `selection.select`.
        rounds: with "random" one is enough.
        seed: of the choice.
        labels: public labels; their rows are not queried.
        training: steps and sizes of each round.

    Returns:
        int64 [queries], the rows that were asked, in order.

    Raises:
        NoGuarantee, BudgetExceeded: as for `dp_teacher`.
    """
    refuse("knowledge_perturbation", provenance)
    if answers.committee is not committee or answers.provenance != provenance:
        raise ValueError("answers: expected those of this committee and this provenance")
    queries, rounds = count("queries", queries), count("rounds", rounds)
    if rounds > queries:
        raise ValueError(f"rounds: expected at most one per query ({queries}), got {rounds}")
    training = training or Training()
    gentle = replace(
        training,
        steps=max(training.steps // 10, 1),
        learning_rate=training.learning_rate * SELF_LEARNING,
    )
    start = {name: value.clone() for name, value in student.state_dict().items()}
    pool = answers.queries
    asked = torch.empty(0, dtype=torch.int64)
    known = asked if labels is None else labels.rows
    if labels is not None and strategy != "random":  # else the first choice would be blind
        learn(student, pool, labels, training)
    for number in range(rounds):
        size = queries * (number + 1) // rounds - len(asked)
        chosen = selection.select(
            strategy,
            _outputs(student, pool),
            size,
            seed=seed + number,
            exclude=torch.cat([known, asked]),
        )
        asked = torch.cat([asked, chosen])
        student.load_state_dict(start)
        says = target_logits(answers.ask(asked), committee.k, answers.noise_std)
        share = trust(committee.k, answers.noise_std) if labels is not None else 1.0
        distil(student, pool[asked], says, 1.0, _within(labels, pool), training, share)
        if labels is not None:
            learn(student, pool, labels, gentle)
    return asked


def gradient_perturbation(
    student: nn.Module,
    committee: Committee,
    provenance: object,
    public_queries: Tensor,
    *,
    max_norm: float,
    noise_multiplier: float,
    ledger: Ledger,
    training: Training | None = None,
    labels: Labels | None = None,
    label_inputs: Tensor | None = None,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> None:
    """R3 with RONA's own object, the gradient of the loss: an ablation.

    Each step releases sum_k clip(dL(z_s, z_k)/dz_s, max_norm) plus noise for all query rows, and
    back-propagates that. Every visit of a query costs, and no answer serves another student.

    Args:
        student: as in `knowledge_perturbation`, like the next two.
        committee: the teachers.
        provenance: `DisjointShards(k)`.
        public_queries: [n, ...], all of them in each step.
        max_norm: bound on the gradient of one query by one teacher.
        noise_multiplier: standard deviation of the noise over `max_norm`.
        ledger: is debited with all steps before the first.
        training: its steps are the visits.
        labels: public labels, rows of `label_inputs`.
        label_inputs: their inputs.
        temperature: of the teachers' softmax.
        generator: of the noise; None is the secure one.
    """
    refuse("knowledge_perturbation", provenance)
    training = training or Training()
    assert isinstance(provenance, DisjointShards)
    if (labels is None) != (label_inputs is None):
        raise ValueError("labels, label_inputs: expected both or neither")
    if committee.k != provenance.k:
        raise ValueError(f"provenance: expected DisjointShards({committee.k}), got {provenance}")
    ledger.spend(
        Mechanism(
            "gradient release", provenance.dataset_id, 2 * max_norm, noise_multiplier * max_norm,
            None, len(public_queries), training.steps,
        )
    )  # fmt: skip
    teachers = (committee.logits(public_queries) / temperature).softmax(2)

    def loss(_: Tensor) -> Tensor:
        logits = student(public_queries)
        gradients = logits.detach().softmax(1) - teachers
        released = noisy_gradient_sum(gradients, max_norm, noise_multiplier, generator=generator)
        mean = released.to(logits.dtype) / (committee.k * len(public_queries))
        value = (logits * mean).sum()  # its gradient is the release
        if labels is not None and label_inputs is not None:
            seen = student(label_inputs[labels.rows])
            value = value + HARD_WEIGHT * F.cross_entropy(seen, labels.classes)
        return value

    fit(student, len(public_queries), loss, replace(training, batch_size=len(public_queries)))


def _debit(teacher: nn.Module, provenance: object, ledger: Ledger, key: str | None) -> None:
    if isinstance(provenance, DPTrained):  # its parameters are released already
        ledger.include(provenance, key=key or f"teacher {fingerprint(teacher)}")


def _refuse_batch_statistics(teacher: nn.Module) -> None:
    """Without running statistics it normalises by the batch in evaluation mode as well."""
    for name, module in teacher.named_modules():
        mixes = isinstance(module, nn.modules.batchnorm._NormBase) and not isinstance(
            module, nn.modules.instancenorm._InstanceNorm
        )
        if mixes and module.running_mean is None:
            raise ValueError(
                f"teacher: {name} is {type(module).__name__} without running statistics: what it "
                "says of a record depends on the other records of the batch, which DP-SGD on the "
                "student does not bound"
            )


def _outputs(model: nn.Module, inputs: Tensor, batch: int = 4096) -> Tensor:
    """Logits in evaluation mode, without gradient; the mode is kept."""
    was = model.training
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(part) for part in inputs.split(batch)])
    model.train(was)
    return found


def _within(labels: Labels | None, pool: Tensor) -> tuple[Tensor, Tensor] | None:
    return None if labels is None else (pool[labels.rows], labels.classes)


def learn(student: nn.Module, pool: Tensor, labels: Labels, training: Training) -> None:
    """Cross-entropy on the public labels."""
    inputs, classes = pool[labels.rows], labels.classes
    fit(
        student, len(inputs), lambda rows: F.cross_entropy(student(inputs[rows]), classes[rows]),
        training,
    )  # fmt: skip


def distil(
    student: nn.Module,
    inputs: Tensor,
    says: Tensor,
    temperature: float,
    labels: Labels | tuple[Tensor, Tensor] | None,
    training: Training,
    weight: float = 1.0,
) -> None:
    """Distil logits `says` on `inputs` with a weight, the public labels beside."""
    if isinstance(labels, Labels):
        labels = (inputs[labels.rows], labels.classes)

    def loss(rows: Tensor) -> Tensor:
        value = kd_loss(
            student(inputs[rows]), says[rows], temperature=temperature, soft_weight=weight
        )
        assert isinstance(value, Tensor)  # its parts were not asked for
        if labels is not None:
            value = value + HARD_WEIGHT * F.cross_entropy(student(labels[0]), labels[1])
        return value

    fit(student, len(inputs), loss, training)
