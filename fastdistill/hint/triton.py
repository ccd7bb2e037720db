"""Triton kernels of `hint_loss` and their launchers.

`_project_kernel` is the projection with the distance as its epilogue: a tile of F_S W' never leaves
the registers; what is written is its residual, in the input's type, and one partial sum of each of
its rows. It serves the distances that are a sum over features. Those that need a row first, and
the distance alone, take `_rows_kernel`, after a library product where there is a weight.

No atomics: a row's distance is the sum of its tiles' parts, always in one order.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistill._triton import architecture
from fastdistill.hint import gpu
from fastdistill.kd import triton as kd_triton

MSE = tl.constexpr(0)
L1 = tl.constexpr(1)
SMOOTH_L1 = tl.constexpr(2)
COSINE = tl.constexpr(3)
_DISTANCES = {"mse": 0, "l1": 1, "smooth_l1": 2, "cosine": 3}

PLAIN = tl.constexpr(0)
LAYER_NORM = tl.constexpr(1)
L2 = tl.constexpr(2)
_NORMS = {"none": 0, "layer_norm": 1, "l2": 2}

LAYER_NORM_EPS = tl.constexpr(1e-5)
L2_EPS = tl.constexpr(1e-12)
COSINE_EPS = tl.constexpr(1e-8)
"""The defaults of torch's F.layer_norm, F.normalize and F.cosine_similarity."""


@triton.jit
def _multiple(n, OF: tl.constexpr, ALIGNED: tl.constexpr):
    """The size or stride n, known to the compiler as a multiple of OF where it is one.

    A hint on an argument itself is lost (Triton 3.6 to 3.9).
    """
    if ALIGNED and OF > 1:
        n = tl.multiple_of(n // OF * OF, OF)
    return n


@triton.jit
def _by_element(d, DISTANCE: tl.constexpr):
    """(part of the distance, its derivative) of differences d; a NaN stays one."""
    size = tl.abs(d)
    sign = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
    if DISTANCE == MSE:
        part = d * d
        slope = d + d
    elif DISTANCE == L1:
        part = size
        slope = sign
    else:
        near = size < 1.0
        part = tl.where(near, 0.5 * d * d, size - 0.5)
        slope = tl.where(near, d, sign)
    return part, slope


@triton.jit
def _side(square, cols, NORM: tl.constexpr):
    """Of a row with this sum of squares: (factor that normalises it, whether that is a constant,
    factor that makes the normalised row a unit vector, whether that is one, its length's square).
    """
    factor = tl.full((), 1.0, square.dtype)  # whatever the square: a side as it is has no norm
    clamped = square < 0.0
    if NORM == LAYER_NORM:
        factor = 1.0 / tl.sqrt(square / cols + LAYER_NORM_EPS)
    elif NORM == L2:
        size = tl.sqrt(square)
        clamped = size < L2_EPS
        factor = 1.0 / tl.where(clamped, L2_EPS, size)
    length = tl.sqrt(square) * factor
    short = length < COSINE_EPS
    unit = 1.0 / tl.where(short, COSINE_EPS, length)
    return factor, clamped, unit, short, length * length


@triton.jit
def _apart(y, z, a, b):
    """The difference of two unit vectors, y a - z b: of vectors of about one length formed by
    differencing first, which is 0 where they are equal and does not round products that cancel.
    """
    near = (a <= 2.0 * b) & (b <= 2.0 * a)
    return tl.where(near, (y - z) * a + z * (a - b), y * a - z * b)


@triton.jit
def _slope(y, z, s_unit, t_unit, along_unit, DISTANCE: tl.constexpr):
    """The derivative of the distance in the student's normalised features y."""
    if DISTANCE == COSINE:
        u = s_unit * (_apart(y, z, s_unit, t_unit) - along_unit * (y * s_unit))
    else:
        part, u = _by_element(y - z, DISTANCE)
    return u


@triton.jit
def _pair(s_ptr, t_ptr, bias_ptr, column, inside, DTYPE: tl.constexpr):
    """The features of one block of a row, student (with its bias) and teacher; 0 outside."""
    x = tl.load(s_ptr + column, mask=inside, other=0.0).to(DTYPE)
    t = tl.load(t_ptr + column, mask=inside, other=0.0).to(DTYPE)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + column, mask=inside, other=0.0).to(DTYPE)
    return x, t


