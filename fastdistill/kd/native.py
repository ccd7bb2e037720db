"""Launchers of the CPU kernels (csrc/cpu): pointers, strides, sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill import _layout, _native, _rows
from fastdistill.kd import ops

_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_DIVERGENCES = {"forward_kl": 1, "reverse_kl": 2, "cross_entropy": 3}
_REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}
_NO_DIVERGENCE = 0
_BAD_LABEL, _BAD_WEIGHT = 1, 2


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
    """The op `fastdistill::kd_fwd` on the CPU; raises ValueError for bad values in tensors."""
    if normalizer is not None:
        divisor = _rows.read_normalizer(normalizer)
    outputs = ops.allocate(student, teacher, reduction, need_grad)
    loss, hard, soft, grad, grad_scale = outputs
    cols = student.shape[-1]
    inner = _layout.inner_rows(student)
    student, s_outer, s_step = _layout.strided_rows(student)
    teacher, t_outer, t_step = _layout.strided_rows(teacher)
    # Held here until the call is over: the kernel sees addresses only.
    labels = None if labels is None else labels.contiguous()
    mask = None if mask is None else mask.contiguous()
    if row_weight is not None:  # what float32 cannot hold is infinite, and refused
        row_weight = row_weight.to(loss.dtype).to(torch.float64).contiguous()
    error, value = _module().kd_fwd(
        student.data_ptr(),
        _TYPES[student.dtype],
        s_outer,
        s_step,
        teacher.data_ptr(),
        _TYPES[teacher.dtype],
        t_outer,
        t_step,
        student.numel() // cols,
        cols,
        inner,
        0 if labels is None else labels.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        0 if row_weight is None else row_weight.data_ptr(),
        temperature,
        hard_weight,
        soft_weight,
        _DIVERGENCES[divergence] if soft_weight != 0 else _NO_DIVERGENCE,
        scale_t2,
        ignore_index,
        label_smoothing,
        _REDUCTIONS[reduction],
        divisor,
        loss.data_ptr(),
        hard.data_ptr(),
        soft.data_ptr(),
        loss.dtype is torch.float64,
        grad.data_ptr() if need_grad else 0,
        grad.element_size(),
        grad_scale.data_ptr() if grad_scale.numel() else 0,
        torch.get_num_threads(),
    )
    if error == _BAD_LABEL:
        raise ValueError(_rows.bad_label(int(value), cols, ignore_index))
    if error == _BAD_WEIGHT:
        raise ValueError(_rows.bad_weight(value))
    return outputs


def kd_bwd(grad: Tensor, grad_scale: Tensor, grad_output: Tensor) -> Tensor:
    """Grad times its row's factors, as a new tensor."""
    out = torch.empty_like(grad)
    _scale(grad, out, grad_scale, grad_output)
    return out


def kd_bwd_(grad: Tensor, grad_scale: Tensor, grad_output: Tensor) -> None:
    """Grad times its row's factors, in place; a factor of 1 touches nothing."""
    _scale(grad, grad, grad_scale, grad_output)


def _scale(grad: Tensor, out: Tensor, grad_scale: Tensor, grad_output: Tensor) -> None:
    if grad.numel() == 0:
        return
    uniform = grad_output.ndim == 0 or not any(grad_output.stride())  # expanded, as by .sum()
    if not uniform:
        grad_output = grad_output.contiguous()
    cols = grad.shape[-1]
    _module().kd_scale(
        grad.data_ptr(),
        out.data_ptr(),
        _TYPES[grad.dtype],
        grad.numel() // cols,
        cols,
        grad_scale.data_ptr() if grad_scale.numel() else 0,
        grad_output.data_ptr(),
        grad_output.dtype is torch.float64,
        0 if uniform else 1,
        grad.element_size(),
        torch.get_num_threads(),
    )


def _module() -> Any:
    module = _native.cpu().module
    assert module is not None  # the backend was chosen: it had loaded
    return module
