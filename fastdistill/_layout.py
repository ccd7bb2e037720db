"""How kernels find the rows of a strided [..., V] tensor: two row strides, classes dense."""

from __future__ import annotations

from torch import Tensor


def inner_rows(x: Tensor) -> int:
    """The length of the innermost row dimension of [..., V]: row r is (r // inner, r % inner)."""
    return x.shape[-2] if x.ndim > 1 else 1


def strided_rows(x: Tensor) -> tuple[Tensor, int, int]:
    """(x, outer stride, inner stride) in elements, such that row r of [..., V] begins at element
    (r // inner) * outer + (r % inner) * inner stride. Copies only where no two strides can say it,
    or where the classes are not dense.
    """
    shape, strides = x.shape, x.stride()
    dense = shape[-1] == 1 or strides[-1] == 1
    for i in range(len(shape) - 3):
        dense = dense and strides[i] == strides[i + 1] * shape[i + 1]
    if not dense:
        x = x.contiguous()
        strides = x.stride()
    ndim = len(shape)
    return x, strides[-3] if ndim > 2 else 0, strides[-2] if ndim > 1 else 0
