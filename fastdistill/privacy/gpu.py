"""The passes of the GPU launchers over a backend's kernels. Nothing synchronises.

Clipped gradients take two kernels, one launch each for a tensor. The second pass reads a sample's
factor, not its norm, so that both backends share what lies between: the norms, in float64 and in a
fixed order. A sum over teachers is made in float64, and then released as one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdistill.privacy import ops
from fastdistill.privacy.mechanism import EPS, EXPONENTIALS
from fastdistill.privacy.source import (
    ANSWER_NOISE,
    GRADIENT_NOISE,
    ROW_GRADIENT_NOISE,
    Source,
    counter,
)

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


class Rows(NamedTuple):
    """A sum over teachers, row by row: their softmax, or clipped."""

    teachers: Sequence[Tensor]  # each [rows, cols], of one stride, the rows dense
    table: Tensor  # int64 [teachers]: their addresses, on their device
    sums: Tensor  # float64 [rows, cols]: the result, dense
    inverse_temperature: float  # 0 for clipped rows
    exponentials: float  # 1.5 2^52 times their grid
    clip: float
    unit: float
    fine: float  # as in Numbers

    def scratch(self) -> tuple[Tensor, Tensor]:
        """float64 [rows, teachers], twice: for the highest value and the factor of each row."""
        shape = (2, len(self.sums), len(self.teachers))
        highest, factors = torch.empty(shape, dtype=torch.float64, device=self.sums.device)
        return highest, factors


class Kernels(NamedTuple):
    """A backend's kernels; x is [samples, size], its rows dense."""

    chunk: int  # elements of a partial sum
    square: Callable[[Tensor, float, Tensor, int, int, Tensor], None]
    """(x, unit, squares [samples, all chunks], the first of x's columns, their number, out)"""
    release: Callable[[Tensor, Tensor, Tensor, Numbers], None]
    """(x, factors [samples], out [size], numbers)"""
    sum_rows: Callable[[Rows], None]


def _rows(x: Tensor) -> Tensor:
    """[samples, size], without a copy where each sample is dense."""
    rows = x.reshape(x.shape[0], x.shape[1:].numel())
    return rows if rows.shape[1] <= 1 or rows.stride(1) == 1 else rows.contiguous()


def addresses(tensors: Sequence[Tensor]) -> Tensor:
    """int64 [len(tensors)]: where they begin, on their device."""
    table = torch.tensor([x.data_ptr() for x in tensors], dtype=torch.int64)
    device = tensors[0].device
    if device.type == "cpu":
        return table
    return table.pin_memory().to(device, non_blocking=True)  # from other memory it would wait


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


def noisy_softmax_sum(
    kernels: Kernels, teachers: Sequence[Tensor], temperature: float, *release: Any
) -> Tensor:
    """The op `fastdistill::noisy_softmax_sum`."""
    return _sum_rows(kernels, teachers, 1 / temperature, ANSWER_NOISE, *release)


def noisy_gradient_sum(kernels: Kernels, teachers: Sequence[Tensor], *release: Any) -> Tensor:
    """The op `fastdistill::noisy_gradient_sum`."""
    return _sum_rows(kernels, teachers, 0.0, ROW_GRADIENT_NOISE, *release)


def _sum_rows(
    kernels: Kernels,
    teachers: Sequence[Tensor],
    inverse_temperature: float,
    purpose: int,
    clip: float,
    unit: float,
    fine: float,
    grid: float,
    scale: float,
    inverse: float,
    kind: int,
    key: Tensor,
    stream: int,
) -> Tensor:
    out = ops.allocate_rows(teachers)
    if out.numel() == 0:
        return out
    alike = _of_one_stride(teachers)
    sums = torch.empty(out.shape, dtype=torch.float64, device=out.device)
    exponentials = _MAGIC * EXPONENTIALS if grid else 0.0
    kernels.sum_rows(
        Rows(
            alike, addresses(alike), sums,
            inverse_temperature, exponentials, clip, unit, _MAGIC * fine,
        )
    )  # fmt: skip
    words = counter(Source(kind, key, stream), purpose)
    numbers = Numbers(kind, key, words, 0.0, _MAGIC * grid, scale, inverse)
    one = torch.ones(1, dtype=torch.float64, device=out.device)
    kernels.release(sums.view(1, -1), one, out.view(-1), numbers)
    return out


def _of_one_stride(teachers: Sequence[Tensor]) -> Sequence[Tensor]:
    """The teachers' [rows, cols], their rows dense: without a copy where all have one stride."""
    dense = teachers[0].shape[1] == 1 or all(x.stride(1) == 1 for x in teachers)
    if dense and len({x.stride(0) for x in teachers}) == 1:
        return teachers
    return [x.contiguous() for x in teachers]
