"""What a setting may be: one check per kind, and the base class of each job's settings.

A check takes what came from the command line or a YAML file and returns what is meant; its
ValueError says what was expected and what came.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any, ClassVar, cast

from fastdistill.distill.errors import JobError

Check = Callable[[object], object]


class Settings:
    """The settings of one job: a frozen dataclass with a check for each of its fields.

    Each has `out`, the directory of all results, `data`, and `resume`.

    Raises:
        JobError: a value has the wrong type or is out of range.
    """

    CHECKS: ClassVar[Mapping[str, Check]]

    out: str
    data: str
    resume: bool

    def __post_init__(self) -> None:
        for field in fields(cast(Any, self)):
            try:
                value = self.CHECKS[field.name](getattr(self, field.name))
            except ValueError as error:
                raise JobError(
                    "A setting cannot be used.",
                    f"{field.name}: {error}.",
                    "Correct it on the command line or in the configuration file.",
                ) from None
            object.__setattr__(self, field.name, value)

    def settings(self) -> dict[str, Any]:
        """What decides the outcome, as JSON values: all but `out` and `resume`."""
        values = {
            k: list(v) if isinstance(v, tuple) else v for k, v in asdict(cast(Any, self)).items()
        }
        del values["out"], values["resume"]
        return values


def text(value: object) -> str:
    """A text that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"expected a text, got {value!r}")
    return value


def flag(value: object) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, got {value!r}")
    return value


def integer(low: int, high: int | None = None) -> Callable[[object], int]:
    """Makes a check: a whole number from `low` to `high`."""
    span = f">= {low}" if high is None else f"from {low} to {high}"

    def check(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"expected a whole number {span}, got {value!r}")
        if value < low or (high is not None and value > high):
            raise ValueError(f"expected a whole number {span}, got {value}")
        return value

    return check


def positive(value: object) -> float:
    """A finite number > 0."""
    return _number(value, "> 0", lambda number: number > 0)


def not_negative(value: object) -> float:
    """A finite number >= 0."""
    return _number(value, ">= 0", lambda number: number >= 0)


def _number(value: object, span: str, fits: Callable[[float], bool]) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        hint = ""
        if isinstance(value, str):  # YAML reads 1e-3 as text: its numbers need a point
            try:
                hint = f"; in YAML write {float(value):.6f}".rstrip("0")
            except ValueError:
                pass
        raise ValueError(f"expected a number {span}, got {value!r}{hint}")
    number = float(value)
    if not math.isfinite(number) or not fits(number):
        raise ValueError(f"expected a number {span}, got {value!r}")
    return number


def choice(*words: str) -> Callable[[object], str]:
    """Makes a check: one of these words."""

    def check(value: object) -> str:
        if value not in words:
            near = difflib.get_close_matches(str(value), words, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"expected one of {', '.join(words)}; got {value!r}{hint}")
        return str(value)

    return check


def optional(check: Check) -> Check:
    """Makes a check: None, or what `check` accepts."""
    return lambda value: None if value is None else check(value)