@triton.jit(do_not_specialize=["s_step", "t_step", "cols"])
def _rows_kernel(
    s_ptr,  # [rows, cols], rows s_step apart
    t_ptr,  # [rows, cols], rows t_step apart
    bias_ptr,  # [cols], or None
    factor_ptr,  # [rows]: of the gradient; 0 drops the row
    g_ptr,  # [rows, cols] contiguous, or None
    loss_ptr,  # [rows]: the distance, no factor in it
    s_step, t_step, cols,
    DISTANCE: tl.constexpr, S_NORM: tl.constexpr, T_NORM: tl.constexpr,
    ALIGNED: tl.constexpr,  # all rows begin on 16 bytes: wide accesses
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row; all passes but the first come from the caches."""
    s_step = _multiple(s_step, 16, ALIGNED)
    t_step = _multiple(t_step, 16, ALIGNED)
    cols = _multiple(cols, 16, ALIGNED)
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr + row).to(DTYPE)
    lane = tl.arange(0, BLOCK)
    s_ptr += row * s_step
    t_ptr += row * t_step
    if factor == 0.0:
        tl.store(loss_ptr + row, 0.0)
        if g_ptr is not None:
            for first in range(0, cols, BLOCK):
                tl.store(g_ptr + row * cols + first + lane, 0.0, first + lane < cols)
    else:
        s_mean = tl.full((), 0.0, DTYPE)
        t_mean = tl.full((), 0.0, DTYPE)
        if S_NORM == LAYER_NORM or T_NORM == LAYER_NORM:
            s_sum = tl.zeros((BLOCK,), DTYPE)
            t_sum = tl.zeros((BLOCK,), DTYPE)
            for first in range(0, cols, BLOCK):
                column = first + lane
                x, t = _pair(s_ptr, t_ptr, bias_ptr, column, column < cols, DTYPE)
                s_sum += x
                t_sum += t
            if S_NORM == LAYER_NORM:
                s_mean = tl.sum(s_sum) / cols
            if T_NORM == LAYER_NORM:
                t_mean = tl.sum(t_sum) / cols
        s_square = tl.full((), 0.0, DTYPE)
        t_square = tl.full((), 0.0, DTYPE)
        if DISTANCE == COSINE or S_NORM != PLAIN or T_NORM != PLAIN:
            s_sum = tl.zeros((BLOCK,), DTYPE)
            t_sum = tl.zeros((BLOCK,), DTYPE)
            for first in range(0, cols, BLOCK):
                column = first + lane
                x, t = _pair(s_ptr, t_ptr, bias_ptr, column, column < cols, DTYPE)
                x = tl.where(column < cols, x - s_mean, 0.0)
                t = tl.where(column < cols, t - t_mean, 0.0)
                s_sum += x * x
                t_sum += t * t
            s_square = tl.sum(s_sum)
            t_square = tl.sum(t_sum)
        s_factor, s_clamped, s_unit, s_short, s_size = _side(s_square, cols, S_NORM)
        t_factor, t_clamped, t_unit, t_short, t_size = _side(t_square, cols, T_NORM)

        if DISTANCE == COSINE:
            rate = factor
        else:
            rate = factor / cols
        parts = tl.zeros((BLOCK,), DTYPE)
        for first in range(0, cols, BLOCK):
            column = first + lane
            inside = column < cols
            x, t = _pair(s_ptr, t_ptr, bias_ptr, column, inside, DTYPE)
            y = (x - s_mean) * s_factor
            z = (t - t_mean) * t_factor
            if DISTANCE == COSINE:
                d = _apart(y, z, s_unit, t_unit)
                parts += tl.where(inside, d * d, 0.0)
            else:
                part, slope = _by_element(y - z, DISTANCE)
                parts += tl.where(inside, part, 0.0)
                if g_ptr is not None and S_NORM == PLAIN:
                    g = (rate * slope).to(g_ptr.dtype.element_ty)
                    tl.store(g_ptr + row * cols + column, g, inside)
        distance = tl.sum(parts)
        if DISTANCE == COSINE:
            distance *= 0.5
            distance += tl.where(s_short, 0.5 - 0.5 * s_size * s_unit * s_unit, 0.0)
            distance += tl.where(t_short, 0.5 - 0.5 * t_size * t_unit * t_unit, 0.0)
        else:
            distance /= cols
        tl.store(loss_ptr + row, distance)

        if g_ptr is not None and (DISTANCE == COSINE or S_NORM != PLAIN):
            along_unit = tl.where(s_short, 1.0, distance)
            mean = tl.full((), 0.0, DTYPE)
            along = tl.full((), 0.0, DTYPE)
            if S_NORM != PLAIN:
                u_sum = tl.zeros((BLOCK,), DTYPE)
                uy_sum = tl.zeros((BLOCK,), DTYPE)
                for first in range(0, cols, BLOCK):
                    column = first + lane
                    inside = column < cols
                    x, t = _pair(s_ptr, t_ptr, bias_ptr, column, inside, DTYPE)
                    y = (x - s_mean) * s_factor
                    z = (t - t_mean) * t_factor
                    u = _slope(y, z, s_unit, t_unit, along_unit, DISTANCE)
                    u = tl.where(inside, u, 0.0)
                    u_sum += u
                    uy_sum += u * y
                along = tl.sum(uy_sum)
                if S_NORM == LAYER_NORM:
                    mean = tl.sum(u_sum) / cols
                    along = along / cols
                along = tl.where(s_clamped, 0.0, along)
            for first in range(0, cols, BLOCK):
                column = first + lane
                inside = column < cols
                x, t = _pair(s_ptr, t_ptr, bias_ptr, column, inside, DTYPE)
                y = (x - s_mean) * s_factor
                z = (t - t_mean) * t_factor
                u = _slope(y, z, s_unit, t_unit, along_unit, DISTANCE)
                g = rate * s_factor * ((u - mean) - y * along)
                tl.store(g_ptr + row * cols + column, g.to(g_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows", "features", "narrow", "x_step", "t_step"])
def _project_kernel(
    x_ptr,  # student [rows, narrow], rows x_step apart
    w_ptr,  # weight [features, narrow], contiguous
    bias_ptr,  # [features], or None
    t_ptr,  # teacher [rows, features], rows t_step apart
    factor_ptr,  # [rows]: of the gradient; 0 drops the row
    r_ptr,  # residual [rows, features] contiguous, or None
    part_ptr,  # [tiles, rows]: a tile's part of each row's distance
    rows, features, narrow, x_step, t_step,
    DISTANCE: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,  # all rows begin on 16 bytes: wide accesses
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of the projection, and its distance."""
    features = _multiple(features, 16, ALIGNED)
    narrow = _multiple(narrow, 16, ALIGNED)
    x_step = _multiple(x_step, 16, ALIGNED)
    t_step = _multiple(t_step, 16, ALIGNED)
    tile = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    valid = row < rows
    factor = tl.load(factor_ptr + row, mask=valid, other=0.0)
    kept = factor != 0.0  # a dropped row is not read
    x_at = x_ptr + row[:, None] * x_step + k[None, :]
    w_at = w_ptr + column.to(tl.int64)[None, :] * narrow + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, narrow, BLOCK_K):
        left = k < narrow - first
        x = tl.load(x_at, mask=kept[:, None] & left[None, :], other=0.0)
        w = tl.load(w_at, mask=left[:, None] & (column < features)[None, :], other=0.0)
        total = tl.dot(x, w, total, input_precision=PRECISION)
        x_at += BLOCK_K
        w_at += BLOCK_K
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, mask=column < features, other=0.0)[None, :]
    inside = kept[:, None] & (column < features)[None, :]
    t = tl.load(t_ptr + row[:, None] * t_step + column[None, :], mask=inside, other=0.0)
    part, slope = _by_element(total - t.to(tl.float32), DISTANCE)
    part = tl.sum(tl.where(inside, part, 0.0), 1)
    tl.store(part_ptr + tile.to(tl.int64) * rows + row, part, mask=valid)
    if r_ptr is not None:
        residual = tl.where(inside, slope * (factor / features)[:, None], 0.0)
        at = r_ptr + row[:, None] * features + column[None, :]
        residual = residual.to(r_ptr.dtype.element_ty)
        tl.store(at, residual, mask=valid[:, None] & (column < features)[None, :])


