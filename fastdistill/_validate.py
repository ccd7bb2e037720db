"""The checks that every public function needs, each with its sentence.

Each names the argument, what was expected and what came. They read shapes, types and Python
numbers only, never the values of a tensor: those are checked where that costs no synchronisation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real

import torch

_INFINITY = float("inf")
SMALLEST, LARGEST = 1e-36, 1e36
"""Of numbers that multiply, divide or are divided by in float32: beyond, some backends would give
infinite or NaN results where others do not.
"""
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(name: str, value: object) -> torch.Tensor:
    """A dense torch.Tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.is_nested:  # which has no shape
        raise TypeError(f"{name}: expected a dense (strided) tensor, got a nested tensor")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}")
    return value


def floating(name: str, value: object) -> torch.Tensor:
    """A dense tensor of float32, bfloat16, float16 or float64."""
    x = tensor(name, value)
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{name}: expected dtype float32, bfloat16, float16 or float64, got {x.dtype}"
        )
    return x


def same_device(name: str, value: torch.Tensor, device: torch.device, like: str) -> None:
    """`value` lives where `like` lives."""
    if value.device != device:
        raise ValueError(f"{name}: expected device {device} (that of {like}), got {value.device}")


def same_shape(name: str, value: torch.Tensor, shape: Sequence[int], like: str) -> None:
    """`value` has exactly this shape: nothing is broadcast."""
    if value.shape != torch.Size(shape):
        raise ValueError(
            f"{name}: expected shape {list(shape)} ({like}), got {list(value.shape)}; "
            "nothing is broadcast"
        )


def number(name: str, value: object) -> float:
    """A finite Python number."""
    if type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        value = float(value)
    if not -_INFINITY < value < _INFINITY:  # torch.compile can trace this, not math.isfinite
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return value


def positive(name: str, value: object) -> float:
    """A finite Python number > 0."""
    x = number(name, value)
    if x <= 0:
        raise ValueError(f"{name}: expected a number > 0, got {x}")
    return x


def factor(name: str, value: object) -> float:
    """A Python number that multiplies or divides in float32: 0, or of a size well inside it."""
    x = number(name, value)
    if x != 0 and not SMALLEST <= abs(x) <= LARGEST:
        raise ValueError(f"{name}: expected 0 or a size from {SMALLEST} to {LARGEST}, got {x}")
    return x


def temperature(value: object, squared: bool = False) -> float:
    """A Python number > 0 by which float32 can divide, or that it can hold `squared`."""
    x = positive("temperature", value)
    low, high = (SMALLEST**0.5, LARGEST**0.5) if squared else (SMALLEST, LARGEST)
    if not low <= x <= high:
        why = " (it is squared: scale_t2)" if squared else ""
        raise ValueError(f"temperature: expected a number from {low:g} to {high:g}{why}, got {x}")
    return x


def fraction(name: str, value: object) -> float:
    """A Python number in [0, 1]."""
    x = number(name, value)
    if not 0 <= x <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {x}")
    return x


def integer(name: str, value: object) -> int:
    """A Python int (not a bool)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    return value


def boolean(name: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    return value


def choice(name: str, value: object, allowed: Iterable[str]) -> str:
    """One of a few words."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a str, got {type(value).__name__}")
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}; got {value!r}")
    return value


def axis(name: str, value: object, ndim: int) -> int:
    """A dimension of a tensor with `ndim` dimensions, made non-negative."""
    dim = integer(name, value)
    if not -ndim <= dim < ndim:
        raise ValueError(f"{name}: expected a value in [{-ndim}, {ndim - 1}], got {dim}")
    return dim % ndim


def per_row(
    name: str, value: object, rows: torch.Size, device: torch.device, rows_of: str
) -> torch.Tensor:
    """A tensor with one value per row; `rows_of` says what has those rows."""
    x = tensor(name, value)
    if x.shape != rows:
        same_shape(name, x, rows, f"that of {rows_of}")
    if x.device != device:
        same_device(name, x, device, rows_of.split()[0])
    return x


def mask(value: object, rows: torch.Size, device: torch.device, rows_of: str) -> None:
    """A boolean per row; True keeps it."""
    x = per_row("mask", value, rows, device, rows_of)
    if x.dtype is not torch.bool:
        raise TypeError(f"mask: expected dtype torch.bool (True keeps), got {x.dtype}")


def row_weight(value: object, rows: torch.Size, device: torch.device, rows_of: str) -> None:
    """A floating weight per row. Its values are looked at where they are read."""
    floating("row_weight", per_row("row_weight", value, rows, device, rows_of))


def normalizer(value: object, reduction: str) -> tuple[float, torch.Tensor | None]:
    """What replaces the divisor of "mean": a number > 0, or (1, a scalar tensor)."""
    if reduction != "mean":
        raise ValueError(
            f'normalizer: expected reduction="mean" with it, got reduction={reduction!r}'
        )
    if not isinstance(value, torch.Tensor):
        return factor("normalizer", positive("normalizer", value)), None
    if value.ndim != 0 or value.dtype.is_complex or value.dtype is torch.bool:
        raise TypeError(
            "normalizer: expected a number or a scalar tensor, got shape "
            f"{list(value.shape)}, dtype {value.dtype}"
        )
    return 1.0, value
