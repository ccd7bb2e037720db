"""Launchers of the CUDA C++ kernels (csrc/cuda): pointers, strides and the stream."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill import _layout, _rows
from fastdistill._native import launch_cuda as _launch
from fastdistill.softmax import ops

_TYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}


def supports(dtype: object) -> bool:
    """Whether the kernels take this element type."""
    return dtype in _TYPES


def softmax_fwd(
    x: Tensor, temperature: Tensor | None, scalar: float, log: bool
) -> tuple[Tensor, Tensor]:
    """The op `fastdistill::softmax_fwd`. A bad temperature gives a NaN row, no synchronisation."""
    y, stats = ops.allocate(x)
    rows, outer, step = _layout.strided_rows(x)
    t = _row_temperature(temperature)
    _launch(
        "softmax_forward",
        x.device,
        x=rows.data_ptr(),
        type=_TYPES[x.dtype],
        x_outer=outer,
        x_step=step,
        rows=stats.shape[1],
        cols=x.shape[-1],
        inner=_layout.inner_rows(x),
        temperature=0 if t is None else t.data_ptr(),
        scalar=scalar,
        log=log,
        y=y.data_ptr(),
        stats=stats.data_ptr(),
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
    """The op `fastdistill::softmax_bwd`."""
    grad_x, grad_temperature = ops.allocate_gradients(x, need_temperature)
    rows, x_outer, x_step = _layout.strided_rows(x)
    upstream, g_outer, g_step = _layout.strided_rows(grad)
    t = _row_temperature(temperature)
    _launch(
        "softmax_backward",
        x.device,
        grad=upstream.data_ptr(),
        grad_outer=g_outer,
        grad_step=g_step,
        x=rows.data_ptr(),
        type=_TYPES[x.dtype],
        x_outer=x_outer,
        x_step=x_step,
        rows=stats.shape[1],
        cols=x.shape[-1],
        inner=_layout.inner_rows(x),
        temperature=0 if t is None else t.data_ptr(),
        scalar=scalar,
        log=log,
        stats=stats.data_ptr(),
        grad_x=grad_x.data_ptr(),
        grad_temperature=grad_temperature.data_ptr() if need_temperature else 0,
    )
    return grad_x, grad_temperature


def _row_temperature(temperature: Tensor | None) -> Tensor | None:
    """As the kernels read it; held by the caller until the launch."""
    if temperature is None:
        return None
    return _rows.valid_temperature(temperature).to(torch.float32).contiguous()
