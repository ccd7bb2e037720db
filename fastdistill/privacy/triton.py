"""Triton kernels of private releases and their launcher.

Two kernels for tensors of a kind: partial squares of the samples' norms, then the clipped sum with
its noise. Three for sums over teachers: one reads rows of up to NARROW elements once; of wider ones
the first finds each row's factor, the second adds the rows up. Every value of the noise and of a
softmax is the sequence of operations that reference.py specifies, without contraction
(`enable_fp_fusion=False`), so its bits are the same.

A row is read in vectors of VEC elements, 16 bytes, where all rows begin on such boundaries and end
there; element by element elsewhere.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.random import philox_impl

from fastdistill._triton import (
    architecture,
    first_vector,
    max_row,
    power_of_two_at_least,
    program_rows,
    sum_row,
    vectors,
)
from fastdistill.privacy import gpu, reference
from fastdistill.privacy.mechanism import EPS
from fastdistill.privacy.source import CHACHA20, PHILOX, counter

_LOG, _COS = tl.constexpr(reference.LOG), tl.constexpr(reference.COS)
_SIN = tl.constexpr(reference.SIN)
_LN2 = tl.constexpr(0.693147180559945309417)
_EXP, _ROUND = tl.constexpr(reference.EXP), tl.constexpr(1.5 * 2.0**52)
_LOG2E = tl.constexpr(1 / math.log(2))
_LN2_HIGH, _LN2_LOW = tl.constexpr(reference.LN2_HIGH), tl.constexpr(reference.LN2_LOW)
_EPS, _FIELDS = tl.constexpr(EPS), tl.constexpr(gpu.FIELDS)
_PHILOX, _CHACHA20 = tl.constexpr(PHILOX), tl.constexpr(CHACHA20)


# ----------------------------------------------------------------------------------------------
# Random words.


@triton.jit
def _rotate(x, LEFT: tl.constexpr):
    return (x << LEFT) | (x >> (32 - LEFT))


@triton.jit
def _quarter(a, b, c, d):
    a += b
    d = _rotate(d ^ a, 16)
    c += d
    b = _rotate(b ^ c, 12)
    a += b
    d = _rotate(d ^ a, 8)
    c += d
    b = _rotate(b ^ c, 7)
    return a, b, c, d


@triton.jit
def chacha20(k0, k1, k2, k3, k4, k5, k6, k7, c0, c1, c2, c3):
    """The block function (RFC 8439, 2.3) of tiles of counters: 16 tiles of words."""
    zero = c0 & 0
    x0, x1 = zero + 0x61707865, zero + 0x3320646E
    x2, x3 = zero + 0x79622D32, zero + 0x6B206574
    x4, x5, x6, x7 = zero + k0, zero + k1, zero + k2, zero + k3
    x8, x9, x10, x11 = zero + k4, zero + k5, zero + k6, zero + k7
    x12, x13, x14, x15 = c0, c1, c2, c3
    for _ in tl.static_range(10):
        x0, x4, x8, x12 = _quarter(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter(x3, x4, x9, x14)
    x0, x1, x2, x3 = x0 + 0x61707865, x1 + 0x3320646E, x2 + 0x79622D32, x3 + 0x6B206574
    x4, x5, x6, x7 = x4 + k0, x5 + k1, x6 + k2, x7 + k3
    x8, x9, x10, x11 = x8 + k4, x9 + k5, x10 + k6, x11 + k7
    x12, x13, x14, x15 = x12 + c0, x13 + c1, x14 + c2, x15 + c3
    return x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15


# ----------------------------------------------------------------------------------------------
# Noise.


@triton.jit
def _horner(x, COEFFICIENTS: tl.constexpr, DEGREE: tl.constexpr):
    y = tl.zeros_like(x) + COEFFICIENTS[DEGREE]
    for i in tl.static_range(DEGREE):
        y = y * x + COEFFICIENTS[DEGREE - 1 - i]
    return y


@triton.jit
def _box_muller(w0, w1, w2, w3):
    """As reference.box_muller, joined: [..., 2]."""
    u = w1.to(tl.float64) * 2.0**-32 + (w0.to(tl.float64) + 0.5) * 2.0**-64
    bits = u.to(tl.int64, bitcast=True)
    k = ((bits + (0x3FF0000000000000 - 0x3FE6A09E667F3BCD)) >> 52) - 1023
    m = (bits - (k << 52)).to(tl.float64, bitcast=True)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    log_m = (s + s) + s * (z * _horner(z, _LOG, 5))
    radius = tl.sqrt((k.to(tl.float64) * _LN2 + log_m) * -2.0)
    x = (w3 & 0x1FFFFFFF).to(tl.float64) * 2.0**-29 + (w2.to(tl.float64) + 0.5) * 2.0**-61
    y = x * x
    cosine = y * _horner(y, _COS, 5) + 1.0
    sine = x * _horner(y, _SIN, 6)
    swap = (w3 & 0x20000000) != 0
    a = tl.where(swap, sine, cosine)
    b = tl.where(swap, cosine, sine)
    a = tl.where((w3 & 0x80000000) != 0, -a, a)
    b = tl.where((w3 & 0x40000000) != 0, -b, b)
    return tl.join(radius * a, radius * b)


@triton.jit
def _normals(
    first_block, k0, k1, k2, k3, k4, k5, k6, k7, c1, c2, c3,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK standard normals of a parameter, in order: those from block `first_block` on."""
    EACH: tl.constexpr = 2 if KIND == _PHILOX else 8  # normals of a block
    block = first_block + tl.arange(0, BLOCK // EACH)
    c0 = block.to(tl.uint32)
    c1 = (block >> 32).to(tl.uint32) + c1
    c2, c3 = (c0 & 0) + c2, (c0 & 0) + c3
    if KIND == _PHILOX:
        w0, w1, w2, w3 = philox_impl(c0, c1, c2, c3, k0, k1)
        pairs = tl.reshape(_box_muller(w0, w1, w2, w3), (BLOCK // 32, 16, 2))
        z = tl.permute(pairs, (0, 2, 1))
    else:
        x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = chacha20(
            k0, k1, k2, k3, k4, k5, k6, k7, c0, c1, c2, c3
        )
        even = tl.join(_box_muller(x0, x1, x2, x3), _box_muller(x8, x9, x10, x11))
        odd = tl.join(_box_muller(x4, x5, x6, x7), _box_muller(x12, x13, x14, x15))
        # [group, lane, half, quarter's high bit, low bit]
        pairs = tl.reshape(tl.join(even, odd), (BLOCK // 128, 16, 2, 2, 2))
        z = tl.permute(pairs, (0, 3, 4, 2, 1))
    return tl.reshape(z, (BLOCK,))


@triton.jit
def _on_grid(x, magic):
    """As reference.on_grid; `magic` is 1.5 2^52 times the grid."""
    return x + magic - magic


# ----------------------------------------------------------------------------------------------
# Kernels.


@triton.jit
def _entry(table_ptr, of_chunk_ptr, chunk):
    """The fields (gpu.Tensors.table) of the tensor that a chunk of the launch is of."""
    return table_ptr + tl.load(of_chunk_ptr + chunk) * _FIELDS


@triton.jit(do_not_specialize=["size", "x_step", "chunks", "square_step", "first"])
def _square_kernel(
    x_ptr,  # [samples, size], x_step apart; if there is a table, of the element type of all in it
    table_ptr, of_chunk_ptr,  # of several tensors, or None
    square_ptr,  # float64 [samples, square_step]: those of this tensor from column `first` on
    size, x_step, chunks, square_step, first,
    unit: tl.float64,
    STEPS: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The sum of (x unit)^2 over one chunk of one sample: STEPS blocks of LANES VEC elements."""
    program = tl.program_id(0).to(tl.int64)
    sample, chunk = program // chunks, program % chunks
    square_ptr += sample * square_step + first + chunk
    if table_ptr is not None:
        entry = _entry(table_ptr, of_chunk_ptr, chunk)
        x_ptr = tl.load(entry).to(x_ptr.dtype)
        size, x_step = tl.load(entry + 1), tl.load(entry + 2)
        chunk -= tl.load(entry + 3)
    lane, offset = vectors(1, LANES, VEC)
    begin = chunk * (STEPS * LANES)  # in vectors, as `end`
    end = tl.minimum(begin + STEPS * LANES, size // VEC)
    total = tl.zeros((LANES, VEC), tl.float64)
    row = first_vector(x_ptr, sample * x_step, True, VEC)
    for at in range(begin, end, LANES):
        x = tl.load(row + (at * VEC + offset), mask=at + lane < end, other=0.0).to(tl.float64)
        x *= unit
        total += x * x
    tl.store(square_ptr, tl.sum(tl.sum(total, 1), 0))


@triton.jit(
    do_not_specialize=[
        "size", "samples", "x_step", "k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7", "c1", "c2",
        "c3",
    ]
)  # fmt: skip
def _release_kernel(
    x_ptr, table_ptr, of_chunk_ptr,  # as above
    factor_ptr,  # float64 [samples]: 0 for one that is not finite
    out_ptr,  # [size]
    size, samples, x_step,
    k0: tl.uint32, k1: tl.uint32, k2: tl.uint32, k3: tl.uint32, k4: tl.uint32, k5: tl.uint32,
    k6: tl.uint32, k7: tl.uint32,  # the key; a value of it must not select another compiled kernel
    c1: tl.uint32, c2: tl.uint32, c3: tl.uint32,  # words of the counter
    fine: tl.float64, grid: tl.float64,  # see _on_grid; of a sample's part, of the sum
    scale: tl.float64, inverse: tl.float64,
    KIND: tl.constexpr, EMPTY: tl.constexpr,
    UNROLL: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """LANES VEC elements: the sum of the clipped samples on its grid, and noise."""
    program = tl.program_id(0).to(tl.int64)
    if table_ptr is not None:
        entry = _entry(table_ptr, of_chunk_ptr, program)
        x_ptr = tl.load(entry).to(x_ptr.dtype)
        size, x_step = tl.load(entry + 1), tl.load(entry + 2)
        program -= tl.load(entry + 3)
        out_ptr = tl.load(entry + 4).to(out_ptr.dtype)
        c1 = tl.load(entry + 5)
    lane, offset = vectors(1, LANES, VEC)
    count = size // VEC
    inside = program * LANES + lane < count
    start = program * (LANES * VEC)
    total = tl.zeros((LANES, VEC), tl.float64)
    if not EMPTY:
        for first in range(0, samples, UNROLL):
            for i in tl.static_range(UNROLL):
                sample = program * 0 + (first + i)  # int64
                there = sample < samples
                factor = tl.load(factor_ptr + sample, mask=there, other=0.0)
                at = first_vector(x_ptr, start + sample * x_step, True, VEC) + offset
                x = tl.load(at, mask=tl.where(there, inside, False), other=0.0).to(tl.float64)
                # A sample that is not finite is left out by a select: 0 times NaN is NaN.
                total += tl.where(factor != 0.0, _on_grid(x * factor, fine), 0.0)
    total = _on_grid(total, grid)
    if KIND != 0:
        # They are already, but under the interpreter.
        k0, k1, k2, k3 = k0.to(tl.uint32), k1.to(tl.uint32), k2.to(tl.uint32), k3.to(tl.uint32)
        k4, k5, k6, k7 = k4.to(tl.uint32), k5.to(tl.uint32), k6.to(tl.uint32), k7.to(tl.uint32)
        c1, c2, c3 = c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32)
        EACH: tl.constexpr = 2 if KIND == _PHILOX else 8
        z = _normals(
            program * (LANES * VEC // EACH), k0, k1, k2, k3, k4, k5, k6, k7, c1, c2, c3,
            KIND, LANES * VEC,
        )  # fmt: skip
        total += tl.reshape(_on_grid(z * scale, grid), (LANES, VEC))
    y = (total * inverse).to(out_ptr.dtype.element_ty)
    tl.store(first_vector(out_ptr, start, True, VEC) + offset, y, mask=inside)


# ----------------------------------------------------------------------------------------------
# Sums over teachers, row by row.


@triton.jit
def _exponential(x):
    """As reference.exponential."""
    shifted = x * _LOG2E + _ROUND
    k = shifted - _ROUND
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    power = (shifted.to(tl.int64, bitcast=True) << 52) + 0x3FF0000000000000
    return (((r * r) * _horner(r, _EXP, 9) + r) + 1.0) * power.to(tl.float64, bitcast=True)


@triton.jit
def _weight(x, highest, inverse, exponentials):
    """The exponentials of a softmax, on their grid."""
    return _on_grid(_exponential(tl.maximum((x - highest) * inverse, -708.0)), exponentials)


@triton.jit
def _clip_factor(square, clip, unit):
    """Of a row whose sum of (x unit)^2 that is; 0 where it is not finite."""
    norm = tl.sqrt(square) / unit
    return tl.where(norm < float("inf"), tl.minimum(clip / (norm + _EPS), 1.0), 0.0)


@triton.jit
def _row_of(table_ptr, teacher, start, ELEMENT: tl.constexpr, VEC: tl.constexpr):
    """The pointer to element `start` of a teacher."""
    address = tl.load(table_ptr + teacher)
    return first_vector(address.to(tl.pointer_type(ELEMENT)), start, True, VEC)


@triton.jit
def _load(at, inside):
    return tl.load(at, mask=inside, other=0.0).to(tl.float64)


@triton.jit(do_not_specialize=["rows", "cols", "teachers", "x_step"])
def _narrow_rows_kernel(
    table_ptr,  # int64 [teachers]: addresses of [rows, cols], x_step apart
    sum_ptr,  # float64 [rows, cols]
    rows, cols, teachers, x_step,
    inverse: tl.float64, exponentials: tl.float64,  # 1 / T; see _on_grid
    clip: tl.float64, unit: tl.float64, fine: tl.float64,
    ELEMENT: tl.constexpr, SOFTMAX: tl.constexpr,
    ROWS: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the sum, LANES VEC elements at most, of one teacher after the other."""
    row = program_rows(ROWS)
    lane, offset = vectors(ROWS, LANES, VEC)
    count = cols // VEC
    inside = (row < rows) & (lane < count)
    total = tl.zeros((ROWS, LANES, VEC), tl.float64)
    for teacher in range(0, teachers, 1):
        at = _row_of(table_ptr, teacher, row * x_step, ELEMENT, VEC) + offset
        x = _load(at, inside)
        if SOFTMAX:
            finite = sum_row(x * 0.0) == 0.0
            highest = max_row(tl.where(inside, x, -float("inf")))
            x = tl.where(inside, _weight(x, highest, inverse, exponentials), 0.0)
            factor = tl.where(finite, clip / sum_row(x), 0.0)
        else:
            factor = _clip_factor(sum_row((x * unit) * (x * unit)), clip, unit)
        # A row that is not finite is left out by a select: 0 times NaN is NaN.
        total += tl.where(factor != 0.0, _on_grid(x * factor, fine), 0.0)
    tl.store(first_vector(sum_ptr, row * cols, True, VEC) + offset, total, mask=inside)


@triton.jit(do_not_specialize=["cols", "teachers", "x_step"])
def _row_factor_kernel(
    table_ptr,  # as above
    highest_ptr,  # float64 [rows, teachers], of a softmax
    factor_ptr,  # float64 [rows, teachers]: 0 for a row that is not finite
    cols, teachers, x_step,
    inverse: tl.float64, exponentials: tl.float64, clip: tl.float64, unit: tl.float64,
    ELEMENT: tl.constexpr, SOFTMAX: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """What a row of one teacher is multiplied with, LANES VEC elements at a time."""
    program = tl.program_id(0).to(tl.int64)
    lane, offset = vectors(1, LANES, VEC)
    row = _row_of(table_ptr, program % teachers, program // teachers * x_step, ELEMENT, VEC)
    count = cols // VEC
    total = tl.zeros((LANES, VEC), tl.float64)
    if SOFTMAX:
        highest = tl.full((LANES, VEC), -float("inf"), tl.float64)
        finite = tl.zeros((LANES, VEC), tl.float64)
        for at in range(0, count, LANES):
            inside = at + lane < count
            x = _load(row + (at * VEC + offset), inside)
            highest = tl.maximum(highest, tl.where(inside, x, -float("inf")))
            finite += x * 0.0  # NaN where x is not
        top = max_row(highest)
        for at in range(0, count, LANES):
            inside = at + lane < count
            x = _load(row + (at * VEC + offset), inside)
            total += tl.where(inside, _weight(x, top, inverse, exponentials), 0.0)
        factor = tl.where(sum_row(finite) == 0.0, clip / sum_row(total), 0.0)
        tl.store(highest_ptr + program, top)
    else:
        for at in range(0, count, LANES):
            inside = at + lane < count
            x = _load(row + (at * VEC + offset), inside) * unit
            total += x * x
        factor = _clip_factor(sum_row(total), clip, unit)
    tl.store(factor_ptr + program, factor)


@triton.jit(do_not_specialize=["cols", "teachers", "x_step", "chunks"])
def _row_sum_kernel(
    table_ptr, highest_ptr, factor_ptr,  # as above
    sum_ptr,  # float64 [rows, cols]
    cols, teachers, x_step, chunks,
    inverse: tl.float64, exponentials: tl.float64, fine: tl.float64,
    ELEMENT: tl.constexpr, SOFTMAX: tl.constexpr,
    UNROLL: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """LANES VEC elements of a row of the sum."""
    program = tl.program_id(0).to(tl.int64)
    row, start = program // chunks, program % chunks * (LANES * VEC)
    lane, offset = vectors(1, LANES, VEC)
    inside = start + lane * VEC < cols
    total = tl.zeros((LANES, VEC), tl.float64)
    for first in range(0, teachers, UNROLL):
        for i in tl.static_range(UNROLL):
            teacher = tl.minimum(first + i, teachers - 1)
            of_row = row * teachers + teacher
            factor = tl.load(factor_ptr + of_row)
            at = _row_of(table_ptr, teacher, row * x_step + start, ELEMENT, VEC) + offset
            x = _load(at, inside)
            if SOFTMAX:
                x = _weight(x, tl.load(highest_ptr + of_row), inverse, exponentials)
            kept = (factor != 0.0) & (first + i < teachers)
            total += tl.where(kept, _on_grid(x * factor, fine), 0.0)
    at = first_vector(sum_ptr, row * cols + start, True, VEC) + offset
    tl.store(at, total, mask=inside)


# ----------------------------------------------------------------------------------------------
# The launcher.

_SQUARE_BLOCK, _SQUARE_STEPS = 2048, 4
_RELEASE_BLOCK = 1024  # whole groups of noise
_ROW_BLOCK = 1024
_UNROLL = 4
NARROW = _ROW_BLOCK // 2
"""Elements of a row up to which a program has at least two whole rows."""

_ELEMENTS = {
    torch.float32: tl.float32, torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
}  # fmt: skip


@cache
def _options(device: torch.device, fused: bool, registers: int | None = None) -> dict[str, Any]:
    options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": fused}
    if architecture(device) == "gfx9":
        return {**options, "num_warps": 2}  # of 64 lanes
    return options if registers is None else {**options, "maxnreg": registers}


def _table(of: gpu.Tensors, chunk: int) -> tuple[Tensor | None, Tensor | None]:
    """None for one tensor, whose addresses triton-viz can follow: those in a table it cannot."""
    return of.table(chunk) if len(of.x) > 1 else (None, None)


def _square(of: gpu.Tensors, unit: float, squares: Tensor, first: int) -> None:
    x, chunk = of.x[0], _SQUARE_BLOCK * _SQUARE_STEPS
    chunks = sum(of.columns(chunk))
    with torch.cuda.device_of(x):
        _square_kernel[(len(squares) * chunks,)](
            x, *_table(of, chunk), squares,
            x.shape[1], x.stride(0), chunks, squares.shape[1], first, unit,
            STEPS=_SQUARE_STEPS, VEC=of.vector, LANES=_SQUARE_BLOCK // of.vector,
            **_options(x.device, True),
        )  # fmt: skip


def _release(of: gpu.Tensors, factors: Tensor, numbers: gpu.Numbers) -> None:
    x, empty, bits = of.x[0], len(factors) == 0, numbers.bits
    with torch.cuda.device_of(x):
        _release_kernel[(sum(of.columns(_RELEASE_BLOCK)),)](
            x, *_table(of, _RELEASE_BLOCK), factors, of.out[0],
            x.shape[1], len(factors), x.stride(0),
            *bits.key.tolist(), of.counters[0], *counter(bits, 0)[1:],
            numbers.fine, numbers.grid, numbers.scale, numbers.inverse,
            KIND=bits.kind, EMPTY=empty,
            UNROLL=_UNROLL, VEC=of.vector, LANES=_RELEASE_BLOCK // of.vector,
            # For noise alone ptxas (of Triton 3.9) spills for the sake of 72 registers.
            **_options(x.device, False, 96 if empty else None),
        )  # fmt: skip


def _sum_rows(of: gpu.Rows) -> None:
    x, cols = of.teachers[0], of.sums.shape[1]
    vec = gpu.vector(*of.teachers)
    sizes = (cols, len(of.teachers), x.stride(0))
    numbers = (of.inverse_temperature, of.exponentials, of.clip, of.unit, of.fine)
    kind = {"ELEMENT": _ELEMENTS[x.dtype], "SOFTMAX": of.inverse_temperature != 0, "VEC": vec}
    with torch.cuda.device_of(x):
        if cols <= NARROW:
            lanes = max(power_of_two_at_least(cols) // vec, 1)
            rows = _ROW_BLOCK // (lanes * vec)
            _narrow_rows_kernel[(triton.cdiv(len(of.sums), rows),)](
                of.table, of.sums, len(of.sums), *sizes, *numbers,
                **kind, ROWS=rows, LANES=lanes,
                **_options(x.device, False, 128),  # ptxas spills for the sake of 80
            )  # fmt: skip
            return
        highest, factors = of.scratch()
        chunks, lanes = triton.cdiv(cols, _ROW_BLOCK), _ROW_BLOCK // vec
        _row_factor_kernel[(factors.numel(),)](
            of.table, highest, factors, *sizes, *numbers[:4],
            **kind, LANES=lanes, **_options(x.device, False, 96),  # of Triton 3.6, 64
        )  # fmt: skip
        _row_sum_kernel[(len(of.sums) * chunks,)](
            of.table, highest, factors, of.sums, *sizes, chunks, *numbers[:2], of.fine,
            **kind, UNROLL=_UNROLL, LANES=lanes, **_options(x.device, False),
        )  # fmt: skip


_kernels = gpu.Kernels(_SQUARE_BLOCK * _SQUARE_STEPS, _square, _release, _sum_rows)
clip_and_noise, add_noise_ = _kernels.clip_and_noise, _kernels.add_noise_
noisy_softmax_sum, noisy_gradient_sum = _kernels.noisy_softmax_sum, _kernels.noisy_gradient_sum
