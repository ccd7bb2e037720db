"""Triton kernels of the temperature softmaxes and their launchers.

A `_rows_` kernel keeps whole rows in registers and reads them once; a `_blocks_` kernel walks
longer rows twice (the sums, then the results). How a row is read: fastdistill/_triton.py.

Maxima on a GPU drop NaN, sums do not: each NaN, +inf or row of only -inf arrives as a NaN in the
row's sums, and from there in all its results.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistill import _layout, _rows
from fastdistill._triton import (
    ANY,
    LOG2E,
    NARROW_COLS,
    Begins,
    Config,
    advance,
    architecture,
    begins,
    ends,
    first_vector,
    head,
    join_lanes,
    load,
    max_row,
    options,
    power_of_two_at_least,
    program_rows,
    row_start,
    scalar,
    sum_row,
    vectors,
)
from fastdistill.softmax import ops

_SIZES = ["rows", "cols", "inner", "x_outer", "x_step", "g_outer", "g_step", "shift"]
"""Arguments whose value must not select another compiled kernel."""
_FORWARD_SIZES = [name for name in _SIZES if not name.startswith("g_")]


@triton.jit
def _inverse(inverse_ptr, inverse_t, row, valid, PER_ROW: tl.constexpr, DTYPE: tl.constexpr):
    """1 / T of each row."""
    if PER_ROW:
        inverse = tl.load(inverse_ptr + row, mask=valid, other=1.0)
    else:
        inverse = scalar(inverse_t, DTYPE)
    return inverse


@triton.jit
def _load_gradient(ptr, mask, DTYPE: tl.constexpr):
    """Padding is 0: with a probability of 0 it stays out of the sums."""
    return tl.load(ptr, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def _result(x, m, inverse, scale, r, log_sum, LOG: tl.constexpr):
    if LOG:
        y = (x - m) * inverse - log_sum
    else:
        y = tl.exp2((x - m) * scale) * r
    return y


@triton.jit
def _slope(g, p, total, LOG: tl.constexpr):
    """T times the gradient of x: p (g - sum g p), or g - p sum g."""
    if LOG:
        slope = g - p * total
    else:
        slope = p * (g - total)
    return slope


@triton.jit
def _moment(slope, x, m):
    """In which a masked class has no part at any T."""
    return tl.where(x == -float("inf"), 0.0 * m, slope * (x - m))


@triton.jit(do_not_specialize=_FORWARD_SIZES)
def _softmax_rows_kernel(
    x_ptr,  # [rows, cols], strided
    y_ptr,  # [rows, cols], contiguous
    stats_ptr,  # [2, rows]: the maximum, the sum of the exponentials
    inverse_ptr,  # 1 / T of each row, [rows]; None unless PER_ROW
    rows, cols, inner, x_outer, x_step, shift,
    inverse_t: tl.float64,
    PER_ROW: tl.constexpr, LOG: tl.constexpr, NESTED: tl.constexpr, ENDS: tl.constexpr,
    X_LIKE_Y: tl.constexpr,
    DTYPE: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """ROWS rows of at most LANES VEC classes."""
    row = program_rows(ROWS)
    valid = row < rows
    inverse = _inverse(inverse_ptr, inverse_t, row, valid, PER_ROW, DTYPE)
    scale = inverse * LOG2E
    x_start = row_start(row, inner, x_outer, x_step, NESTED)
    y_start = row * cols
    before = head(y_start, shift, cols, VEC, ENDS)
    count = (cols - before) // VEC
    lane, offset = vectors(ROWS, LANES, VEC)
    inside = tl.where(valid, lane < count, False)
    x = load(first_vector(x_ptr, x_start + before, X_LIKE_Y, VEC) + offset, inside, DTYPE)
    m = max_row(x)
    if ENDS:
        end, outside = ends(before, count, cols, VEC)
        outside = tl.where(valid, outside, False)
        x_end = load(x_ptr + (x_start + end), outside, DTYPE)
        m = tl.maximum(m, max_row(x_end))
    total = sum_row(tl.exp2((x - m) * scale))
    if ENDS:
        total += sum_row(tl.exp2((x_end - m) * scale))
    tl.store(stats_ptr + row, m, mask=valid)
    tl.store(stats_ptr + (row + rows), total, mask=valid)
    r = 1.0 / total
    log_sum = tl.log(total)
    y = _result(x, m, inverse, scale, r, log_sum, LOG).to(y_ptr.dtype.element_ty)
    tl.store(first_vector(y_ptr, y_start + before, True, VEC) + offset, y, inside)
    if ENDS:
        y = _result(x_end, m, inverse, scale, r, log_sum, LOG).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + (y_start + end), y, outside)


@triton.jit(do_not_specialize=_FORWARD_SIZES)
def _softmax_blocks_kernel(
    x_ptr, y_ptr, stats_ptr, inverse_ptr,
    rows, cols, inner, x_outer, x_step, shift,
    inverse_t: tl.float64,
    PER_ROW: tl.constexpr, LOG: tl.constexpr, NESTED: tl.constexpr, ENDS: tl.constexpr,
    X_LIKE_Y: tl.constexpr,
    DTYPE: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One row, in blocks of LANES VEC classes; arguments as of `_softmax_rows_kernel`."""
    row = tl.program_id(0).to(tl.int64)
    inverse = _inverse(inverse_ptr, inverse_t, row, row < rows, PER_ROW, DTYPE)
    scale = inverse * LOG2E
    x_start = row_start(row, inner, x_outer, x_step, NESTED)
    y_start = row * cols
    before = head(y_start, shift, cols, VEC, ENDS)
    count = (cols - before) // VEC
    lane, offset = vectors(1, LANES, VEC)
    x_body = first_vector(x_ptr, x_start + before, X_LIKE_Y, VEC)
    m_lanes = tl.full((LANES,), -float("inf"), DTYPE)
    sums = tl.zeros((LANES,), DTYPE)
    for first in range(0, count, LANES):
        x = load(x_body + (first * VEC + offset), first + lane < count, DTYPE)
        old = m_lanes
        m_lanes, z = advance(x, m_lanes)
        sums = sums * tl.exp2((old - z) * scale) + tl.sum(tl.exp2((x - z[:, None]) * scale), 1)
    end, outside = ends(before, count, cols, VEC)
    x_end = load(x_ptr + (x_start + end), outside, DTYPE)
    m = tl.maximum(tl.max(m_lanes, 0), tl.max(x_end))
    total = join_lanes(sums, m_lanes, x_end, m, scale)
    tl.store(stats_ptr + row, m)
    tl.store(stats_ptr + (row + rows), total)
    r = 1.0 / total
    log_sum = tl.log(total)
    y_body = first_vector(y_ptr, y_start + before, True, VEC)
    for first in range(0, count, LANES):
        at, inside = first * VEC + offset, first + lane < count
        x = load(x_body + at, inside, DTYPE)
        y = _result(x, m, inverse, scale, r, log_sum, LOG).to(y_ptr.dtype.element_ty)
        tl.store(y_body + at, y, inside)
    y = _result(x_end, m, inverse, scale, r, log_sum, LOG).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + (y_start + end), y, outside)


