"""A tensor's rows in blocks, and the three products of a block with the regressor's weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdistill import _layout, _native, _torch_private

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


def _split(x: Tensor) -> int | None:
    """The row dimension of [..., D] before and after which views can merge the others; 0 where
    they can merge all; None where there is none.
    """
    last = x.ndim - 1
    places = (0, 1, last - 1) if last > 1 else (0,)
    return next((i for i in places if _merge_around(x, i)), None)


def _merge_around(x: Tensor, split: int) -> bool:
    return _layout.merges(x, 0, split) and _layout.merges(x, split, x.ndim - 1)


def like_rows(x: Tensor) -> Tensor:
    """An uninitialised tensor for the gradient of [..., D]: in its layout, as far as the rows can
    be taken apart as `Rows` does it with x; else contiguous.
    """
    made = torch.empty_like(x)
    split = _split(x)
    if _merge_around(made, 0 if split is None else split):
        return made
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


class Rows:
    """The rows of [..., D], as a view [outer, inner, D], or as a copy where none fits."""

    def __init__(self, x: Tensor) -> None:
        last = x.ndim - 1  # the features
        split = _split(x)
        if split is None:
            x, split = x.contiguous(), 0
        outer = x.shape[:split].numel()
        self.nested = x.reshape(outer, x.shape[split:last].numel(), x.shape[last])
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
        self.residual_apart = False
        """R is narrower than P, and may not lie over it with gaps between its rows."""

    def operand(self, x: Tensor) -> Tensor:
        """A block of the student's features [n, D_s] as the products want it."""
        return x

    def project(self, x: Tensor, out: Tensor) -> None:
        """Out = x W'."""
        torch.mm(x, self.weight.t(), out=out)

    def student_gradient(self, residual: Tensor, out: Tensor, alpha: float | Tensor) -> None:
        """Out = alpha R W, rounded once. A tensor alpha is a scalar on the device."""
        if isinstance(alpha, Tensor):
            torch.mul(self.wide_product(residual), alpha, out=out)
            return
        direct = out.is_contiguous() and out.dtype is self.residual
        product = out if direct else torch.empty(out.shape, dtype=self.residual, device=out.device)
        if alpha == 1.0:
            torch.mm(residual, self.weight, out=product)
        else:
            torch.addmm(product, residual, self.weight, beta=0, alpha=alpha, out=product)
        if not direct:
            out.copy_(product)

    def wide_product(self, residual: Tensor) -> Tensor:
        """R W in the type of the arithmetic."""
        return torch.mm(residual.to(self.dtype), self.weight.to(self.dtype))

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


def _with_dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _pitch(x: Tensor) -> int:
    """From row to row. That of a single row may say anything, which oneMKL would refuse."""
    return x.stride(0) if len(x) > 1 else x.shape[1]


class Bf16Products(Products):
    """bfloat16 operands, float32 sums, by csrc/cpu/bf16.h; W's sizes are even."""

    def __init__(self, weight: Tensor, module: Any) -> None:
        super().__init__(_with_dense_rows(weight), torch.float32)
        self.residual = torch.bfloat16
        self.module = module
        self.threads = torch.get_num_threads()
        self.packed: Tensor | None = None

    def operand(self, x: Tensor) -> Tensor:
        """Converted where it has to be."""
        return _with_dense_rows(x)

    def _multiply(self, a: Tensor, transposed: bool, out: Tensor, alpha: float) -> None:
        self.module.bf16_product(
            a.data_ptr(), _pitch(a), self.weight.data_ptr(), _pitch(self.weight), transposed,
            out.data_ptr(), _pitch(out), out.dtype is torch.bfloat16, *out.shape, a.shape[1],
            alpha, self.threads,
        )  # fmt: skip

    def project(self, x: Tensor, out: Tensor) -> None:
        """Out = x W', float32 sums."""
        self._multiply(x, True, out, 1.0)

    def student_gradient(self, residual: Tensor, out: Tensor, alpha: float | Tensor) -> None:
        """Out = alpha R W, rounded once."""
        self._multiply(residual, False, out, float(alpha))

    def add_weight_gradient(self, total: Tensor, residual: Tensor, x: Tensor) -> None:
        """Total += R' x, float32 sums."""
        words = self.module.bf16_packed_words(*x.shape)
        if self.packed is None or len(self.packed) < words:
            self.packed = torch.empty(words, dtype=torch.int32)
        self.module.bf16_add_product(
            residual.data_ptr(), _pitch(residual), x.data_ptr(), _pitch(x),
            self.packed.data_ptr(), total.data_ptr(), _pitch(total), *total.shape, len(x),
            self.threads,
        )  # fmt: skip


class MklProducts(Products):
    """bfloat16 operands, float32 sums, on the CPU's bfloat16 units where it has them.

    dF is torch's product: it is wanted in bfloat16, to which torch rounds its float32 sums once.
    """

    _ROW_MAJOR, _AS_IT_IS, _TRANSPOSED = 101, 111, 112

    def __init__(self, weight: Tensor, function: Any) -> None:
        super().__init__(weight.contiguous(), torch.float32)
        self.residual = torch.bfloat16
        self.residual_apart = True  # dF is oneDNN's, which reads into the gaps
        self.function = function

    def operand(self, x: Tensor) -> Tensor:
        """Converted where it has to be."""
        return _with_dense_rows(x)

    def project(self, x: Tensor, out: Tensor) -> None:
        """Out = x W', float32 sums."""
        self.function(
            self._ROW_MAJOR, self._AS_IT_IS, self._TRANSPOSED, *out.shape, x.shape[1], 1.0,
            x.data_ptr(), _pitch(x), self.weight.data_ptr(), _pitch(self.weight), 0.0,
            out.data_ptr(), _pitch(out),
        )  # fmt: skip

    def add_weight_gradient(self, total: Tensor, residual: Tensor, x: Tensor) -> None:
        """Total += R' x, float32 sums."""
        self.function(
            self._ROW_MAJOR, self._TRANSPOSED, self._AS_IT_IS, *total.shape, x.shape[0], 1.0,
            residual.data_ptr(), _pitch(residual), x.data_ptr(), _pitch(x), 1.0,
            total.data_ptr(), _pitch(total),
        )  # fmt: skip


class CudaProducts(Products):
    """16-bit operands with float32 sums, as cuBLAS has them."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight, torch.float32)
        self.residual = weight.dtype

    def project(self, x: Tensor, out: Tensor) -> None:
        """Out = x W', float32 sums."""
        torch.mm(x, self.weight.t(), out_dtype=torch.float32, out=out)

    def wide_product(self, residual: Tensor) -> Tensor:
        """R W, float32 sums."""
        return torch.mm(residual, self.weight, out_dtype=torch.float32)

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
        module, function = _native.cpu().module, _torch_private.gemm_bf16bf16f32()
        own = module is not None and module.has_bf16() and not any(x % 2 for x in weight.shape)
        if module is not None and own and not (function and module.has_bf16_tiles()):
            return Bf16Products(weight, module)
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
