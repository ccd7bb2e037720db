"""Launchers of the CUDA C++ kernels (csrc/cuda): pointers, strides and the stream."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill import _layout, _rows
from fastdistill._native import launch_cuda as _launch
from fastdistill.kd import ops, rows

_TYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
_DIVERGENCES = {"forward_kl": 1, "reverse_kl": 2, "cross_entropy": 3}
_NO_DIVERGENCE = 0


def supports(student: object, teacher: object) -> bool:
    """Whether the kernels take this pair of element types.

    Equal ones, or a 16-bit type on one side and float32 on the other.
    """
    pair = {student, teacher}
    return pair <= _TYPES.keys() and (len(pair) == 1 or torch.float32 in pair)


def _pointer(x: Tensor | None) -> int:
    """The address of a tensor's first element; 0 for none, and for a tensor without elements."""
    return 0 if x is None else x.data_ptr()


def kd_fwd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    row_weight: Tensor | None,
    normalizer: Tensor | None,
    temperature: float,
    hard_weight: float,
    soft_weight: float,
    divergence: str,
    scale_t2: bool,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    divisor: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, hard, soft, grad, grad_scale) of the op `fastdistill::kd_fwd`."""
    scale = _rows.row_scale(
        student, labels, mask, row_weight, normalizer, ignore_index, reduction, divisor,
        torch.float32,
    ).contiguous()  # fmt: skip
    _, hard, soft, grad, grad_scale = ops.allocate(student, teacher, "none", need_grad)
    s, s_outer, s_step = _layout.strided_rows(student)
    t, t_outer, t_step = _layout.strided_rows(teacher)
    labels = labels.contiguous() if labels is not None and hard_weight != 0 else None
    _launch(
        "kd_forward",
        student.device,
        student=s.data_ptr(),
        student_type=_TYPES[s.dtype],
        student_outer=s_outer,
        student_step=s_step,
        teacher=t.data_ptr(),
        teacher_type=_TYPES[t.dtype],
        teacher_outer=t_outer,
        teacher_step=t_step,
        rows=scale.numel(),
        cols=student.shape[-1],
        inner=_layout.inner_rows(student),
        labels=_pointer(labels),
        row_scale=scale.data_ptr(),
        temperature=temperature,
        hard_weight=hard_weight,
        soft_weight=soft_weight,
        label_smoothing=label_smoothing,
        divergence=_DIVERGENCES[divergence] if soft_weight != 0 else _NO_DIVERGENCE,
        scale_t2=scale_t2,
        grad=_pointer(grad),
        grad_scale=_pointer(grad_scale),
        hard=hard.data_ptr(),
        soft=soft.data_ptr(),
    )
    loss, hard, soft = rows.reduce_rows(hard, soft, scale, hard_weight, soft_weight, reduction)
    return loss, hard, soft, grad, grad_scale


def _scale(grad: Tensor, out: Tensor, grad_scale: Tensor, grad_output: Tensor) -> None:
    """Out = grad * grad_scale * grad_output, each row; `out` may be `grad`."""
    uniform = not any(grad_output.stride())  # a scalar, or one number expanded
    cols = grad.shape[-1]
    factor = grad_output if uniform else grad_output.contiguous()
    _launch(
        "kd_scale",
        grad.device,
        input=grad.data_ptr(),
        output=out.data_ptr(),
        type=_TYPES[grad.dtype],
        rows=grad.numel() // cols,
        cols=cols,
        grad_scale=_pointer(grad_scale),
        grad_output=factor.data_ptr(),
        uniform=uniform,
    )


def kd_bwd(grad: Tensor, grad_scale: Tensor, grad_output: Tensor) -> Tensor:
    """The gradient of the student's logits, as a new tensor."""
    out = torch.empty_like(grad)
    _scale(grad, out, grad_scale, grad_output)
    return out


def kd_bwd_(grad: Tensor, grad_scale: Tensor, grad_output: Tensor) -> None:
    """The gradient of the student's logits, in place; rows whose factor is 1 are not touched."""
    _scale(grad, grad, grad_scale, grad_output)
