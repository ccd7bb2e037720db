"""A tensor's rows in blocks, and the three products of a block with the regressor's weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdistill import _torch_private

_ROUND = 32


def block_rows(rows: int, features: int, residual_apart: bool) -> int:
    """Rows of a block of the projection: an 8th of it, as far as that is 0.5 to 4 MB of float32.

    The block stays in cache between the product that makes it and those that use it. Half of that
    where the residual has memory of its own beside it (`residual_apart`).
    """
    part = 2 if residual_apart else 1
    elements = min(max(rows * features // (8 * part), 1 << 17), (1 << 20) // part)
    count = -(-elements // features)
    return -(-count // _ROUND) * _ROUND


def _merges(x: Tensor, first: int, last: int) -> bool:
    """Whether dimensions first to last of x are one dimension of a view."""
    shape, strides = x.shape, x.stride()
    return all(strides[i] == strides[i + 1] * shape[i + 1] for i in range(first, last))


class Rows:
    """The rows of [..., D], as a view [outer, inner, D], or as a copy where none fits."""

    def __init__(self, x: Tensor) -> None:
        if x.ndim < 3:
            self.nested = x.reshape(1, -1, x.shape[-1])
        else:
            last = x.ndim - 2
            if not (_merges(x, 1, last) or _merges(x, 0, last - 1)):
                x = x.contiguous()
            if _merges(x, 0, last):
                self.nested = x.flatten(0, last).unsqueeze(0)
            elif _merges(x, 1, last):
                self.nested = x.flatten(1, last)
            else:
                self.nested = x.flatten(0, last - 1)
        self.outer, self.inner, self.width = self.nested.shape

    def like(self, x: Tensor) -> Tensor:
        """A tensor of the same rows that may have other strides, nested as these are."""
        return x.view(self.outer, self.inner, x.shape[-1])

    def blocks(self, rows: int) -> Iterator[tuple[int, tuple[slice, slice]]]:
        """(first row, index into the nested view) of blocks of about `rows` rows."""
        if self.inner == 0:
            return
        whole = max(rows // self.inner, 1)  # outer indices of a block
        for i in range(0, self.outer, whole):
            for j in range(0, self.inner, rows if whole == 1 else self.inner):
                yield i * self.inner + j, (slice(i, i + whole), slice(j, j + rows))


class Products:
    """P = F W', dF = R W and dW += R' F for a block, summed in the type of the arithmetic."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight = weight
        self.dtype = dtype
        self.residual = dtype
        """The type in which R enters the products."""

    def operand(self, x: Tensor) -> Tensor:
        """A block of the student's features [n, D_s] as the products want it."""
        return x

    def project(self, x: Tensor, out: Tensor) -> None:
        """Out = x W'."""
        torch.mm(x, self.weight.t(), out=out)

    def student_gradient(self, residual: Tensor, out: Tensor, alpha: float) -> None:
        """Out = alpha R W, rounded once."""
        direct = out.is_contiguous() and out.dtype is self.residual
        product = out if direct else torch.empty(out.shape, dtype=self.residual, device=out.device)
        if alpha == 1.0:
            torch.mm(residual, self.weight, out=product)
        else:
            torch.addmm(product, residual, self.weight, beta=0, alpha=alpha, out=product)
        if not direct:
            out.copy_(product)

    def add_weight_gradient(self, total: Tensor, residual: Tensor, x: Tensor) -> None:
        """Total += R' x."""
        total.addmm_(residual.t(), x)


class WidenedProducts(Products):
    """Operands that are not of the arithmetic's type become so, the weight once."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__(weight.to(dtype), dtype)

    def operand(self, x: Tensor) -> Tensor:
        """Converted where it has to be."""
        return x.to(self.dtype)


class MklProducts(Products):
    """bfloat16 operands, float32 sums, on the CPU's bfloat16 units where it has them.

    dF is torch's product: it is wanted in bfloat16, to which torch rounds its float32 sums once.
    """

    _ROW_MAJOR, _AS_IT_IS, _TRANSPOSED = 101, 111, 112

    def __init__(self, weight: Tensor, function: Any) -> None:
        super().__init__(weight.contiguous(), torch.float32)
        self.residual = torch.bfloat16
        self.function = function

    def operand(self, x: Tensor) -> Tensor:
        """Converted where it has to be."""
        return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()

    def project(self, x: Tensor, out: Tensor) -> None:
        """Out = x W', float32 sums."""
        self.function(
            self._ROW_MAJOR, self._AS_IT_IS, self._TRANSPOSED, *out.shape, x.shape[1], 1.0,
            x.data_ptr(), x.stride(0), self.weight.data_ptr(), self.weight.stride(0), 0.0,
            out.data_ptr(), out.stride(0),
        )  # fmt: skip

    def add_weight_gradient(self, total: Tensor, residual: Tensor, x: Tensor) -> None:
        """Total += R' x, float32 sums."""
        self.function(
            self._ROW_MAJOR, self._TRANSPOSED, self._AS_IT_IS, *total.shape, x.shape[0], 1.0,
            residual.data_ptr(), residual.stride(0), x.data_ptr(), x.stride(0), 1.0,
            total.data_ptr(), total.stride(0),
        )  # fmt: skip


class CudaProducts(Products):
    """16-bit operands with float32 sums, as cuBLAS has them."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight, torch.float32)
        self.residual = weight.dtype

    def project(self, x: Tensor, out: Tensor) -> None:
        """Out = x W', float32 sums."""
        torch.mm(x, self.weight.t(), out_dtype=torch.float32, out=out)

    def add_weight_gradient(self, total: Tensor, residual: Tensor, x: Tensor) -> None:
        """Total += R' x, float32 sums."""
        total += torch.mm(residual.t(), x, out_dtype=torch.float32)


def products(weight: Tensor, dtype: torch.dtype) -> Products:
    """The products of operands of the weight's type, summed in `dtype`."""
    if weight.dtype is dtype:
        return Products(weight, dtype)
    if dtype is torch.float32 and weight.is_cuda:
        return CudaProducts(weight)
    if dtype is torch.float32 and weight.dtype is torch.bfloat16:
        function = _torch_private.gemm_bf16bf16f32()
        if function is not None:
            return MklProducts(weight, function)
    return WidenedProducts(weight, dtype)


class Gradients(NamedTuple):
    """Where the gradients of a pass go; None for what needs none."""

    student: Tensor | None  # [..., D_s], any strides
    weight: Tensor | None  # [D_t, D_s]
    bias: Tensor | None  # [D_t]

    def needed(self) -> bool:
        """Whether there is any."""
        return any(x is not None for x in self)