_BLOCK_COLS = 1024
_TILES = {
    "dot": {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
    "fma": {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2},
}
"""Of the projection, on tensor cores and, for exact float32 products, without them. Found by
compiling ahead of time without spills; no GPU has timed them yet."""


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
    rows, cols = student.shape
    if rows == 0:
        return
    block = min(_BLOCK_COLS, max(triton.next_power_of_2(cols), 32))
    # Left to itself ptxas spills for the sake of 32 registers.
    options = {"num_warps": 4, "maxnreg": 128}
    if architecture(student.device) == "gfx9":  # 64 lanes to a warp
        options = {"num_warps": 2}
    with torch.cuda.device_of(student):
        _rows_kernel[(rows,)](
            student, teacher, bias, factors, grad, loss, student.stride(0), teacher.stride(0),
            cols, DISTANCE=_DISTANCES[distance], S_NORM=_NORMS[student_norm],
            T_NORM=_NORMS[teacher_norm],
            ALIGNED=all(n % 16 == 0 for n in (student.stride(0), teacher.stride(0), cols)),
            DTYPE=tl.float64 if loss.dtype is torch.float64 else tl.float32, BLOCK=block,
            num_stages=1, **options,
        )  # fmt: skip


def _project(
    distance: str,
    student: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    factors: Tensor,
    residual: Tensor | None,
    loss: Tensor,
) -> None:
    """The projection with its epilogue (`gpu.Epilogue`)."""
    rows, narrow = student.shape
    features = weight.shape[0]
    tf32 = torch.backends.cuda.matmul.allow_tf32
    tile = _TILES["fma" if student.dtype is torch.float32 and not tf32 else "dot"]
    tiles = triton.cdiv(features, tile["BLOCK_N"])
    parts = torch.empty((tiles, rows), dtype=torch.float32, device=student.device)
    steps = (features, narrow, student.stride(0), teacher.stride(0))
    aligned = all(n % 16 == 0 for n in steps)
    if student.dtype is torch.float32 and not aligned:
        tile = {**tile, "num_warps": 8}  # the addresses of narrow accesses would spill
    with torch.cuda.device_of(student):
        _project_kernel[(triton.cdiv(rows, tile["BLOCK_M"]), tiles)](
            student, weight.contiguous(), bias, teacher, factors, residual, parts, rows, features,
            narrow, student.stride(0), teacher.stride(0), DISTANCE=_DISTANCES[distance],
            PRECISION="tf32" if tf32 else "ieee", ALIGNED=aligned, **tile,
        )  # fmt: skip
    torch.div(parts.sum(0), features, out=loss)


def _kernels(
    distance: str, student_norm: str, teacher_norm: str, student: Tensor, teacher: Tensor
) -> tuple[gpu.RowKernel, gpu.Epilogue | None]:
    """The row kernel of a call, and the projection's where the distance can be its epilogue."""
    rows = functools.partial(_rows, distance, student_norm, teacher_norm)
    plain = distance != "cosine" and student_norm == teacher_norm == "none"
    if not plain or torch.float64 in (student.dtype, teacher.dtype):
        return rows, None
    return rows, functools.partial(_project, distance)


def _scale(grad: Tensor, out: Tensor, grad_scale: Tensor, grad_output: Tensor) -> None:
    """Out = grad times a number on the device; a factor of 1 in place touches nothing."""
    factor = grad_output * grad_scale.view(()) if grad_scale.numel() else grad_output
    kd_triton.scale(grad, out, grad.new_empty(0), factor)


_launcher = gpu.Launcher(_kernels, _scale)
hint_fwd, hint_grad = _launcher.hint_fwd, _launcher.hint_grad
hint_bwd, hint_bwd_ = _launcher.hint_bwd, _launcher.hint_bwd_
