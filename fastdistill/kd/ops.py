"""Schemas, fakes and the table backend -> launcher of this room's ops. Registration only.

The ops are private: `api.py` validates for them. The forward computes the gradient in the same
pass; `kd_bwd` multiplies it by `grad_output`, and `kd_bwd_` does so in place where it may.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill._backend import Launchers

launcher = Launchers(
    {
        "cpu": "fastdistill.kd.native",
        "cuda": "fastdistill.kd.native_cuda",
        "triton": "fastdistill.kd.triton",
    }
)
_library = torch.library.Library("fastdistill", "FRAGMENT")
_library.define(
    "kd_fwd(Tensor student, Tensor teacher, Tensor? labels, Tensor? mask, Tensor? row_weight,"
    " Tensor? normalizer, float temperature, float hard_weight, float soft_weight,"
    " str divergence, bool scale_t2, int ignore_index, float label_smoothing, str reduction,"
    " float divisor, bool need_grad, str backend)"
    " -> (Tensor loss, Tensor hard, Tensor soft, Tensor grad, Tensor grad_scale)"
)
_library.define("kd_bwd(Tensor grad, Tensor grad_scale, Tensor grad_output, str backend) -> Tensor")
_library.define(
    "kd_bwd_(Tensor(a!) grad, Tensor grad_scale, Tensor grad_output, str backend) -> ()"
)


def allocate(
    student: Tensor, teacher: Tensor, reduction: str, need_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised (loss, hard, soft, grad, grad_scale) of `kd_fwd`.

    loss, hard, soft: [] or [...] (reduction "none"), float32, or float64 if either input is.
    grad: [..., V] contiguous in the student's dtype, or [0] without need of a gradient.
    grad_scale: float32 [rows] where float16 keeps 1 / divisor out of `grad`, else [0].
    """
    double = student.dtype is torch.float64 or teacher.dtype is torch.float64
    dtype = torch.float64 if double else torch.float32
    rows = student.shape[:-1]
    device = student.device
    shape = rows if reduction == "none" else ()
    loss, hard, soft = (torch.empty(shape, dtype=dtype, device=device) for _ in range(3))
    grad = torch.empty(student.shape if need_grad else (0,), dtype=student.dtype, device=device)
    scaled = need_grad and student.dtype is torch.float16
    scales = rows.numel() if scaled else 0
    return loss, hard, soft, grad, torch.empty(scales, dtype=torch.float32, device=device)


def _forward(student: Tensor, *args: object) -> tuple[Tensor, ...]:
    return launcher(args[-1]).kd_fwd(student, *args[:-1])  # type: ignore[arg-type]


def _backward(grad: Tensor, grad_scale: Tensor, grad_output: Tensor, backend: str) -> Tensor:
    return launcher(backend).kd_bwd(grad, grad_scale, grad_output)


def _backward_(grad: Tensor, grad_scale: Tensor, grad_output: Tensor, backend: str) -> None:
    launcher(backend).kd_bwd_(grad, grad_scale, grad_output)


for _key in ("CPU", "CUDA"):
    _library.impl("kd_fwd", _forward, _key)
    _library.impl("kd_bwd", _backward, _key)
    _library.impl("kd_bwd_", _backward_, _key)


@torch.library.register_fake("fastdistill::kd_fwd", lib=_library)
def _forward_fake(
    student: Tensor, teacher: Tensor, *args: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    reduction, need_grad = args[11], args[13]
    return allocate(student, teacher, str(reduction), bool(need_grad))


@torch.library.register_fake("fastdistill::kd_bwd", lib=_library)
def _backward_fake(grad: Tensor, grad_scale: Tensor, grad_output: Tensor, backend: str) -> Tensor:
    return torch.empty_like(grad)


@torch.library.register_fake("fastdistill::kd_bwd_", lib=_library)
def _backward_fake_(grad: Tensor, grad_scale: Tensor, grad_output: Tensor, backend: str) -> None:
    return None
