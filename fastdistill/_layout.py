"""How kernels find the rows of a strided [..., V] tensor: two row strides, classes dense.

A dimension of size 1 is never stepped along, so its stride may say anything (torch calls a tensor
contiguous whatever it is): none of the functions here looks at it.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor


def _stepped(x: Tensor, first: int, end: int) -> list[tuple[int, int]]:
    """(size, stride) of the dimensions from `first` to before `end` that are longer than 1."""
    pairs = zip(x.shape[first:end], x.stride()[first:end], strict=True)
    return [(size, stride) for size, stride in pairs if size != 1]


def _chain(steps: list[tuple[int, int]]) -> bool:
    return all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(steps))


def merges(x: Tensor, first: int, end: int) -> bool:
    """Whether the dimensions from `first` to before `end` are one dimension of a view."""
    return _chain(_stepped(x, first, end))


def inner_rows(x: Tensor) -> int:
    """The length of the innermost row dimension of [..., V] that is longer than 1: row r is
    (r // inner, r % inner).
    """
    for size in reversed(x.shape[:-1]):
        if size != 1:
            return size
    return 1


def strided_rows(x: Tensor) -> tuple[Tensor, int, int]:
    """(x, outer stride, inner stride) in elements, such that row r of [..., V] begins at element
    (r // inner) * outer + (r % inner) * inner stride. Copies only where no two strides can say it,
    or where the classes are not dense.
    """
    steps = _stepped(x, 0, x.ndim - 1)
    if not ((x.shape[-1] == 1 or x.stride(-1) == 1) and _chain(steps[:-1])):
        x = x.contiguous()
        steps = _stepped(x, 0, x.ndim - 1)
    if not steps:
        return x, 0, 0
    size, step = steps[-1]
    return x, steps[-2][1] if len(steps) > 1 else size * step, step
