"""Triton kernels of `kd_loss` and their launchers.

Two forward kernels share their arithmetic: `_kd_rows_kernel` keeps whole rows in registers and
reads them once; `_kd_blocks_kernel` walks longer rows twice (the sums, then terms and gradient).
`_kd_scale_kernel` is the backward.

How a row is read: fastdistill/_triton.py.

Maxima on a GPU drop NaN, sums do not: each NaN, +inf or row of only -inf arrives as a NaN in the
row's sums, and from there in all its results.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistill import _layout, _rows
from fastdistill._triton import ANY as _ANY
from fastdistill._triton import LOG2E, Config
from fastdistill._triton import NARROW_COLS as _NARROW_COLS
from fastdistill._triton import Begins as _Begins
from fastdistill._triton import advance as _advance
from fastdistill._triton import architecture as _architecture
from fastdistill._triton import begins as _begins
from fastdistill._triton import ends as _ends
from fastdistill._triton import first_vector as _first_vector
from fastdistill._triton import head as _head
from fastdistill._triton import join_lanes as _join_lanes
from fastdistill._triton import load as _load
from fastdistill._triton import longest as _longest
from fastdistill._triton import max_row as _max_row
from fastdistill._triton import options as _options
from fastdistill._triton import power_of_two_at_least as _power_of_two_at_least
from fastdistill._triton import program_rows as _program_rows
from fastdistill._triton import row_start as _row_start
from fastdistill._triton import scalar as _scalar
from fastdistill._triton import shift as _shift
from fastdistill._triton import sum_row as _sum_row
from fastdistill._triton import vectors as _vectors
from fastdistill.kd import ops

NO_DIVERGENCE = tl.constexpr(0)
FORWARD_KL = tl.constexpr(1)
REVERSE_KL = tl.constexpr(2)
CROSS_ENTROPY = tl.constexpr(3)
_DIVERGENCES = {"forward_kl": 1, "reverse_kl": 2, "cross_entropy": 3}

NEAR = tl.constexpr(0.1)
"""|u| below which exp(u) - 1 - u is summed as a series: as a difference it would cancel."""

HUGE = tl.constexpr(1e30)
"""Bound on a difference of logits inside a running sum, which stays finite with it."""

HALF_EXPONENT = tl.constexpr(14.75)
"""log2 of what a float16 gradient's bound is scaled to: below 65504, with room for rounding."""

_SIZES = ["rows", "cols", "inner", "s_outer", "s_step", "t_outer", "t_step", "s_shift", "g_shift"]
"""Arguments whose value must not select another compiled kernel."""


# ----------------------------------------------------------------------------------------------
# The arithmetic of one class. Arguments are tiles, or broadcast to one.


@triton.jit
def _log_ratio(excess, s, t):
    """log(s / t) of positive s and t, where excess = s - t is known better than they are.

    The GPU's log errs by 2^-22 around 1, so near 0 by the series of 2 atanh(z), z = x / (2 + x):
    |x| < 0.1 has z^2 < 0.0028, and the first term left out is below 1e-20.
    """
    x = excess / t
    z = x / (2.0 + x)
    w = z * z
    y = w * (1 / 15) + (1 / 13)
    y = y * w + (1 / 11)
    y = y * w + (1 / 9)
    y = y * w + (1 / 7)
    y = y * w + (1 / 5)
    y = y * w + (1 / 3)
    y = y * w + 1.0
    return tl.where(tl.abs(x) < 0.1, 2.0 * z * y, tl.log(s / t))


@triton.jit
def _curve(u, DTYPE: tl.constexpr):
    """(exp(u) - 1 - u) / u^2 for |u| < NEAR, to the rounding of DTYPE."""
    if DTYPE == tl.float64:
        y = u * (1 / 6227020800) + (1 / 479001600)
        y = y * u + (1 / 39916800)
        y = y * u + (1 / 3628800)
        y = y * u + (1 / 362880)
        y = y * u + (1 / 40320)
        y = y * u + (1 / 5040)
        y = y * u + (1 / 720)
    else:
        y = u * (1 / 5040) + (1 / 720)
    y = y * u + (1 / 120)
    y = y * u + (1 / 24)
    y = y * u + (1 / 6)
    return y * u + 0.5


@triton.jit
def _apart(e_s, e_t, difference, DTYPE: tl.constexpr):
    """E_s - e_t = exp(a) - exp(b) for a difference a - b that is known better than they are."""
    series = e_t * difference * (1.0 + difference * _curve(difference, DTYPE))
    return tl.where(tl.abs(difference) < NEAR, series, e_s - e_t)


@triton.jit
def _soft_term(s, p, q, u, m_s, log_sum, inv_temp, DIVERGENCE: tl.constexpr, DTYPE: tl.constexpr):
    """The class's term of the divergence; of a KL never negative, and 0 where the logits agree.

    Padding, s = t = -inf, has p = q = 0 and u = NaN, and gives 0.
    """
    near = tl.abs(u) < NEAR
    if DIVERGENCE == FORWARD_KL:
        term = tl.where(near, p * u * u * _curve(u, DTYPE), (q - p) - p * u)
        term = tl.where(p == 0.0, q, term)
    elif DIVERGENCE == REVERSE_KL:
        term = tl.where(near, q * u * u * _curve(-u, DTYPE), (p - q) + q * u)
        term = tl.where(q == 0.0, p, term)
    else:
        term = tl.where(p == 0.0, 0.0, p * ((m_s - s) * inv_temp + log_sum))
    return term


