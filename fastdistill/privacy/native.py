"""Launcher of the CPU kernels (csrc/cpu): addresses and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill import _native
from fastdistill.privacy import ops
from fastdistill.privacy.mechanism import EXPONENTIALS, Mechanism
from fastdistill.privacy.source import (
    ANSWER_NOISE,
    GRADIENT_NOISE,
    ROW_GRADIENT_NOISE,
    Source,
    counter,
)

_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def clip_and_noise(grad_samples: Sequence[Tensor], m: Mechanism, bits: Source) -> list[Tensor]:
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
        *m,
        *_drawn(bits, GRADIENT_NOISE),
    )
    return released


def _drawn(bits: Source, purpose: int) -> tuple[int, int, tuple[int, int, int], int]:
    """What every release is told last: the source of its bits, and how many threads it may take."""
    return bits.kind, bits.key.data_ptr(), counter(bits, purpose), torch.get_num_threads()


def add_noise_(sums: Sequence[Tensor], m: Mechanism, bits: Source) -> None:
    """The op `fastdistill::add_noise_` on the CPU."""
    dense = [x.contiguous() for x in sums]  # held until the call is over
    _module().add_noise(
        [
            (x.data_ptr(), _TYPES[x.dtype], x.numel(), x.data_ptr(), x.dtype is torch.float64)
            for x in dense
        ],
        m.grid,
        m.scale,
        m.inverse,
        *_drawn(bits, GRADIENT_NOISE),
    )
    for x, y in zip(sums, dense, strict=True):
        if x is not y:
            x.copy_(y)


def square_norms(x: Tensor) -> Tensor:
    """The square norms of the samples of [B, ...], float64 [B], added up in float64."""
    dense = x.contiguous()
    out = torch.empty(len(x), dtype=torch.float64)
    _module().square_norms(
        dense.data_ptr(),
        _TYPES[x.dtype],
        len(x),
        x.shape[1:].numel(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def noisy_softmax_sum(
    teachers: Sequence[Tensor], temperature: float, m: Mechanism, bits: Source
) -> Tensor:
    """The op `fastdistill::noisy_softmax_sum` on the CPU."""
    return _sum_rows(teachers, 1 / temperature, m, bits, ANSWER_NOISE)


def noisy_gradient_sum(teachers: Sequence[Tensor], m: Mechanism, bits: Source) -> Tensor:
    """The op `fastdistill::noisy_gradient_sum` on the CPU."""
    return _sum_rows(teachers, 0.0, m, bits, ROW_GRADIENT_NOISE)


def _sum_rows(
    teachers: Sequence[Tensor],
    inverse_temperature: float,
    m: Mechanism,
    bits: Source,
    purpose: int,
) -> Tensor:
    out = ops.allocate_rows(teachers)
    dense = [x.contiguous() for x in teachers]  # held here until the call is over
    _module().noisy_row_sum(
        [x.data_ptr() for x in dense],
        _TYPES[dense[0].dtype],
        out.shape[0],
        out.shape[1],
        out.data_ptr(),
        out.dtype is torch.float64,
        inverse_temperature,
        EXPONENTIALS if m.grid else 0.0,
        *m,
        *_drawn(bits, purpose),
    )
    return out


def _module() -> Any:
    module = _native.cpu().module
    assert module is not None  # the backend was chosen: it had loaded
    return module
