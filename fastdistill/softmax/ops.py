"""Schemas, fakes and the table backend -> launcher of this room's ops. Registration only.

The ops are private: `api.py` validates for them. The backward takes x and two numbers of each row
that the forward has left; the output it does without (see csrc/cpu/softmax.inl).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill._backend import Launchers

launcher = Launchers(
    {
        "cpu": "fastdistill.softmax.native",
        "cuda": "fastdistill.softmax.native_cuda",
        "triton": "fastdistill.softmax.triton",
    }
)
_library = torch.library.Library("fastdistill", "FRAGMENT")
_library.define(
    "softmax_fwd(Tensor x, Tensor? temperature, float scalar, bool log, str backend)"
    " -> (Tensor y, Tensor stats)"
)
_library.define(
    "softmax_bwd(Tensor grad, Tensor x, Tensor stats, Tensor? temperature, float scalar, bool log,"
    " bool need_temperature, str backend) -> (Tensor grad_x, Tensor grad_temperature)"
)


def _arithmetic(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def allocate(x: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised (y, stats) of `softmax_fwd`.

    y: [..., V] contiguous in x's dtype.
    stats: float32 (float64 for float64) [2, rows]: the maximum m of x, the sum of exp((x - m) / T).
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x.shape[:-1].numel()
    return y, torch.empty((2, rows), dtype=_arithmetic(x), device=x.device)


def allocate_gradients(x: Tensor, need_temperature: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised (grad_x, grad_temperature) of `softmax_bwd`.

    grad_x: [..., V] contiguous in x's dtype.
    grad_temperature: float32 (float64 for float64) [...], or [0] where it is not needed.
    """
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    shape = x.shape[:-1] if need_temperature else (0,)
    return grad_x, torch.empty(shape, dtype=_arithmetic(x), device=x.device)


def _forward(x: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return launcher(args[-1]).softmax_fwd(x, *args[:-1])  # type: ignore[arg-type]


def _backward(grad: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return launcher(args[-1]).softmax_bwd(grad, *args[:-1])  # type: ignore[arg-type]


for _key in ("CPU", "CUDA"):
    _library.impl("softmax_fwd", _forward, _key)
    _library.impl("softmax_bwd", _backward, _key)


@torch.library.register_fake("fastdistill::softmax_fwd", lib=_library)
def _forward_fake(x: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return allocate(x)


@torch.library.register_fake("fastdistill::softmax_bwd", lib=_library)
def _backward_fake(grad: Tensor, x: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return allocate_gradients(x, bool(args[-2]))