@triton.jit(do_not_specialize=_SIZES)
def _softmax_grad_rows_kernel(
    g_ptr,  # the gradient of y, [rows, cols], strided
    x_ptr,  # [rows, cols], strided
    out_ptr,  # the gradient of x, [rows, cols], contiguous
    t_ptr,  # that of the temperature, [rows]; None where it is not needed
    stats_ptr, inverse_ptr,
    rows, cols, inner, x_outer, x_step, g_outer, g_step, shift,
    inverse_t: tl.float64,
    PER_ROW: tl.constexpr, LOG: tl.constexpr, NESTED: tl.constexpr, ENDS: tl.constexpr,
    X_LIKE_OUT: tl.constexpr, G_LIKE_OUT: tl.constexpr,
    DTYPE: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """ROWS rows of at most LANES VEC classes."""
    row = program_rows(ROWS)
    valid = row < rows
    inverse = _inverse(inverse_ptr, inverse_t, row, valid, PER_ROW, DTYPE)
    scale = inverse * LOG2E
    m = tl.load(stats_ptr + row, mask=valid, other=0.0)
    r = 1.0 / tl.load(stats_ptr + (row + rows), mask=valid, other=1.0)
    x_start = row_start(row, inner, x_outer, x_step, NESTED)
    g_start = row_start(row, inner, g_outer, g_step, NESTED)
    start = row * cols
    before = head(start, shift, cols, VEC, ENDS)
    count = (cols - before) // VEC
    lane, offset = vectors(ROWS, LANES, VEC)
    inside = tl.where(valid, lane < count, False)
    x = load(first_vector(x_ptr, x_start + before, X_LIKE_OUT, VEC) + offset, inside, DTYPE)
    g_body = first_vector(g_ptr, g_start + before, G_LIKE_OUT, VEC)
    g = _load_gradient(g_body + offset, inside, DTYPE)
    p = tl.exp2((x - m) * scale) * r
    total = sum_row(g if LOG else g * p)
    if ENDS:
        end, outside = ends(before, count, cols, VEC)
        outside = tl.where(valid, outside, False)
        x_end = load(x_ptr + (x_start + end), outside, DTYPE)
        g_end = _load_gradient(g_ptr + (g_start + end), outside, DTYPE)
        p_end = tl.exp2((x_end - m) * scale) * r
        total += sum_row(g_end if LOG else g_end * p_end)
    slope = _slope(g, p, total, LOG)
    out = (slope * inverse).to(out_ptr.dtype.element_ty)
    tl.store(first_vector(out_ptr, start + before, True, VEC) + offset, out, inside)
    if ENDS:
        slope_end = _slope(g_end, p_end, total, LOG)
        out = (slope_end * inverse).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (start + end), out, outside)
    if t_ptr is not None:
        moment = sum_row(_moment(slope, x, m))
        if ENDS:
            moment += sum_row(_moment(slope_end, x_end, m))
        tl.store(t_ptr + row, -moment * inverse * inverse, mask=valid)


