"""Launchers of the CPU kernels (csrc/cpu): row blocks, pointers, strides, sizes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdistill import _layout, _native, _rows
from fastdistill.hint import ops
from fastdistill.hint.blocks import Gradients, Rows, block_rows, products

_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_DISTANCES = {"mse": 0, "l1": 1, "smooth_l1": 2, "cosine": 3}
_NORMS = {"none": 0, "layer_norm": 1, "l2": 2}


class _Factors(NamedTuple):
    """What the gradient of each row is multiplied by."""

    uniform: float
    rows: Tensor | None  # float64 [rows]; None: `uniform` for all

    def kept(self) -> Tensor | None:
        """The rows whose factor is not 0, or None for all."""
        if self.rows is None or bool((self.rows != 0).all()):
            return None
        return (self.rows != 0).nonzero().squeeze(1)


class _Kernel:
    """The row kernel of one call, for one block after the other."""

    def __init__(
        self,
        teacher: Tensor,
        bias: Tensor | None,
        factors: _Factors,
        dtype: torch.dtype,
        distance: str,
        student_norm: str,
        teacher_norm: str,
        loss: Tensor,
    ) -> None:
        module = _native.cpu().module
        assert module is not None  # the backend was chosen: it had loaded
        self.module: Any = module
        self.inner = _layout.inner_rows(teacher)
        self.teacher = teacher
        self.blocks: Rows | None = None
        if teacher.shape[-1] > 1 and teacher.stride(-1) != 1:
            self.blocks = Rows(teacher)  # channels first: a block at a time is copied
            self.strides = (0, teacher.shape[-1])
        else:
            self.teacher, *strides = _layout.strided_rows(teacher)
            self.strides = (strides[0], strides[1])
        self.bias = None if bias is None else bias.to(dtype).contiguous()
        self.factors = factors
        self.dtype = dtype
        self.settings = (_DISTANCES[distance], _NORMS[student_norm], _NORMS[teacher_norm])
        self.loss = loss
        self.threads = torch.get_num_threads()

    def __call__(
        self,
        student: Tensor,
        s_outer: int,
        s_step: int,
        s_inner: int,
        rows: int,
        first: int,
        at: Tensor | None,
        grad: Tensor | None,
        bias_grad: Tensor | None,
        teacher: Tensor | None = None,
    ) -> None:
        """Rows of the student, or of its projection, from `first` on, or those `at`.

        `teacher`: the block [rows, D_t] of the teacher where it has to be copied.
        """
        source = self.teacher if teacher is None else teacher
        self.module.hint_rows(
            student.data_ptr(),
            _TYPES[student.dtype],
            s_outer,
            s_step,
            s_inner,
            source.data_ptr(),
            _TYPES[source.dtype],
            *self.strides,
            self.inner if teacher is None else rows,
            rows,
            student.shape[-1],
            first,
            0 if at is None else at.data_ptr(),
            teacher is not None,
            self.dtype is torch.float64,
            0 if self.bias is None else self.bias.data_ptr(),
            0 if self.factors.rows is None else self.factors.rows.data_ptr(),
            self.factors.uniform,
            *self.settings,
            0 if grad is None else grad.data_ptr(),
            0 if grad is None else _TYPES[grad.dtype],
            0 if grad is None else grad.stride(0),
            0 if bias_grad is None else bias_grad.data_ptr(),
            self.loss.data_ptr(),
            self.threads,
        )


def _pick(x: Tensor, inner: int, at: Tensor) -> Tensor:
    """Rows `at` of a nested view, as [n, D]."""
    return x[at // inner, at % inner]


def _run(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    factors: _Factors,
    distance: str,
    student_norm: str,
    teacher_norm: str,
    gradients: Gradients,
    alpha: float = 1.0,
) -> Tensor:
    """The distance of each row, float64 [rows], no factor in it.

    Fills the gradients: those of rows times `factors`, times `alpha` where there is a weight.
    """
    dtype = ops.arithmetic(student, teacher)
    rows = student.shape[:-1].numel()
    loss = torch.zeros(rows, dtype=torch.float64)
    for x in (gradients.weight, gradients.bias):
        if x is not None:
            x.zero_()
    kernel = _Kernel(teacher, bias, factors, dtype, distance, student_norm, teacher_norm, loss)
    dense = student.shape[-1] == 1 or student.stride(-1) == 1
    if weight is None and dense and kernel.blocks is None:  # every row in one call
        inner = _layout.inner_rows(student)
        x, outer, step = _layout.strided_rows(student)
        target = gradients.student
        grad = None if target is None else target.contiguous()
        flat = None if grad is None else grad.view(rows, grad.shape[-1])
        kernel(x, outer, step, inner, rows, 0, None, flat, None)
        if target is not None and grad is not None and grad is not target:
            target.copy_(grad)
        return loss
    _in_blocks(student, weight, kernel, gradients, alpha)
    return loss


def _in_blocks(
    student: Tensor, weight: Tensor | None, kernel: _Kernel, gradients: Gradients, alpha: float
) -> None:
    source = Rows(student)
    inner = source.inner
    target = None if gradients.student is None else source.like(gradients.student)
    rows, features = source.outer * inner, kernel.teacher.shape[-1]
    dtype = kernel.dtype
    matrix = None if weight is None else products(weight, dtype)
    size = block_rows(rows, features, matrix is not None and matrix.residual_apart)
    space = residuals = None
    if matrix is not None:
        space = torch.empty(min(size, rows), features, dtype=dtype)
        if gradients.needed():
            if matrix.residual_apart:
                residuals = torch.empty_like(space, dtype=matrix.residual)
            else:  # over the projection, each row in its own place
                residuals = space.view(matrix.residual)[:, :features]
    slots = None
    if gradients.bias is not None:
        count = -(-size // kernel.module.hint_bias_rows)
        slots = torch.empty(count, features, dtype=dtype)

    kept = kernel.factors.kept()
    if kept is None:
        plan: Any = source.blocks(size)
    else:
        plan = ((0, at) for at in kept.split(size) if len(at))
        if target is not None:
            target.zero_()
    for first, where in plan:
        at = where if isinstance(where, Tensor) else None
        x = source.nested[where] if at is None else _pick(source.nested, inner, at)
        x = x.reshape(-1, source.width)
        count = len(x)
        t = None
        if kernel.blocks is not None:
            if at is None:
                t = _slice(kernel.blocks, first, count)
            else:
                t = _pick(kernel.blocks.nested, kernel.blocks.inner, at)
        if matrix is None or space is None:
            x = x.contiguous()
            grad = torch.empty_like(x) if target is not None else None
            kernel(x, 0, x.shape[1], count, count, first, at, grad, None, t)
        else:
            x = matrix.operand(x)
            projected = space[:count]
            matrix.project(x, projected)
            residual = None if residuals is None else residuals[:count]
            kernel(projected, 0, features, count, count, first, at, residual, slots, t)
            grad = None
            if residual is not None:
                if gradients.weight is not None:
                    matrix.add_weight_gradient(gradients.weight, residual, x)
                if slots is not None and gradients.bias is not None:
                    used = -(-count // kernel.module.hint_bias_rows)
                    gradients.bias.add_(slots[:used].sum(0))
                if target is not None:
                    block = target[where] if at is None else None
                    if block is not None and block.is_contiguous():
                        matrix.student_gradient(residual, block.view(count, -1), alpha)
                    else:
                        grad = torch.empty(count, source.width, dtype=target.dtype)
                        matrix.student_gradient(residual, grad, alpha)
        if target is not None and grad is not None:
            if at is None:
                target[where] = grad.view_as(target[where])
            else:
                target[at // inner, at % inner] = grad
    if alpha != 1.0:
        for total in (gradients.weight, gradients.bias):
            if total is not None:
                total.mul_(alpha)


def _slice(rows: Rows, first: int, count: int) -> Tensor:
    """Rows first to first + count as a dense block."""
    i, j = divmod(first, rows.inner)
    if j + count <= rows.inner:
        block = rows.nested[i, j : j + count]
    elif j == 0 and count % rows.inner == 0:
        block = rows.nested[i : i + count // rows.inner]
    else:
        at = torch.arange(first, first + count)
        block = _pick(rows.nested, rows.inner, at)
    return block.reshape(count, rows.width).contiguous()


def _needed(*gradients: Tensor, needs: tuple[bool, bool, bool]) -> Gradients:
    return Gradients(*(x if need else None for x, need in zip(gradients, needs, strict=True)))


def hint_fwd(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    row_weight: Tensor | None,
    normalizer: Tensor | None,
    distance: str,
    student_norm: str,
    teacher_norm: str,
    reduction: str,
    divisor: float,
    need_student: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op `fastdistill::hint_fwd` on the CPU; raises ValueError for bad values in tensors."""
    dtype = ops.arithmetic(student, teacher)
    _rows.check_values(None, mask, row_weight, normalizer, 0, 0, dtype)
    needs = (need_student, need_weight, need_bias)
    outputs = ops.allocate(student, teacher, weight, reduction, *needs)
    loss, *gradients, grad_scale = outputs
    scale = _scale(student, mask, row_weight, normalizer, reduction, divisor)
    factors, alpha = _residual_factors(scale, student, teacher, weight)
    if grad_scale.numel():
        factors, common = _common(scale, teacher.shape[-1])
        grad_scale.fill_(common)
    distances = _run(
        student, teacher, weight, bias, factors, distance, student_norm, teacher_norm,
        _needed(*gradients, needs=needs), alpha,
    )  # fmt: skip
    distances *= scale.uniform if scale.rows is None else scale.rows
    loss.copy_(distances.view(student.shape[:-1]) if reduction == "none" else distances.sum())
    return outputs


