"""What a teacher was made from: it decides whether any epsilon may be claimed of its students."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fastdistill.distill.private.mechanism import (
    Mechanism,
    adjacency_of,
    count,
    delta_of,
    named,
)


class NoGuarantee(ValueError):
    """The combination has no privacy guarantee; the message says why and what to do instead."""


@dataclass(frozen=True)
class Public:
    """Made from public data alone: its students inherit nothing private."""


@dataclass(frozen=True)
class NonPrivate:
    """Trained on private records without noise: any function of it may give them away."""


@dataclass(frozen=True)
class DPTrained:
    """Trained by differentially private mechanisms.

    (epsilon, delta) alone would allow only basic composition: the history is what composes.

    Attributes:
        history: every mechanism that the training, and its tuning, applied to the private data.
        dataset_id: of that data set; each mechanism's.
        adjacency: under which the sensitivities of the history hold.
        delta: at which its trainer stated epsilon. A ledger has one delta for all stages and
            computes epsilon again.
        inherited: the mechanisms of the teachers that it was distilled from, on whatever data set:
            it tells of their records, too.
    """

    history: tuple[Mechanism, ...]
    dataset_id: str
    adjacency: str
    delta: float
    inherited: tuple[Mechanism, ...] = ()

    def __post_init__(self) -> None:
        history = tuple(self.history)
        if not history:
            raise ValueError("history: expected at least one mechanism; a public teacher is Public")
        for i, m in enumerate(history):
            if not isinstance(m, Mechanism):
                raise TypeError(f"history[{i}]: expected a Mechanism, got {type(m).__name__}")
        named("dataset_id", self.dataset_id)
        adjacency_of(self.adjacency)
        delta_of(self.delta)
        for i, m in enumerate(history):
            if m.dataset_id != self.dataset_id:
                raise ValueError(
                    f"history[{i}]: expected dataset_id {self.dataset_id!r}, got {m.dataset_id!r}"
                )
            check_sampling(m, self.adjacency)
        for i, m in enumerate(self.inherited):
            if not isinstance(m, Mechanism):
                raise TypeError(f"inherited[{i}]: expected a Mechanism, got {type(m).__name__}")
            check_sampling(m, self.adjacency)
        object.__setattr__(self, "history", history)
        object.__setattr__(self, "inherited", tuple(self.inherited))

    @classmethod
    def from_opacus(
        cls,
        history: Iterable[tuple[float, float, int]],
        *,
        max_grad_norm: float,
        dataset_id: str,
        adjacency: str,
        delta: float,
    ) -> DPTrained:
        """From `privacy_engine.accountant.history`: (noise multiplier, sample rate, steps) each.

        Args:
            history: as Opacus keeps it.
            max_grad_norm: the clip norm; the noise's standard deviation is the multiplier times it.
            dataset_id: as in the class, like the next two.
            adjacency: "add_remove" only if the sample rate, the steps and the expected batch size
                did not come from the number of records, as Opacus's engine has them; with that
                engine's own values the number is public: "zero_out".
            delta: at which epsilon was stated.
        """
        # Exchanged, a record takes one clipped gradient away and brings another.
        sensitivity = 2 * max_grad_norm if adjacency == "replace" else max_grad_norm
        steps = tuple(
            Mechanism(
                "DP-SGD", dataset_id, sensitivity, multiplier * max_grad_norm,
                None if rate == 1 else rate, 1, int(number),
            )
            for multiplier, rate, number in history
        )  # fmt: skip
        return cls(steps, dataset_id, adjacency, delta)


@dataclass(frozen=True)
class DisjointShards:
    """k teachers without noise, each trained on its own part of the records and on nothing else.

    Each record goes to its part by a public function of its own id (`shards.assign`): adding,
    removing or replacing a record then changes one teacher. Nothing that is computed from private
    records is shared: no normalisation, no stratification, no early stopping, no tuning.

    Attributes:
        k: number of teachers, >= 1.
        dataset_id: of the data set that the parts make up.
    """

    k: int
    dataset_id: str = "private"

    def __post_init__(self) -> None:
        count("k", self.k)
        named("dataset_id", self.dataset_id)


Provenance = Public | NonPrivate | DPTrained | DisjointShards


def check_sampling(mechanism: Mechanism, adjacency: str) -> None:
    """Refuse amplification by sampling where the accountants do not cover it.

    Raises:
        ValueError: a sampled mechanism under "replace".
    """
    if adjacency == "replace" and mechanism.sampling_rate is not None:
        raise ValueError(
            f"adjacency: {mechanism.name} samples at rate {mechanism.sampling_rate:g}; the "
            "accountants' amplification by Poisson sampling holds under add_remove and zero_out, "
            "not under replace"
        )


def check(value: Any) -> Provenance:
    """One of the four.

    Raises:
        TypeError: something else, also a class instead of its instance.
    """
    if not isinstance(value, (Public, NonPrivate, DPTrained, DisjointShards)):
        got = value.__name__ + " (the class)" if isinstance(value, type) else type(value).__name__
        raise TypeError(
            "provenance: expected Public(), DPTrained(...), DisjointShards(k) or NonPrivate(), "
            f"got {got}"
        )
    return value
