"""Launcher of the CPU kernels (csrc/cpu): addresses and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill import _native
from fastdistill.privacy import ops
from fastdistill.privacy.source import Source, counter

_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def clip_and_noise(
    grad_samples: Sequence[Tensor],
    clip: float,
    unit: float,
    fine: float,
    grid: float,
    scale: float,
    inverse: float,
    kind: int,
    key: Tensor,
    stream: int,
) -> list[Tensor]:
    """The op `fastdistill::clip_and_noise` on the CPU."""
    released = ops.allocate(grad_samples)
    # Held here until the call is over: the kernel sees addresses only.
    dense = [x.contiguous() for x in grad_samples]
    _module().clip_and_noise(
        [
            (x.data_ptr(), _TYPES[x.dtype], y.numel(), y.data_ptr(), y.dtype is torch.float64)
            for x, y in zip(dense, released, strict=True)
        ],
        dense[0].shape[0],
        clip,
        unit,
        fine,
        grid,
        scale,
        inverse,
        kind,
        key.data_ptr(),
        counter(Source(kind, key, stream), 0),
        torch.get_num_threads(),
    )
    return released


def _module() -> Any:
    module = _native.cpu().module
    assert module is not None  # the backend was chosen: it had loaded
    return module
