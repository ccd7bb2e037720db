"""Rows of a strided [..., V] tensor in Triton: what the kernels of all rooms are made of.

How a row is read. Its classes are cut into vectors of VEC that begin at multiples of 16 bytes; the
up to VEC - 1 classes before the first and after the last vector are the row's ends, one small
tile. So accesses are 128 bits wide at every V (50257 begins each row at another offset), a vector
is masked as a whole, and one compiled kernel serves all V. Tiles are [.., LANES, VEC], a vector to
a thread: the online softmax reduces over VEC inside threads and keeps a state per lane, which meet
once, after the last block.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(math.log2(math.e))

ANY = 1 << 62
NARROW_COLS = 64
"""Rows up to this length are read element by element: their ends would be most of them."""


# ----------------------------------------------------------------------------------------------
# Inside a kernel. Arguments are tiles, or broadcast to one.


@triton.jit
def scalar(x, DTYPE: tl.constexpr):
    """An argument in the type of the arithmetic. It comes as float64; "float" is float32."""
    return tl.full((), x, DTYPE)


@triton.jit
def row_start(row, inner, outer, step, NESTED: tl.constexpr):
    """The element at which the int64 row begins; see fastdistill._layout."""
    if NESTED:
        start = (row // inner) * outer + (row % inner) * step
    else:
        start = row * step
    return start


@triton.jit
def head(start, shift, cols, VEC: tl.constexpr, ENDS: tl.constexpr):
    """How many classes lie before the row's first vector; `shift` is where element 0 lies in its
    own vector.
    """
    if ENDS:
        head = tl.minimum((-(start + shift)) & (VEC - 1), cols).to(tl.int32)
    else:
        head = (start * 0).to(tl.int32)
    return head


@triton.jit
def first_vector(ptr, at, ALIGNED: tl.constexpr, VEC: tl.constexpr):
    """The pointer to element `at`. The hint makes accesses from there 128 bits wide.

    It is on a value made here: on an argument it would be lost when the function is inlined.
    """
    ptr = ptr + at
    if ALIGNED and VEC > 1:
        if len(ptr.shape) == 0:
            ptr = tl.multiple_of(ptr, 16)
        else:
            ptr = tl.multiple_of(ptr, (16, 16, 16))
    return ptr


@triton.jit
def ends(head, vectors, cols, VEC: tl.constexpr):
    """(columns, mask) of the classes outside the row's vectors, as [1, 2 VEC]."""
    i = tl.arange(0, 2 * VEC)[None, :]
    column = tl.where(i < VEC, i, head + vectors * VEC + (i - VEC))
    return column, tl.where(i < VEC, i < head, column < cols)


@triton.jit
def load(ptr, mask, DTYPE: tl.constexpr):
    return tl.load(ptr, mask=mask, other=-float("inf")).to(DTYPE)


@triton.jit
def max_row(x):
    """Over the classes: [ROWS, LANES, VEC] to [ROWS, 1, 1], [LANES, VEC] to a scalar."""
    if len(x.shape) == 3:
        m = tl.max(tl.max(x, 2, keep_dims=True), 1, keep_dims=True)
    else:
        m = tl.max(tl.max(x, 1), 0)
    return m


@triton.jit
def sum_row(x):
    """As `max_row`."""
    if len(x.shape) == 3:
        a = tl.sum(tl.sum(x, 2, keep_dims=True), 1, keep_dims=True)
    else:
        a = tl.sum(tl.sum(x, 1), 0)
    return a


@triton.jit
def program_rows(ROWS: tl.constexpr):
    """This program's rows, int64: a scalar, or [ROWS, 1, 1].

    One row is not a tile of one: such tiles fold into scalars, and hints of rank 3 with them,
    which ends the compiler (Triton 3.7).
    """
    row = tl.program_id(0).to(tl.int64)
    if ROWS > 1:
        row = row * ROWS + tl.arange(0, ROWS)[:, None, None]
    return row


@triton.jit
def vectors(ROWS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """(lane, element) of each element of a tile, [LANES, VEC] or [ROWS, LANES, VEC]."""
    lane = tl.arange(0, LANES)[:, None]
    element = lane * VEC + tl.arange(0, VEC)[None, :]
    if ROWS > 1:
        lane = lane[None, :, :]
        element = element[None, :, :]
    return lane, element


@triton.jit
def longest(vectors):
    if len(vectors.shape) == 3:
        vectors = tl.max(vectors)
    return vectors


@triton.jit
def advance(x, m):
    """(new maximum of each lane, the same with 0 for -inf): -inf - -inf would be NaN."""
    m = tl.maximum(m, tl.max(x, 1))
    return m, tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def join_lanes(a, m_lanes, x, m, scale):
    """The row's sum from the lanes' sums `a` at maxima `m_lanes`, and from the ends `x`."""
    return tl.sum(a * tl.exp2((m_lanes - m) * scale), 0) + tl.sum(tl.exp2((x - m) * scale))


# ----------------------------------------------------------------------------------------------
# In a launcher.


class Config(NamedTuple):
    """How a forward kernel is launched."""

    cols: int  # the most classes it is for
    in_registers: bool  # whole rows, read once; or else in blocks
    block: int  # elements of a tile: of one block, or of all the rows of a program
    warps: int
    registers: int | None  # the most per thread, on NVIDIA
    reverse: bool = True  # also for reverse KL, which keeps more values alive


@cache
def architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return "sm_9"  # the interpreter
    if torch.version.hip:
        return "gfx9"
    major, _ = torch.cuda.get_device_capability(device)
    return f"sm_{min(max(major, 8), 10)}"


def options(config: Config) -> dict[str, Any]:
    options = {"num_warps": config.warps, "num_stages": 1, "enable_fp_fusion": True}
    if config.registers is not None:
        options["maxnreg"] = config.registers
    return options


def shift(x: Tensor, vec: int) -> int:
    """Where element 0 lies in its 16-byte vector of `vec` elements."""
    return x.data_ptr() // x.element_size() % vec


def power_of_two_at_least(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


class Begins(NamedTuple):
    """Where the rows of a tensor begin (fastdistill._layout), and element 0 in its vector."""

    outer: int
    step: int
    shift: int

    def like(self, other: Begins, vec: int) -> bool:
        """Each row's vectors begin at the same class as in `other`."""
        return all((a - b) % vec == 0 for a, b in zip(self, other, strict=True))


def begins(x: Tensor, outer: int, step: int, inner: int, count: int, vec: int) -> Begins:
    """A stride that is never taken may say anything: here it goes on from the other one, and a
    single row is followed by another of its length, as in the outputs.
    """
    if count == 1:
        step = x.shape[-1]
    return Begins(step * inner if inner == count else outer, step, shift(x, vec))