def hint_grad(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    row_weight: Tensor | None,
    grad_output: Tensor,
    distance: str,
    student_norm: str,
    teacher_norm: str,
    need_student: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `fastdistill::hint_grad` on the CPU: the gradients of rows times `grad_output`."""
    needs = (need_student, need_weight, need_bias)
    outputs = ops.allocate_gradients(student, teacher, weight, *needs)
    scale = _scale(student, mask, row_weight, None, "none", 1.0)
    rows = grad_output.to(torch.float64).reshape(-1)
    if scale.rows is not None:  # a dropped row stays 0, whatever comes from outside
        rows = torch.where(scale.rows == 0, 0.0, rows * scale.rows)
    factors, alpha = _residual_factors(_Factors(1.0, rows.contiguous()), student, teacher, weight)
    _run(
        student, teacher, weight, bias, factors, distance, student_norm, teacher_norm,
        _needed(*outputs, needs=needs), alpha,
    )  # fmt: skip
    return outputs


def _scale(
    student: Tensor,
    mask: Tensor | None,
    row_weight: Tensor | None,
    normalizer: Tensor | None,
    reduction: str,
    divisor: float,
) -> _Factors:
    """The factor of each row in the loss."""
    if mask is None and row_weight is None:
        rows = student.shape[:-1].numel()
        total = float(max(rows, 1)) if reduction == "mean" else divisor
        return _Factors(1.0 / (total if normalizer is None else float(normalizer)), None)
    scale = _rows.row_scale(
        student, None, mask, row_weight, normalizer, 0, reduction, divisor, torch.float64
    )
    return _Factors(1.0, scale.reshape(-1).contiguous())


def _common(scale: _Factors, features: int) -> tuple[_Factors, float]:
    """(factors of about the features' number, what they have to be multiplied by).

    So the residuals are of the features' own size: with 1 / divisor and the mean over the features
    in them, most of a float16 gradient would be flushed to 0.
    """
    if scale.rows is None:
        return _Factors(float(features), None), scale.uniform / features
    finite = torch.where(scale.rows.isfinite(), scale.rows.abs(), 0.0)
    largest = float(finite.max()) if finite.numel() else 0.0
    common = largest / features if largest > 0 else 1.0
    return _Factors(1.0, scale.rows / common), common


def _residual_factors(
    scale: _Factors, student: Tensor, teacher: Tensor, weight: Tensor | None
) -> tuple[_Factors, float]:
    """(factors in the residuals, alpha of the products).

    A bfloat16 residual takes no common factor: rounded with it, all signs of an l1 distance would
    be off by the same 0.2 %.
    """
    if weight is None or torch.float32 is not ops.arithmetic(student, teacher):
        return scale, 1.0
    if student.dtype is not torch.bfloat16:
        return scale, 1.0
    return _common(scale, teacher.shape[-1])


def hint_bwd(grad: Tensor, grad_scale: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    """Grad times `grad_output` (and `grad_scale`), rounded to `dtype`."""
    return _times(grad, _factor(grad_scale, grad_output)).to(dtype)


def hint_bwd_(grad: Tensor, grad_scale: Tensor, grad_output: Tensor) -> None:
    """The same in place; a factor of 1 touches nothing."""
    factor = _factor(grad_scale, grad_output)
    if factor != 1.0:
        _times(grad, factor, out=grad)


def _factor(grad_scale: Tensor, grad_output: Tensor) -> float:
    return float(grad_output) * (float(grad_scale) if grad_scale.numel() else 1.0)


def _times(grad: Tensor, factor: float, out: Tensor | None = None) -> Tensor:
    if math.isfinite(factor):
        return torch.mul(grad, factor, out=out)
    # A gradient of 0 stays: a dropped row has none, whatever comes from outside.
    return torch.where(grad == 0, grad, grad * factor, out=out)