@triton.jit
def _soft_slope(s, t, p, q, u, mean, inv_temp, DIVERGENCE: tl.constexpr, DTYPE: tl.constexpr):
    """The derivative of the divergence in z_s / T.

    Of reverse KL, R: q (u - R) = q ((s - t) - mean) / T with mean = sum q (s - t), as the
    normalisers cancel; `mean` is NaN where R is infinite.
    """
    if DIVERGENCE == REVERSE_KL:
        slope = tl.where(q == 0.0, 0.0 * mean, q * (((s - t) - mean) * inv_temp))
    else:
        pu = p * u
        slope = tl.where(tl.abs(u) < NEAR, pu + pu * u * _curve(u, DTYPE), q - p)
    return slope


@triton.jit
def _tile(
    s, t, column, label, m_s, m_t, r_s, r_t, r_1, log_ratio, log_sum, mean, g_soft, g_hard,
    smoothing, uniform, scale, inv_temp,
    DIVERGENCE: tl.constexpr, HARD: tl.constexpr, UNIT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """(terms of the divergence, gradient) of the classes of a tile; r_* are 1 / sums."""
    term = tl.zeros_like(s)
    gradient = term + g_hard * 0.0  # of a loss without terms: 0, NaN where the row is spoilt
    q = tl.exp2((s - m_s) * scale) * r_s
    if DIVERGENCE != NO_DIVERGENCE:
        p = tl.exp2((t - m_t) * scale) * r_t
        u = ((s - t) - (m_s - m_t)) * inv_temp - log_ratio
        term = _soft_term(s, p, q, u, m_s, log_sum, inv_temp, DIVERGENCE, DTYPE)
        gradient = g_soft * _soft_slope(s, t, p, q, u, mean, inv_temp, DIVERGENCE, DTYPE)
    if HARD:
        if not UNIT:
            q = tl.exp2((s - m_s) * LOG2E) * r_1
        target = tl.where(column == label, 1.0 - smoothing, 0.0) + uniform
        if DIVERGENCE == NO_DIVERGENCE:
            gradient = g_hard * (q - target)
        else:
            gradient += g_hard * (q - target)
    return term, gradient


# ----------------------------------------------------------------------------------------------
# Once per row.


@triton.jit
def _label(labels_ptr, s_ptr, start, row, kept, cols, DTYPE: tl.constexpr):
    """(label, its logit). A label that is no class reads nothing: its row's factor is NaN."""
    label = tl.load(labels_ptr + row, mask=kept, other=0)
    inside = kept & (label >= 0) & (label < cols)
    picked = tl.load(s_ptr + start + label, mask=inside, other=0.0).to(DTYPE)
    return label.to(tl.int32), picked


@triton.jit
def _hard_part(picked, m_s, log_sum, excess, smoothing, SMOOTH: tl.constexpr):
    """(1 - eps) nll + eps / V sum_c(-log p_c), with excess = eps / V sum_c(m_s - s_c)."""
    part = (m_s - picked) + log_sum
    if SMOOTH:
        part = (1.0 - smoothing) * part + (excess + smoothing * log_sum)
    return part


@triton.jit
def _finite_mean(mean, r_t):
    """E_q[s - t] for the gradient of reverse KL: NaN where that is infinite or the teacher NaN."""
    return tl.where(tl.abs(mean) == float("inf"), float("nan"), mean) + 0.0 * r_t


@triton.jit
def _half_exponent(bound):
    """The n with log2(2^n bound) at most HALF_EXPONENT and within 1 of it; |n| <= 60."""
    n = tl.floor(-tl.log2(bound) + HALF_EXPONENT)
    return tl.minimum(tl.maximum(n, -60.0), 60.0).to(tl.int32)


@triton.jit
def _power_of_two(n, DTYPE: tl.constexpr):
    return ((n + 127) << 23).to(tl.float32, bitcast=True).to(DTYPE)


@triton.jit
def _store_parts(
    loss_ptr, hard_ptr, soft_ptr, row, valid, row_scale, hard, soft, hard_weight, soft_weight,
    DIVERGENCE: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """The row's loss and parts times its factor; 0 where the row is dropped."""
    kept = row_scale != 0.0
    hard = tl.where(kept, hard * row_scale, 0.0)
    soft = tl.where(kept, soft * row_scale, 0.0)
    if not HARD:  # not by a weight of 0: 0 inf would be NaN
        loss = soft_weight * soft
    elif DIVERGENCE == NO_DIVERGENCE:
        loss = hard_weight * hard
    else:
        loss = hard_weight * hard + soft_weight * soft
    tl.store(loss_ptr + row, loss, mask=valid)
    tl.store(hard_ptr + row, hard, mask=valid)
    tl.store(soft_ptr + row, soft, mask=valid)


# ----------------------------------------------------------------------------------------------
# Rows in registers.


@triton.jit
def _expectation(s, t, m_s, r_s, scale):
    """Sum q (s - t) over the classes of a tile with q > 0."""
    q = tl.exp2((s - m_s) * scale) * r_s
    return _sum_row(tl.where(q == 0.0, 0.0, q * (s - t)))


@triton.jit
def _peak(s, t, m_s, r_s, mean, scale):
    q = tl.exp2((s - m_s) * scale) * r_s
    return _max_row(tl.where(q == 0.0, 0.0, q * tl.abs((s - t) - mean)))


@triton.jit(do_not_specialize=_SIZES)
def _kd_rows_kernel(
    s_ptr,  # student, [rows, cols], strided
    t_ptr,  # teacher, [rows, cols], strided; not read without a divergence
    g_ptr,  # gradient, [rows, cols], contiguous; None without GRAD
    labels_ptr,  # int64 [rows]; None without HARD
    row_scale_ptr,  # [rows]: 0 drops the row, NaN spoils it
    grad_scale_ptr,  # float32 [rows]; None unless SCALED
    loss_ptr, hard_ptr, soft_ptr,  # [rows]
    rows, cols, inner, s_outer, s_step, t_outer, t_step, s_shift, g_shift,
    inv_temperature: tl.float64,
    hard_weight: tl.float64,
    soft_weight: tl.float64,
    part_factor: tl.float64,  # soft part = part_factor D
    slope_factor: tl.float64,  # soft gradient = slope_factor dD / d(z_s / T)
    label_smoothing: tl.float64,
    DIVERGENCE: tl.constexpr, HARD: tl.constexpr, SMOOTH: tl.constexpr,
    UNIT: tl.constexpr,  # the temperature is 1, or there is no divergence
    GRAD: tl.constexpr,
    SCALED: tl.constexpr,  # a float16 gradient, times a power of two instead of the row's factor
    NESTED: tl.constexpr, ENDS: tl.constexpr,
    T_LIKE_S: tl.constexpr, S_LIKE_G: tl.constexpr, T_LIKE_G: tl.constexpr,
    DTYPE: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """ROWS rows of at most LANES VEC classes."""
    inv_temp = _scalar(inv_temperature, DTYPE)
    scale = inv_temp * LOG2E
    hard_weight = _scalar(hard_weight, DTYPE)
    soft_weight = _scalar(soft_weight, DTYPE)
    slope_factor = _scalar(slope_factor, DTYPE)
    smoothing = _scalar(label_smoothing, DTYPE)
    uniform = smoothing / cols

    row = _program_rows(ROWS)
    valid = row < rows
    row_scale = tl.load(row_scale_ptr + row, mask=valid, other=0.0)
    kept = row_scale != 0.0
    s_start = _row_start(row, inner, s_outer, s_step, NESTED)
    t_start = _row_start(row, inner, t_outer, t_step, NESTED)
    g_start = row * cols
    if GRAD:  # narrow stores would cost more than narrow loads
        head = _head(g_start, g_shift, cols, VEC, ENDS)
    else:
        head = _head(s_start, s_shift, cols, VEC, ENDS)
    vectors = (cols - head) // VEC
    lane, offset = _vectors(ROWS, LANES, VEC)
    inside = lane < vectors
    read = tl.where(kept, inside, False)
    write = tl.where(valid, inside, False)

    s = _load(_first_vector(s_ptr, s_start + head, S_LIKE_G, VEC) + offset, read, DTYPE)
    m_s = _max_row(s)
    t = s
    if DIVERGENCE != NO_DIVERGENCE:
        t = _load(_first_vector(t_ptr, t_start + head, T_LIKE_G, VEC) + offset, read, DTYPE)
    m_t = _max_row(t)
    if ENDS:
        end, outside = _ends(head, vectors, cols, VEC)
        read_end = tl.where(kept, outside, False)
        s_end = _load(s_ptr + (s_start + end), read_end, DTYPE)
        m_s = tl.maximum(m_s, _max_row(s_end))
        t_end = s_end
        if DIVERGENCE != NO_DIVERGENCE:
            t_end = _load(t_ptr + (t_start + end), read_end, DTYPE)
            m_t = tl.maximum(m_t, _max_row(t_end))

    e_s = tl.exp2((s - m_s) * scale)
    e_t = tl.exp2((t - m_t) * scale)
    sum_s = _sum_row(e_s)
    sum_t = _sum_row(e_t)
    excess_s = _sum_row(e_s - e_t)  # not sum_s - sum_t, whose rounding all u would share
    if ENDS:
        e_s_end = tl.exp2((s_end - m_s) * scale)
        e_t_end = tl.exp2((t_end - m_t) * scale)
        sum_s += _sum_row(e_s_end)
        sum_t += _sum_row(e_t_end)
        excess_s += _sum_row(e_s_end - e_t_end)
    sum_1 = sum_s
    if HARD and not UNIT:
        sum_1 = _sum_row(tl.exp2((s - m_s) * LOG2E))
        if ENDS:
            sum_1 += _sum_row(tl.exp2((s_end - m_s) * LOG2E))
    r_s = 1.0 / sum_s
    r_t = 1.0 / sum_t
    log_ratio = _log_ratio(excess_s, sum_s, sum_t)
    log_sum = tl.log(sum_s)

    mean = tl.zeros_like(sum_s)
    if GRAD and DIVERGENCE == REVERSE_KL:
        mean = _expectation(s, t, m_s, r_s, scale)
        if ENDS:
            mean += _expectation(s_end, t_end, m_s, r_s, scale)
        mean = _finite_mean(mean, r_t)
    factor = row_scale
    if SCALED:
        bound = tl.zeros_like(sum_s) + 1.0
        if DIVERGENCE == REVERSE_KL:
            bound = _peak(s, t, m_s, r_s, mean, scale)
            if ENDS:
                bound = tl.maximum(bound, _peak(s_end, t_end, m_s, r_s, mean, scale))
            bound = bound * inv_temp
        n = _half_exponent(tl.abs(hard_weight) + tl.abs(slope_factor) * bound)
        factor = _power_of_two(n, DTYPE)
        to_store = tl.where(kept, row_scale * _power_of_two(-n, DTYPE), 0.0)
        tl.store(grad_scale_ptr + row, to_store.to(tl.float32), mask=valid)
    g_soft = slope_factor * factor
    g_hard = hard_weight * factor

    label = -1
    hard = tl.zeros_like(sum_s)
    if HARD:
        label, picked = _label(labels_ptr, s_ptr, s_start, row, kept, cols, DTYPE)
        excess = hard
        if SMOOTH:
            excess = _sum_row(tl.where(inside, uniform * (m_s - s), 0.0))
            if ENDS:
                excess += _sum_row(tl.where(outside, uniform * (m_s - s_end), 0.0))
        hard = _hard_part(picked, m_s, tl.log(sum_1), excess, smoothing, SMOOTH)

    term, gradient = _tile(
        s, t, head + offset, label, m_s, m_t, r_s, r_t, 1.0 / sum_1, log_ratio, log_sum, mean,
        g_soft, g_hard, smoothing, uniform, scale, inv_temp, DIVERGENCE, HARD, UNIT, DTYPE,
    )  # fmt: skip
    soft = _sum_row(term)
    if GRAD:
        gradient = tl.where(kept, gradient, 0.0).to(g_ptr.dtype.element_ty)
        tl.store(_first_vector(g_ptr, g_start + head, True, VEC) + offset, gradient, write)
    if ENDS:
        term, gradient = _tile(
            s_end, t_end, end, label, m_s, m_t, r_s, r_t, 1.0 / sum_1, log_ratio, log_sum, mean,
            g_soft, g_hard, smoothing, uniform, scale, inv_temp, DIVERGENCE, HARD, UNIT, DTYPE,
        )  # fmt: skip
        soft += _sum_row(term)
        if GRAD:
            gradient = tl.where(kept, gradient, 0.0).to(g_ptr.dtype.element_ty)
            tl.store(g_ptr + (g_start + end), gradient, tl.where(valid, outside, False))
    soft = soft * _scalar(part_factor, DTYPE)
    _store_parts(
        loss_ptr, hard_ptr, soft_ptr, row, valid, row_scale, hard, soft, hard_weight, soft_weight,
        DIVERGENCE, HARD,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------
# Rows longer than that.


@triton.jit
def _clipped_difference(s, t, e):
    """S - t within +-HUGE where the class has weight, else 0."""
    return tl.where(e > 0.0, tl.minimum(tl.maximum(s - t, -HUGE), HUGE), 0.0)


@triton.jit(do_not_specialize=_SIZES)
def _kd_blocks_kernel(
    s_ptr, t_ptr, g_ptr, labels_ptr, row_scale_ptr, grad_scale_ptr, loss_ptr, hard_ptr, soft_ptr,
    rows, cols, inner, s_outer, s_step, t_outer, t_step, s_shift, g_shift,
    inv_temperature: tl.float64,
    hard_weight: tl.float64,
    soft_weight: tl.float64,
    part_factor: tl.float64,
    slope_factor: tl.float64,
    label_smoothing: tl.float64,
    DIVERGENCE: tl.constexpr, HARD: tl.constexpr, SMOOTH: tl.constexpr, UNIT: tl.constexpr,
    GRAD: tl.constexpr, SCALED: tl.constexpr, NESTED: tl.constexpr, ENDS: tl.constexpr,
    T_LIKE_S: tl.constexpr, S_LIKE_G: tl.constexpr, T_LIKE_G: tl.constexpr,
    DTYPE: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One row, in blocks of LANES VEC classes; arguments as of `_kd_rows_kernel`."""
    REVERSE: tl.constexpr = GRAD and DIVERGENCE == REVERSE_KL
    inv_temp = _scalar(inv_temperature, DTYPE)
    scale = inv_temp * LOG2E
    hard_weight = _scalar(hard_weight, DTYPE)
    soft_weight = _scalar(soft_weight, DTYPE)
    slope_factor = _scalar(slope_factor, DTYPE)
    smoothing = _scalar(label_smoothing, DTYPE)
    uniform = smoothing / cols

    row = tl.program_id(0).to(tl.int64)
    row_scale = tl.load(row_scale_ptr + row)
    s_start = _row_start(row, inner, s_outer, s_step, NESTED)
    t_start = _row_start(row, inner, t_outer, t_step, NESTED)
    g_start = row * cols
    lane, offset = _vectors(1, LANES, VEC)
    hard = _scalar(0.0, DTYPE)
    soft = _scalar(0.0, DTYPE)

    if row_scale != 0.0:
        # The sums.
        head = _head(s_start, s_shift, cols, VEC, ENDS)
        vectors = (cols - head) // VEC
        s_body = _first_vector(s_ptr, s_start + head, True, VEC)
        t_body = _first_vector(t_ptr, t_start + head, T_LIKE_S, VEC)
        m_s = tl.full((LANES,), -float("inf"), DTYPE)
        m_t = m_s
        a_s = tl.zeros((LANES,), DTYPE)
        a_t = a_s
        a_1 = a_s
        a_x = a_s  # a_s - a_t, as a sum of differences: see _kd_rows_kernel
        a_d = a_s  # sum of e (s - t)
        peak = a_s  # the largest e |s - t|
        m_out = m_s  # the largest s where t is -inf
        for first in range(0, vectors, LANES):
            inside = first + lane < vectors
            at = first * VEC + offset
            s = _load(s_body + at, inside, DTYPE)
            before = m_s
            m_s, z = _advance(s, m_s)
            e = tl.exp2((s - z[:, None]) * scale)
            down = before - z
            rescale = tl.exp2(down * scale)
            a_s = a_s * rescale + tl.sum(e, 1)
            if HARD and not UNIT:
                e_1 = tl.exp2((s - z[:, None]) * LOG2E)
                a_1 = a_1 * tl.exp2((before - z) * LOG2E) + tl.sum(e_1, 1)
            if DIVERGENCE != NO_DIVERGENCE:
                t = _load(t_body + at, inside, DTYPE)
                before = m_t
                m_t, z = _advance(t, m_t)
                e_t = tl.exp2((t - z[:, None]) * scale)
                down_t = before - z
                rescale_t = tl.exp2(down_t * scale)
                apart = _apart(rescale, rescale_t, (down - down_t) * inv_temp, DTYPE)
                a_x = a_x * rescale + (apart * a_t + tl.sum(e - e_t, 1))
                a_t = a_t * rescale_t + tl.sum(e_t, 1)
                if REVERSE:
                    d = e * _clipped_difference(s, t, e)
                    a_d = a_d * rescale + tl.sum(d, 1)
                    out = tl.where(t == -float("inf"), s, -float("inf"))
                    m_out = tl.maximum(m_out, tl.max(out, 1))
                    if SCALED:
                        peak = tl.maximum(peak * rescale, tl.max(tl.abs(d), 1))

        end, outside = _ends(head, vectors, cols, VEC)
        s_end = _load(s_ptr + (s_start + end), outside, DTYPE)
        lanes = m_s
        m_s = tl.maximum(tl.max(lanes, 0), tl.max(s_end))
        sum_s = _join_lanes(a_s, lanes, s_end, m_s, scale)
        sum_1 = sum_s
        if HARD and not UNIT:
            sum_1 = _join_lanes(a_1, lanes, s_end, m_s, LOG2E)
        sum_t = sum_s
        excess = sum_s - sum_t
        top_t = m_s
        mean = hard
        bound = hard + 1.0
        r_s = 1.0 / sum_s
        if DIVERGENCE != NO_DIVERGENCE:
            t_end = _load(t_ptr + (t_start + end), outside, DTYPE)
            top_t = tl.maximum(tl.max(m_t, 0), tl.max(t_end))
            sum_t = _join_lanes(a_t, m_t, t_end, top_t, scale)
            down = lanes - m_s
            share = tl.exp2(down * scale)
            apart = (down - (m_t - top_t)) * inv_temp
            apart = _apart(share, tl.exp2((m_t - top_t) * scale), apart, DTYPE)
            ends = tl.exp2((s_end - m_s) * scale) - tl.exp2((t_end - top_t) * scale)
            excess = tl.sum(a_x * share + apart * a_t, 0) + tl.sum(ends)
            if REVERSE:
                e_end = tl.exp2((s_end - m_s) * scale)
                d_end = e_end * _clipped_difference(s_end, t_end, e_end)
                mean = (tl.sum(a_d * share, 0) + tl.sum(d_end)) * r_s
                out_end = tl.where(t_end == -float("inf"), s_end, -float("inf"))
                m_out_row = tl.maximum(tl.max(m_out, 0), tl.max(out_end))
                infinite = tl.exp2((m_out_row - m_s) * scale) * r_s > 0.0
                mean = _finite_mean(tl.where(infinite, float("inf"), mean), 1.0 / sum_t)
                if SCALED:
                    largest = tl.maximum(tl.max(peak * share, 0), tl.max(tl.abs(d_end)))
                    bound = (largest * r_s + tl.abs(mean)) * inv_temp
        r_t = 1.0 / sum_t
        r_1 = 1.0 / sum_1
        log_ratio = _log_ratio(excess, sum_s, sum_t)
        log_sum = tl.log(sum_s)
        factor = row_scale
        if SCALED:
            n = _half_exponent(tl.abs(hard_weight) + tl.abs(slope_factor) * bound)
            factor = _power_of_two(n, DTYPE)
            to_store = (row_scale * _power_of_two(-n, DTYPE)).to(tl.float32)
            tl.store(grad_scale_ptr + row, to_store)
        g_soft = slope_factor * factor
        g_hard = hard_weight * factor
        label = -1
        if HARD:
            label, picked = _label(labels_ptr, s_ptr, s_start, row, row_scale != 0.0, cols, DTYPE)

        # The terms and the gradient.
        if GRAD:  # narrow stores would cost more than narrow loads
            head = _head(g_start, g_shift, cols, VEC, ENDS)
            vectors = (cols - head) // VEC
            g_body = _first_vector(g_ptr, g_start + head, True, VEC)
            end, outside = _ends(head, vectors, cols, VEC)
        s_body = _first_vector(s_ptr, s_start + head, S_LIKE_G, VEC)
        t_body = _first_vector(t_ptr, t_start + head, T_LIKE_G, VEC)
        terms = tl.zeros((LANES,), DTYPE)
        excesses = tl.zeros((LANES,), DTYPE)
        excess = hard
        if GRAD or SMOOTH or DIVERGENCE != NO_DIVERGENCE:
            for first in range(0, vectors, LANES):
                inside = first + lane < vectors
                at = first * VEC + offset
                s = _load(s_body + at, inside, DTYPE)
                t = s
                if DIVERGENCE != NO_DIVERGENCE:
                    t = _load(t_body + at, inside, DTYPE)
                term, gradient = _tile(
                    s, t, head + at, label, m_s, top_t, r_s, r_t, r_1, log_ratio, log_sum, mean,
                    g_soft, g_hard, smoothing, uniform, scale, inv_temp,
                    DIVERGENCE, HARD, UNIT, DTYPE,
                )  # fmt: skip
                terms += tl.sum(term, 1)
                if SMOOTH:
                    excesses += tl.sum(tl.where(inside, uniform * (m_s - s), 0.0), 1)
                if GRAD:
                    tl.store(g_body + at, gradient.to(g_ptr.dtype.element_ty), inside)
            s_end = _load(s_ptr + (s_start + end), outside, DTYPE)
            t_end = s_end
            if DIVERGENCE != NO_DIVERGENCE:
                t_end = _load(t_ptr + (t_start + end), outside, DTYPE)
            term_end, gradient_end = _tile(
                s_end, t_end, end, label, m_s, top_t, r_s, r_t, r_1, log_ratio, log_sum, mean,
                g_soft, g_hard, smoothing, uniform, scale, inv_temp, DIVERGENCE, HARD, UNIT, DTYPE,
            )  # fmt: skip
            soft = (tl.sum(terms, 0) + tl.sum(term_end)) * _scalar(part_factor, DTYPE)
            if SMOOTH:
                excess = tl.sum(excesses, 0) + tl.sum(
                    tl.where(outside, uniform * (m_s - s_end), 0.0)
                )
            if GRAD:
                gradient_end = gradient_end.to(g_ptr.dtype.element_ty)
                tl.store(g_ptr + (g_start + end), gradient_end, outside)
        if HARD:
            hard = _hard_part(picked, m_s, tl.log(sum_1), excess, smoothing, SMOOTH)
    else:
        if SCALED:
            tl.store(grad_scale_ptr + row, 0.0)
        if GRAD:
            head = _head(g_start, g_shift, cols, VEC, ENDS)
            vectors = (cols - head) // VEC
            g_body = _first_vector(g_ptr, g_start + head, True, VEC)
            end, outside = _ends(head, vectors, cols, VEC)
            for first in range(0, vectors, LANES):
                tl.store(g_body + (first * VEC + offset), 0.0, first + lane < vectors)
            tl.store(g_ptr + (g_start + end), 0.0, outside)
    _store_parts(
        loss_ptr, hard_ptr, soft_ptr, row, row < rows, row_scale, hard, soft,
        hard_weight, soft_weight, DIVERGENCE, HARD,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------
# The backward.


@triton.jit
def _all_one(factor):
    changed = (factor != 1.0).to(tl.int32)
    if len(factor.shape) == 3:
        changed = tl.max(changed)
    return changed == 0


@triton.jit
def _scaled(x, factor):
    """A gradient of 0 stays: a dropped row has none, whatever comes from outside."""
    return tl.where(x == 0.0, x, x * factor)


@triton.jit(do_not_specialize=["total", "rows", "cols", "shift"])
def _kd_scale_kernel(
    grad_ptr,  # [total]
    out_ptr,  # [total]; grad_ptr itself IN_PLACE
    grad_scale_ptr,  # float32 [rows], or None
    grad_output_ptr,  # [rows], or one number
    total, rows, cols, shift,
    PER_ROW: tl.constexpr,  # grad_output has an element for each row
    IN_PLACE: tl.constexpr, ENDS: tl.constexpr, ALIGNED: tl.constexpr,
    DTYPE: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Out = grad times each row's factor; rows of `cols` elements, the last one maybe shorter."""
    row = _program_rows(ROWS)
    valid = row < rows
    if PER_ROW:
        factor = tl.load(grad_output_ptr + row, mask=valid, other=1.0).to(DTYPE)
    else:
        factor = tl.load(grad_output_ptr + row * 0, mask=valid, other=1.0).to(DTYPE)
    if grad_scale_ptr is not None:
        factor *= tl.load(grad_scale_ptr + row, mask=valid, other=1.0).to(DTYPE)
    idle = False
    if IN_PLACE:
        idle = _all_one(factor)
    if not idle:
        start = row * cols
        length = tl.maximum(tl.minimum(total - start, cols), 0).to(tl.int32)
        head = _head(start, shift, length, VEC, ENDS)
        vectors = (length - head) // VEC
        lane, offset = _vectors(ROWS, LANES, VEC)
        source = _first_vector(grad_ptr, start + head, ALIGNED, VEC)
        target = _first_vector(out_ptr, start + head, True, VEC)
        for first in range(0, _longest(vectors), LANES):
            inside = first + lane < vectors
            x = _scaled(tl.load(source + (first * VEC + offset), mask=inside).to(DTYPE), factor)
            tl.store(target + (first * VEC + offset), x.to(out_ptr.dtype.element_ty), inside)
        if ENDS:
            end, outside = _ends(head, vectors, length, VEC)
            x = _scaled(tl.load(grad_ptr + (start + end), mask=outside).to(DTYPE), factor)
            tl.store(out_ptr + (start + end), x.to(out_ptr.dtype.element_ty), outside)


# ----------------------------------------------------------------------------------------------
# The launchers.


_SINGLE = (
    Config(_NARROW_COLS, True, 512, 4, 128),
    Config(512, True, 1024, 4, 168),
    Config(1024, True, 1024, 4, 96),
    Config(2048, True, 2048, 8, 80),
    Config(4096, True, 4096, 16, 64, reverse=False),
    Config(8192, True, 8192, 32, 64, reverse=False),
    Config(_ANY, False, 2048, 8, 80),
)
_SINGLE_BLACKWELL = tuple(c for c in _SINGLE if c.warps < 16)  # 4096 would spill there
_DOUBLE = (
    Config(_NARROW_COLS, True, 256, 4, 255),
    Config(1024, True, 1024, 8, 216),  # reverse KL would spill at 168 on sm_100
    Config(_ANY, False, 512, 8, 128),
)
_SINGLE_64_LANES = tuple(c._replace(warps=c.warps // 2, registers=None) for c in _SINGLE)
_DOUBLE_64_LANES = tuple(c._replace(warps=c.warps // 2, registers=None) for c in _DOUBLE)

CONFIGS: dict[tuple[str, str], tuple[Config, ...]] = {
    ("sm_8", "single"): _SINGLE,
    ("sm_8", "double"): _DOUBLE,
    ("sm_9", "single"): _SINGLE,
    ("sm_9", "double"): _DOUBLE,
    ("sm_10", "single"): _SINGLE_BLACKWELL,
    ("sm_10", "double"): _DOUBLE,
    ("gfx9", "single"): _SINGLE_64_LANES,
    ("gfx9", "double"): _DOUBLE_64_LANES,
}
"""(architecture, type of the arithmetic) -> configurations by length; the first that fits is taken.

8 elements to a thread: 16 took 110 to 128 registers, which halves the warps in flight, and rows of
16384 in registers spilled. Left alone, ptxas spills for the sake of a fourth block per processor;
80 registers keep three (24 warps). Found by compiling ahead of time; no GPU has timed them yet.
"""


@cache
def _config(device: torch.device, double: bool, cols: int, reverse: bool) -> Config:
    table = CONFIGS[_architecture(device), "double" if double else "single"]
    return next(c for c in table if cols <= c.cols and (c.reverse or not reverse))


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
    """The op `fastdistill::kd_fwd`. Bad values in tensors give NaN rows: nothing synchronises."""
    outputs = ops.allocate(student, teacher, reduction, need_grad)
    loss, hard, soft, grad, grad_scale = outputs
    dtype = loss.dtype
    row_scale = _rows.row_scale(
        student, labels, mask, row_weight, normalizer, ignore_index, reduction, divisor, dtype
    ).contiguous()
    count, cols = row_scale.numel(), student.shape[-1]
    parts = (loss, hard, soft)
    if reduction != "none":
        parts = tuple(torch.empty((3, count), dtype=dtype, device=student.device))
    if count:
        soft_term, hard_term = soft_weight != 0, hard_weight != 0
        if not soft_term:
            temperature = 1.0
        inner = _layout.inner_rows(student)
        student, s_outer, s_step = _layout.strided_rows(student)
        teacher, t_outer, t_step = _layout.strided_rows(teacher)
        vec = 16 // min(student.element_size(), teacher.element_size())
        if cols <= _NARROW_COLS:
            vec = 1
        s_rows = _begins(student, s_outer, s_step, inner, count, vec)
        t_rows = _begins(teacher, t_outer, t_step, inner, count, vec)
        g_rows = _begins(grad, inner * cols, cols, inner, count, vec) if need_grad else s_rows
        aligned = _Begins(0, 0, 0)
        exact = cols % vec == 0 and all(r.like(aligned, vec) for r in (s_rows, t_rows, g_rows))
        reverse = soft_term and divergence == "reverse_kl"
        config = _config(student.device, dtype is torch.float64, cols, reverse)
        constants = {
            "DIVERGENCE": _DIVERGENCES[divergence] if soft_term else NO_DIVERGENCE.value,
            "HARD": hard_term,
            "SMOOTH": hard_term and label_smoothing != 0,
            "UNIT": temperature == 1,
            "GRAD": need_grad,
            "SCALED": grad_scale.numel() > 0,
            "NESTED": any(r.outer != r.step * inner for r in (s_rows, t_rows)),
            "ENDS": not exact,
            "T_LIKE_S": t_rows.like(s_rows, vec),
            "S_LIKE_G": s_rows.like(g_rows, vec),
            "T_LIKE_G": t_rows.like(g_rows, vec),
            "DTYPE": tl.float64 if dtype is torch.float64 else tl.float32,
            "VEC": vec,
        }
        if config.in_registers:
            kernel = _kd_rows_kernel
            lanes = _power_of_two_at_least(-(-cols // vec))
            constants["LANES"] = lanes
            constants["ROWS"] = max(config.block // (lanes * vec), 1)
            grid = -(-count // constants["ROWS"])
        else:
            kernel = _kd_blocks_kernel
            constants["LANES"] = config.block // vec
            grid = count
        squared = temperature if scale_t2 else 1 / temperature
        with torch.cuda.device_of(student):
            kernel[(grid,)](
                student,
                teacher,
                grad if need_grad else None,
                labels.contiguous() if hard_term and labels is not None else None,
                row_scale,
                grad_scale if grad_scale.numel() else None,
                *parts,
                count,
                cols,
                inner,
                s_rows.outer,
                s_rows.step,
                t_rows.outer,
                t_rows.step,
                s_rows.shift,
                g_rows.shift,
                1 / temperature,
                hard_weight,
                soft_weight,
                temperature**2 if scale_t2 else 1.0,
                soft_weight * squared,
                label_smoothing,
                **constants,
                **_options(config),
            )
    if reduction != "none":
        for part, out in zip(parts, (loss, hard, soft), strict=True):
            torch.sum(part, 0, out=out)
    return outputs


def kd_bwd(grad: Tensor, grad_scale: Tensor, grad_output: Tensor) -> Tensor:
    """Grad times its row's factors, as a new tensor."""
    out = torch.empty_like(grad)
    scale(grad, out, grad_scale, grad_output)
    return out


def kd_bwd_(grad: Tensor, grad_scale: Tensor, grad_output: Tensor) -> None:
    """Grad times its row's factors, in place; where they are 1 nothing is read or written."""
    scale(grad, grad, grad_scale, grad_output)


_UNIFORM_COLS = 1 << 15
"""Elements that a program scales where one factor serves all rows."""


def scale(grad: Tensor, out: Tensor, grad_scale: Tensor, grad_output: Tensor) -> None:
    """Out = grad times its row's factors; a launcher that other rooms may use."""
    total = grad.numel()
    if total == 0:
        return
    per_row = grad_output.ndim > 0 and any(grad_output.stride())  # not expanded, as by .sum()
    scaled = grad_scale.numel() > 0
    cols = grad.shape[-1] if per_row or scaled else _UNIFORM_COLS
    count = -(-total // cols)
    double = grad.dtype is torch.float64
    vec = 1 if cols <= _NARROW_COLS else 16 // grad.element_size()
    config = _config(grad.device, double, _ANY, False)
    lanes = min(_power_of_two_at_least(-(-cols // vec)), config.block // vec)
    tile_rows = max(config.block // (lanes * vec), 1) if lanes * vec >= cols else 1
    shift = _shift(out, vec)
    with torch.cuda.device_of(grad):
        _kd_scale_kernel[(-(-count // tile_rows),)](
            grad,
            out,
            grad_scale if scaled else None,
            grad_output.contiguous() if per_row else grad_output,
            total,
            count,
            cols,
            shift,
            PER_ROW=per_row,
            IN_PLACE=out is grad,
            ENDS=shift != 0 or cols % vec != 0 or total % vec != 0,
            ALIGNED=_shift(grad, vec) == shift,
            DTYPE=tl.float64 if double else tl.float32,
            VEC=vec,
            ROWS=tile_rows,
            LANES=lanes,
            **_options(config),
        )
