"""The pass of the GPU launchers: row blocks through cuBLAS and through a backend's row kernel.

Nothing synchronises: dropped rows are zeroed by select where the CPU leaves them out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastdistill import _rows
from fastdistill.hint import ops
from fastdistill.hint.blocks import Gradients, Rows, products

_BLOCK = 1 << 24
"""Elements of a block of the projection: 64 MB of float32, enough to fill a GPU."""

RowKernel = Callable[[Tensor, Tensor, Tensor | None, Tensor, "Tensor | None", Tensor], None]
"""(student or projection [n, D], teacher [n, D], bias [D], factors [n], gradient [n, D] out or
None, distances [n] out). Features are dense; the gradient may not lie over an input."""


Epilogue = Callable[
    [Tensor, Tensor, "Tensor | None", Tensor, Tensor, "Tensor | None", Tensor], None
]
"""The projection and the row kernel in one: (student [n, D_s], weight, bias, teacher [n, D_t],
factors [n], residual out or None, distances out)."""


def dense(x: Tensor) -> Tensor:
    """Rows [n, D] whose features lie one beside the other."""
    return x if x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous()


def _run(
    kernel: RowKernel,
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    factors: Tensor,
    masked: bool,
    gradients: Gradients,
    epilogue: Epilogue | None,
    alpha: float | Tensor = 1.0,
) -> Tensor:
    """The distance of each row [rows], no factor in it.

    Fills the gradients: those of rows times `factors`, times `alpha` where there is a weight.
    """
    dtype = ops.arithmetic(student, teacher)
    source, wanted = Rows(student), Rows(teacher)
    target = None if gradients.student is None else source.like(gradients.student)
    device, features = student.device, teacher.shape[-1]
    loss = torch.empty(factors.numel(), dtype=dtype, device=device)
    for x in (gradients.weight, gradients.bias):
        if x is not None:
            x.zero_()
    matrix = None if weight is None else products(weight, dtype)
    offset = None if bias is None else bias.to(dtype).contiguous()
    size = max(_BLOCK // features, 1)
    teacher_rows = wanted.nested.reshape(-1, features)
    for first, where in source.blocks(size):
        x = source.nested[where].reshape(-1, source.width)
        rows = slice(first, first + len(x))
        t, factor = dense(teacher_rows[rows]), factors[rows]
        block = None if target is None else target[where]
        made = block
        if block is not None and not block.is_contiguous():
            made = torch.empty(x.shape, dtype=block.dtype, device=device)
        flat = None if made is None else made.view(x.shape)
        if matrix is None:
            kernel(dense(x), t, None, factor, flat, loss[rows])
        else:
            if masked:
                x = torch.where((factor != 0).unsqueeze(1), x, 0.0)
            x = matrix.operand(dense(x))
            residual = None
            if gradients.needed():
                residual = torch.empty((len(x), features), dtype=matrix.residual, device=device)
            if epilogue is not None:
                epilogue(x, matrix.weight, offset, t, factor, residual, loss[rows])
            else:
                p = torch.empty((len(x), features), dtype=dtype, device=device)
                matrix.project(x, p)
                kernel(p, t, offset, factor, residual, loss[rows])
            if residual is not None:
                if gradients.weight is not None:
                    matrix.add_weight_gradient(gradients.weight, residual, x)
                if gradients.bias is not None:
                    gradients.bias.add_(residual.sum(0, dtype=dtype))
                if flat is not None:
                    matrix.student_gradient(residual, flat, alpha)
        if block is not None and made is not None and made is not block:
            block.copy_(made.view_as(block))
    if isinstance(alpha, Tensor) or alpha != 1.0:
        for x in (gradients.weight, gradients.bias):
            if x is not None:
                x.mul_(alpha)
    return loss


Kernels = Callable[[str, str, str, Tensor, Tensor], "tuple[RowKernel, Epilogue | None]"]
"""(distance, student_norm, teacher_norm, student, teacher) to the kernels of a call; None where the
projection cannot have the distance as its epilogue."""

Scale = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""(gradient, out, grad_scale, grad_output): out is the gradient times both numbers; may be it."""


