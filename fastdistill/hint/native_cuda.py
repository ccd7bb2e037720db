"""Launchers of the CUDA C++ kernels (csrc/cuda): pointers, strides and the stream."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastdistill._native import launch_cuda as _launch
from fastdistill.hint import gpu

_TYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
_DISTANCES = {"mse": 0, "l1": 1, "smooth_l1": 2, "cosine": 3}
_NORMS = {"none": 0, "layer_norm": 1, "l2": 2}


def supports(student: object, teacher: object) -> bool:
    """Whether the kernels take this pair of element types."""
    return student in _TYPES and teacher in _TYPES


def _rows(
    distance: str,
    student_norm: str,
    teacher_norm: str,
    student: Tensor,
    teacher: Tensor,
    bias: Tensor | None,
    factors: Tensor,
    grad: Tensor | None,
    loss: Tensor,
) -> None:
    """The row kernel (`gpu.RowKernel`)."""
    _launch(
        "hint_rows",
        student.device,
        student=student.data_ptr(),
        student_type=_TYPES[student.dtype],
        student_step=student.stride(0),
        teacher=teacher.data_ptr(),
        teacher_type=_TYPES[teacher.dtype],
        teacher_step=teacher.stride(0),
        rows=student.shape[0],
        cols=student.shape[1],
        bias=0 if bias is None else bias.data_ptr(),
        row_scale=factors.data_ptr(),
        distance=_DISTANCES[distance],
        student_norm=_NORMS[student_norm],
        teacher_norm=_NORMS[teacher_norm],
        grad=0 if grad is None else grad.data_ptr(),
        grad_type=0 if grad is None else _TYPES[grad.dtype],
        loss=loss.data_ptr(),
    )


def _kernels(
    distance: str, student_norm: str, teacher_norm: str, student: Tensor, teacher: Tensor
) -> tuple[gpu.RowKernel, None]:
    """The row kernel of a call; the products are cuBLAS's."""
    return functools.partial(_rows, distance, student_norm, teacher_norm), None


def _scale(grad: Tensor, out: Tensor, grad_scale: Tensor, grad_output: Tensor) -> None:
    """Out = grad times a number on the device; a factor of 1 in place touches nothing."""
    factor = grad_output.float()
    if grad_scale.numel():
        factor = factor * grad_scale.view(())
    if grad.numel():
        _launch(
            "kd_scale",  # of any gradient
            grad.device,
            input=grad.data_ptr(),
            output=out.data_ptr(),
            type=_TYPES[grad.dtype],
            rows=1,
            cols=grad.numel(),
            grad_scale=0,
            grad_output=factor.data_ptr(),
            uniform=True,
        )


_launcher = gpu.Launcher(_kernels, _scale)
hint_fwd, hint_grad = _launcher.hint_fwd, _launcher.hint_grad
hint_bwd, hint_bwd_ = _launcher.hint_bwd, _launcher.hint_bwd_