@triton.jit(do_not_specialize=_SIZES)
def _softmax_grad_blocks_kernel(
    g_ptr, x_ptr, out_ptr, t_ptr, stats_ptr, inverse_ptr,
    rows, cols, inner, x_outer, x_step, g_outer, g_step, shift,
    inverse_t: tl.float64,
    PER_ROW: tl.constexpr, LOG: tl.constexpr, NESTED: tl.constexpr, ENDS: tl.constexpr,
    X_LIKE_OUT: tl.constexpr, G_LIKE_OUT: tl.constexpr,
    DTYPE: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One row, in blocks of LANES VEC classes; arguments as of `_softmax_grad_rows_kernel`."""
    row = tl.program_id(0).to(tl.int64)
    inverse = _inverse(inverse_ptr, inverse_t, row, row < rows, PER_ROW, DTYPE)
    scale = inverse * LOG2E
    m = tl.load(stats_ptr + row)
    r = 1.0 / tl.load(stats_ptr + (row + rows))
    x_start = row_start(row, inner, x_outer, x_step, NESTED)
    g_start = row_start(row, inner, g_outer, g_step, NESTED)
    start = row * cols
    before = head(start, shift, cols, VEC, ENDS)
    count = (cols - before) // VEC
    lane, offset = vectors(1, LANES, VEC)
    x_body = first_vector(x_ptr, x_start + before, X_LIKE_OUT, VEC)
    g_body = first_vector(g_ptr, g_start + before, G_LIKE_OUT, VEC)
    end, outside = ends(before, count, cols, VEC)
    x_end = load(x_ptr + (x_start + end), outside, DTYPE)
    g_end = _load_gradient(g_ptr + (g_start + end), outside, DTYPE)
    p_end = tl.exp2((x_end - m) * scale) * r
    sums = tl.zeros((LANES,), DTYPE)
    for first in range(0, count, LANES):
        at, inside = first * VEC + offset, first + lane < count
        g = _load_gradient(g_body + at, inside, DTYPE)
        if LOG:
            sums += tl.sum(g, 1)
        else:
            p = tl.exp2((load(x_body + at, inside, DTYPE) - m) * scale) * r
            sums += tl.sum(g * p, 1)
    total = tl.sum(sums, 0) + tl.sum(g_end if LOG else g_end * p_end)
    out_body = first_vector(out_ptr, start + before, True, VEC)
    moments = tl.zeros((LANES,), DTYPE)
    for first in range(0, count, LANES):
        at, inside = first * VEC + offset, first + lane < count
        x = load(x_body + at, inside, DTYPE)
        g = _load_gradient(g_body + at, inside, DTYPE)
        slope = _slope(g, tl.exp2((x - m) * scale) * r, total, LOG)
        if t_ptr is not None:
            moments += tl.sum(_moment(slope, x, m), 1)
        tl.store(out_body + at, (slope * inverse).to(out_ptr.dtype.element_ty), inside)
    slope_end = _slope(g_end, p_end, total, LOG)
    tl.store(out_ptr + (start + end), (slope_end * inverse).to(out_ptr.dtype.element_ty), outside)
    if t_ptr is not None:
        moment = tl.sum(moments, 0) + tl.sum(_moment(slope_end, x_end, m))
        tl.store(t_ptr + row, -moment * inverse * inverse)


# ----------------------------------------------------------------------------------------------
# The launchers.

_SINGLE = (
    Config(NARROW_COLS, True, 512, 4, None),
    Config(1024, True, 1024, 4, None),
    Config(2048, True, 2048, 8, None),
    Config(4096, True, 4096, 16, None),
    Config(8192, True, 8192, 32, None),
    Config(ANY, False, 2048, 8, None),
)
_DOUBLE = (
    Config(NARROW_COLS, True, 256, 4, None),
    Config(1024, True, 1024, 8, None),
    Config(ANY, False, 512, 8, None),
)
"""By length, 8 elements to a thread (4 float64); the first that fits is taken."""


@cache
def _config(device: torch.device, double: bool, cols: int) -> Config:
    config = next(c for c in (_DOUBLE if double else _SINGLE) if cols <= c.cols)
    if architecture(device) == "gfx9":  # 64 lanes to a warp
        config = config._replace(warps=config.warps // 2)
    return config


def _constants(config: Config, cols: int, vec: int, count: int) -> tuple[dict[str, Any], int]:
    """(LANES, and ROWS of a kernel that has it; the number of programs)."""
    if not config.in_registers:
        return {"LANES": config.block // vec}, count
    lanes = power_of_two_at_least(-(-cols // vec))
    tile_rows = max(config.block // (lanes * vec), 1)
    return {"LANES": lanes, "ROWS": tile_rows}, -(-count // tile_rows)


def _inverses(temperature: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if temperature is None:
        return None
    return (1.0 / _rows.valid_temperature(temperature).to(dtype)).contiguous()


_ALIGNED = Begins(0, 0, 0)


def softmax_fwd(
    x: Tensor, temperature: Tensor | None, scalar: float, log: bool
) -> tuple[Tensor, Tensor]:
    """The op `fastdistill::softmax_fwd`. A bad temperature gives a NaN row, no synchronisation."""
    y, stats = ops.allocate(x)
    count, cols, double = stats.shape[1], x.shape[-1], x.dtype is torch.float64
    if count == 0:
        return y, stats
    inner = _layout.inner_rows(x)
    x, outer, step = _layout.strided_rows(x)
    vec = 1 if cols <= NARROW_COLS else 16 // x.element_size()
    x_rows = begins(x, outer, step, inner, count, vec)
    y_rows = begins(y, inner * cols, cols, inner, count, vec)
    config = _config(x.device, double, cols)
    shape, programs = _constants(config, cols, vec, count)
    kernel = _softmax_rows_kernel if config.in_registers else _softmax_blocks_kernel
    with torch.cuda.device_of(x):
        kernel[(programs,)](
            x,
            y,
            stats,
            _inverses(temperature, stats.dtype),
            count,
            cols,
            inner,
            x_rows.outer,
            x_rows.step,
            y_rows.shift,
            1.0 / scalar,
            PER_ROW=temperature is not None,
            LOG=log,
            NESTED=x_rows.outer != x_rows.step * inner,
            ENDS=cols % vec != 0 or not all(r.like(_ALIGNED, vec) for r in (x_rows, y_rows)),
            X_LIKE_Y=x_rows.like(y_rows, vec),
            DTYPE=tl.float64 if double else tl.float32,
            VEC=vec,
            **shape,
            **options(config),
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
    count, cols, double = stats.shape[1], x.shape[-1], x.dtype is torch.float64
    if count == 0:
        return grad_x, grad_temperature
    inner = _layout.inner_rows(x)
    x, x_outer, x_step = _layout.strided_rows(x)
    grad, g_outer, g_step = _layout.strided_rows(grad)
    vec = 1 if cols <= NARROW_COLS else 16 // x.element_size()
    x_rows = begins(x, x_outer, x_step, inner, count, vec)
    g_rows = begins(grad, g_outer, g_step, inner, count, vec)
    out_rows = begins(grad_x, inner * cols, cols, inner, count, vec)
    everything = (x_rows, g_rows, out_rows)
    config = _config(x.device, double, cols)
    shape, programs = _constants(config, cols, vec, count)
    kernel = _softmax_grad_rows_kernel if config.in_registers else _softmax_grad_blocks_kernel
    with torch.cuda.device_of(x):
        kernel[(programs,)](
            grad,
            x,
            grad_x,
            grad_temperature if need_temperature else None,
            stats,
            _inverses(temperature, stats.dtype),
            count,
            cols,
            inner,
            x_rows.outer,
            x_rows.step,
            g_rows.outer,
            g_rows.step,
            out_rows.shift,
            1.0 / scalar,
            PER_ROW=temperature is not None,
            LOG=log,
            NESTED=any(r.outer != r.step * inner for r in (x_rows, g_rows)),
            ENDS=cols % vec != 0 or not all(r.like(_ALIGNED, vec) for r in everything),
            X_LIKE_OUT=x_rows.like(out_rows, vec),
            G_LIKE_OUT=g_rows.like(out_rows, vec),
            DTYPE=tl.float64 if double else tl.float32,
            VEC=vec,
            **shape,
            **options(config),
        )
    return grad_x, grad_temperature
