"""Launchers of the CPU kernels (csrc/cpu): pointers, strides, sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill import _layout, _native, _rows
from fastdistill.softmax import ops

_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def softmax_fwd(
    x: Tensor, temperature: Tensor | None, scalar: float, log: bool
) -> tuple[Tensor, Tensor]:
    """The op `fastdistill::softmax_fwd` on the CPU; raises ValueError for a bad temperature."""
    if temperature is not None:
        _rows.check_temperature(temperature)
    y, stats = ops.allocate(x)
    inner = _layout.inner_rows(x)
    x, outer, step = _layout.strided_rows(x)
    t = _row_temperature(temperature)
    _module().softmax_fwd(
        x.data_ptr(),
        _TYPES[x.dtype],
        outer,
        step,
        stats.shape[1],
        x.shape[-1],
        inner,
        0 if t is None else t.data_ptr(),
        scalar,
        log,
        y.data_ptr(),
        stats.data_ptr(),
        stats.dtype is torch.float64,
        torch.get_num_threads(),
    )
    return y, stats


def softmax_bwd(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    temperature: Tensor | None,
    scalar: float,
    log: bool,
    need_temperature: bool,
) -> tuple[Tensor, Tensor]:
    """The op `fastdistill::softmax_bwd` on the CPU."""
    grad_x, grad_temperature = ops.allocate_gradients(x, need_temperature)
    inner = _layout.inner_rows(x)
    x, x_outer, x_step = _layout.strided_rows(x)
    grad, g_outer, g_step = _layout.strided_rows(grad)
    t = _row_temperature(temperature)
    _module().softmax_bwd(
        grad.data_ptr(),
        g_outer,
        g_step,
        x.data_ptr(),
        _TYPES[x.dtype],
        x_outer,
        x_step,
        stats.shape[1],
        x.shape[-1],
        inner,
        0 if t is None else t.data_ptr(),
        scalar,
        log,
        stats.data_ptr(),
        stats.dtype is torch.float64,
        grad_x.data_ptr(),
        grad_temperature.data_ptr() if need_temperature else 0,
        torch.get_num_threads(),
    )
    return grad_x, grad_temperature


def _row_temperature(temperature: Tensor | None) -> Tensor | None:
    """As the kernels read it; held by the caller until the call is over."""
    return None if temperature is None else temperature.to(torch.float64).contiguous()


def _module() -> Any:
    module = _native.cpu().module
    assert module is not None  # the backend was chosen: it had loaded
    return module
