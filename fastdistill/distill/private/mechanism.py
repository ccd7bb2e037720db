"""One Gaussian mechanism: what was released, how far a record moves it, how much noise it got."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fastdistill import _validate

ADJACENCIES = ("add_remove", "replace", "zero_out")
"""What a neighbouring data set is: one record more or fewer; one record exchanged for any other of
the same id; or one record whose contribution is zero, the number of records being public
(dp_accounting's REPLACE_SPECIAL)."""


@dataclass(frozen=True)
class Mechanism:
    """Gaussian noise on sums over the records of one data set, `steps` times `releases` of them.

    From these values alone anyone can compute epsilon again. All are of the sum, before any
    division.

    Attributes:
        name: for people, such as "aggregate release".
        dataset_id: names the private data set. Mechanisms on one data set compose.
        sensitivity: L2, of one release, under the adjacency of the ledger.
        noise_std: standard deviation of the noise on each coordinate, > 0.
        sampling_rate: probability by which a step includes a record, each independently (Poisson);
            None: nothing is sampled.
        releases: of one step, all on the same sample: the rows of queries, say.
        steps: each with a sample and noise of its own.
    """

    name: str
    dataset_id: str
    sensitivity: float
    noise_std: float
    sampling_rate: float | None = None
    releases: int = 1
    steps: int = 1

    def __post_init__(self) -> None:
        for name in ("name", "dataset_id"):
            named(name, getattr(self, name))
        for name in ("sensitivity", "noise_std"):
            object.__setattr__(self, name, _validate.positive(name, getattr(self, name)))
        for name in ("releases", "steps"):
            count(name, getattr(self, name))
        if self.sampling_rate is not None:
            rate = _validate.number("sampling_rate", self.sampling_rate)
            if not 0 < rate < 1:
                raise ValueError(
                    "sampling_rate: expected a number in (0, 1), or None where nothing is "
                    f"sampled, got {rate}"
                )
            object.__setattr__(self, "sampling_rate", rate)

    @property
    def multiplier(self) -> float:
        """Standard deviation of the noise over the sensitivity of all releases of one step."""
        return self.noise_std / (self.sensitivity * math.sqrt(self.releases))

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Mechanism:
        """The inverse of `to_json`.

        Raises:
            TypeError, ValueError: `values` is something else.
        """
        return cls(**{field.name: values[field.name] for field in fields(cls)})


def named(name: str, value: object) -> str:
    """A text that is not blank."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a str, got {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{name}: expected a text that is not blank, got {value!r}")
    return value


def count(name: str, value: object) -> int:
    """An int >= 1."""
    number = _validate.integer(name, value)
    if number < 1:
        raise ValueError(f"{name}: expected an int >= 1, got {number}")
    return number


def delta_of(value: object) -> float:
    """A delta: in (0, 1)."""
    number = _validate.number("delta", value)
    if not 0 < number < 1:
        raise ValueError(f"delta: expected a number in (0, 1), got {number}")
    return number


def adjacency_of(value: object) -> str:
    """One of `ADJACENCIES`."""
    return _validate.choice("adjacency", value, ADJACENCIES)