class Launcher:
    """This room's ops on a GPU, by a backend's kernels; bad values in tensors give NaN rows."""

    def __init__(self, kernels: Kernels, scale: Scale) -> None:
        self.kernels, self.scale = kernels, scale

    def hint_fwd(
        self,
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
        *needs: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The op `fastdistill::hint_fwd`."""
        kernel, epilogue = self.kernels(distance, student_norm, teacher_norm, student, teacher)
        outputs = ops.allocate(student, teacher, weight, reduction, *needs)
        loss, *gradients, grad_scale = outputs
        scale = _rows.row_scale(
            student, None, mask, row_weight, normalizer, 0, reduction, divisor, loss.dtype
        ).reshape(-1)
        masked = mask is not None or row_weight is not None
        factors: Tensor = scale
        alpha: float | Tensor = 1.0
        if grad_scale.numel():
            factors, common = _common(scale, teacher.shape[-1])
            grad_scale.copy_(common)
        elif _rounds_residuals(student, teacher, weight):
            if masked or normalizer is not None:
                factors, alpha = _common(scale, teacher.shape[-1])
            elif len(scale):  # known without asking the GPU
                total = float(len(scale)) if reduction == "mean" else divisor
                alpha = 1.0 / total / teacher.shape[-1]
                factors = torch.full_like(scale, float(teacher.shape[-1]))
        distances = _run(
            kernel, student, teacher, weight, bias, factors, masked, _needed(gradients, needs),
            epilogue, alpha,
        )  # fmt: skip
        distances = torch.where(scale == 0, 0.0, distances * scale)
        loss.copy_(distances.view(student.shape[:-1]) if reduction == "none" else distances.sum())
        return outputs

    def hint_grad(
        self,
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
        *needs: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The op `fastdistill::hint_grad`."""
        kernel, epilogue = self.kernels(distance, student_norm, teacher_norm, student, teacher)
        outputs = ops.allocate_gradients(student, teacher, weight, *needs)
        dtype = ops.arithmetic(student, teacher)
        scale = _rows.row_scale(student, None, mask, row_weight, None, 0, "none", 1.0, dtype)
        factors = torch.where(scale == 0, 0.0, scale * grad_output).reshape(-1)
        common = None
        alpha: float | Tensor = 1.0
        if _rounds_residuals(student, teacher, weight):
            factors, alpha = _common(factors, teacher.shape[-1])
        elif student.dtype is torch.float16:
            factors, common = _common(factors, teacher.shape[-1])
        gradients = _needed(outputs, needs)
        _run(kernel, student, teacher, weight, bias, factors, True, gradients, epilogue, alpha)
        if common is not None:
            for x in outputs:
                x.mul_(common)
        return outputs

    def hint_bwd(
        self, grad: Tensor, grad_scale: Tensor, grad_output: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """The gradient times `grad_output` (and `grad_scale`), as a new tensor of `dtype`."""
        out = torch.empty_like(grad)
        self.scale(grad, out, grad_scale, grad_output)
        return out.to(dtype)

    def hint_bwd_(self, grad: Tensor, grad_scale: Tensor, grad_output: Tensor) -> None:
        """The same in place."""
        self.scale(grad, grad, grad_scale, grad_output)


def _needed(made: Sequence[Tensor], needs: Sequence[bool]) -> Gradients:
    return Gradients(*(x if need else None for x, need in zip(made, needs, strict=True)))


def _rounds_residuals(student: Tensor, teacher: Tensor, weight: Tensor | None) -> bool:
    """Whether residuals are bfloat16 operands of the products. Those take no common factor: rounded
    with it, all signs of an l1 distance would be off by the same 0.2 %; see native.py.
    """
    single = ops.arithmetic(student, teacher) is torch.float32
    return weight is not None and single and student.dtype is torch.bfloat16


def _common(scale: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """(factors of about the features' number, what gradients have to be multiplied by)."""
    finite = torch.where(scale.isfinite(), scale.abs(), 0.0)
    largest = finite.max() if scale.numel() else finite.sum()
    common = torch.where(largest > 0, largest, 1.0) / features
    return scale / common, common
