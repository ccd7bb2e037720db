"""The passes of the GPU launchers over a backend's two kernels, one launch each for a tensor.

Nothing synchronises. The second pass reads a sample's factor, not its norm, so that both backends
share what lies between: the norms, in float64 and in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdistill.privacy import ops
from fastdistill.privacy.mechanism import EPS
from fastdistill.privacy.source import GRADIENT_NOISE, Source, counter

_MAGIC = 1.5 * 2.0**52


class Numbers(NamedTuple):
    """What the second pass is given beside tensors."""

    kind: int
    key: Tensor  # 8 words, on the CPU; a tensor, so that no traceback prints it
    counter: tuple[int, int, int]  # of the parameter
    fine: float  # 1.5 2^52 times the grids
    grid: float
    scale: float
    inverse: float


class Kernels(NamedTuple):
    """A backend's kernels; x is [samples, size], its rows dense."""

    chunk: int  # elements of a partial sum
    square: Callable[[Tensor, float, Tensor, int, int, Tensor], None]
    """(x, unit, squares [samples, all chunks], the first of x's columns, their number, out)"""
    release: Callable[[Tensor, Tensor, Tensor, Numbers], None]
    """(x, factors [samples], out [size], numbers)"""


def _rows(x: Tensor) -> Tensor:
    """[samples, size], without a copy where each sample is dense."""
    rows = x.reshape(x.shape[0], x.shape[1:].numel())
    return rows if rows.shape[1] <= 1 or rows.stride(1) == 1 else rows.contiguous()


def clip_and_noise(
    kernels: Kernels,
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
    """The op `fastdistill::clip_and_noise` by two kernels."""
    released = ops.allocate(grad_samples)
    rows = [_rows(x) for x in grad_samples]
    samples = rows[0].shape[0]
    chunks = [-(-x.shape[1] // kernels.chunk) for x in rows]
    squares = torch.empty((samples, sum(chunks)), dtype=torch.float64, device=rows[0].device)
    first = 0
    for x, n, y in zip(rows, chunks, released, strict=True):
        if samples and n:
            kernels.square(x, unit, squares, first, n, y)
        first += n
    norm = squares.sum(1).sqrt() / unit
    factors = torch.where(norm.isfinite(), (clip / (norm + EPS)).clamp(max=1), 0.0)
    numbers = Numbers(kind, key, (0, 0, 0), _MAGIC * fine, _MAGIC * grid, scale, inverse)
    for parameter, (x, y) in enumerate(zip(rows, released, strict=True)):
        if y.numel():
            words = counter(Source(kind, key, stream), GRADIENT_NOISE, parameter)
            kernels.release(x, factors, y.view(-1), numbers._replace(counter=words))
    return released


def add_noise_(
    kernels: Kernels,
    sums: Sequence[Tensor],
    grid: float,
    scale: float,
    inverse: float,
    kind: int,
    key: Tensor,
    stream: int,
) -> None:
    """The op `fastdistill::add_noise_`: each sum is the one sample of its tensor."""
    one = torch.ones(1, dtype=torch.float64, device=sums[0].device) if sums else None
    numbers = Numbers(kind, key, (0, 0, 0), 0.0, _MAGIC * grid, scale, inverse)
    for parameter, x in enumerate(sums):
        if one is not None and x.numel():
            words = counter(Source(kind, key, stream), GRADIENT_NOISE, parameter)
            dense = x.contiguous()
            flat = dense.view(1, -1)
            kernels.release(flat, one, flat[0], numbers._replace(counter=words))
            if dense is not x:
                x.copy_(dense)
