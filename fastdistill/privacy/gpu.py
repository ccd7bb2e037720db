"""The passes of the GPU launchers over a backend's kernels. Nothing synchronises.

Clipped gradients take two kernels, one launch each for all tensors of a kind: models have hundreds
of small ones, and a launch takes longer than each. The second pass reads a sample's factor, not its
norm, so that both backends share what lies between: the norms, in float64 and in a fixed order.
A sum over teachers is made in float64, and then released as one tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdistill.privacy import ops
from fastdistill.privacy.mechanism import EPS, EXPONENTIALS, Mechanism
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

    bits: Source
    fine: float  # 1.5 2^52 times the grids
    grid: float
    scale: float
    inverse: float

    @staticmethod
    def of(m: Mechanism, bits: Source) -> Numbers:
        """Those of a mechanism."""
        return Numbers(bits, _MAGIC * m.fine, _MAGIC * m.grid, m.scale, m.inverse)


class Tensors(NamedTuple):
    """Those of one kind: of one element type, all or none of whose rows begin on 16 bytes."""

    x: list[Tensor]  # [samples, size] each, its rows dense
    out: list[Tensor]  # [size] each
    counters: list[int]  # word 1 of the counters of their noise
    vector: int  # elements that may be read at once: 16 bytes, or one

    def columns(self, chunk: int) -> list[int]:
        """How many chunks each tensor has."""
        return [-(-x.shape[1] // chunk) for x in self.x]

    def table(self, chunk: int) -> tuple[Tensor, Tensor]:
        """(int64 [tensors, FIELDS], int64 [chunks]: the tensor of each), on their device.

        The fields are the address of x, elements of a row, elements from one row to the next, the
        first chunk, the address of out, word 1 of the counter.
        """
        count = self.columns(chunk)
        first = [0, *itertools.accumulate(count)]
        fields = [
            (x.data_ptr(), x.shape[1], x.stride(0), at, y.data_ptr(), word)
            for x, at, y, word in zip(self.x, first, self.out, self.counters, strict=False)
        ]
        of_chunk = torch.repeat_interleave(torch.tensor(count))
        both = torch.cat([torch.tensor(fields).flatten(), of_chunk])
        both = on_device(both, [*self.x, *self.out])
        return both, both[len(self.x) * FIELDS :]


FIELDS = 6


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


def _rows(x: Tensor) -> Tensor:
    """[samples, size], without a copy where each sample is dense."""
    rows = x.reshape(x.shape[0], x.shape[1:].numel())
    return rows if rows.shape[1] <= 1 or rows.stride(1) == 1 else rows.contiguous()


def vector(x: Tensor, *others: Tensor) -> int:
    """Elements of a vector: 16 bytes or more where all rows begin and end on such boundaries."""
    vec = 16 // min(y.element_size() for y in (x, *others))
    whole = x.shape[1] % vec == 0 and (x.stride(0) % vec == 0 or x.shape[0] <= 1)
    return vec if whole and all(y.data_ptr() % 16 == 0 for y in (x, *others)) else 1


def alike(
    rows: Sequence[Tensor], out: Sequence[Tensor], bits: Source, purpose: int
) -> list[Tensors]:
    """Tensors [samples, size] and their results [size], those of one kind together; not the empty
    ones. The index of a tensor is in the counter of its noise.
    """
    found: dict[Any, Tensors] = {}
    for parameter, (x, y) in enumerate(zip(rows, out, strict=True)):
        if y.numel():
            vec = vector(x, y)
            of = found.setdefault((x.dtype, y.dtype, vec), Tensors([], [], [], vec))
            of.x.append(x)
            of.out.append(y)
            of.counters.append(counter(bits, purpose, parameter)[0])
    return list(found.values())


def on_device(table: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """A table with addresses of the tensors, copied to their device; nothing waits for it."""
    device = tensors[0].device
    if device.type == "cpu":
        return table
    return table.pin_memory().to(device, non_blocking=True)  # from other memory it would wait


def addresses(tensors: Sequence[Tensor]) -> Tensor:
    """int64 [len(tensors)]: where they begin, on their device."""
    table = torch.tensor([x.data_ptr() for x in tensors], dtype=torch.int64)
    return on_device(table, tensors)


def _of_one_stride(teachers: Sequence[Tensor]) -> Sequence[Tensor]:
    """The teachers' [rows, cols], their rows dense: without a copy where all have one stride."""
    dense = teachers[0].shape[1] == 1 or all(x.stride(1) == 1 for x in teachers)
    if dense and len({x.stride(0) for x in teachers}) == 1:
        return teachers
    return [x.contiguous() for x in teachers]


class Kernels(NamedTuple):
    """A backend's kernels, and the ops `fastdistill::...` that they make."""

    chunk: int  # elements of a partial sum
    square: Callable[[Tensors, float, Tensor, int], None]
    """(of, unit, squares [samples, all chunks], the first of their columns)"""
    release: Callable[[Tensors, Tensor, Numbers], None]
    """(of, factors [samples], numbers)"""
    sum_rows: Callable[[Rows], None]

    def clip_and_noise(
        self, grad_samples: Sequence[Tensor], m: Mechanism, bits: Source
    ) -> list[Tensor]:
        """The op `fastdistill::clip_and_noise` by two kernels."""
        released = ops.allocate(grad_samples)
        rows, out = [_rows(x) for x in grad_samples], [y.view(-1) for y in released]
        kinds = alike(rows, out, bits, GRADIENT_NOISE)
        samples, columns = len(rows[0]), [sum(of.columns(self.chunk)) for of in kinds]
        squares = torch.empty((samples, sum(columns)), dtype=torch.float64, device=rows[0].device)
        if samples:
            for of, first in zip(kinds, [0, *itertools.accumulate(columns)], strict=False):
                self.square(of, m.unit, squares, first)
        norm = squares.sum(1).sqrt() / m.unit
        factors = torch.where(norm.isfinite(), (m.clip / (norm + EPS)).clamp(max=1), 0.0)
        for of in kinds:
            self.release(of, factors, Numbers.of(m, bits))
        return released

    def add_noise_(self, sums: Sequence[Tensor], m: Mechanism, bits: Source) -> None:
        """The op `fastdistill::add_noise_`: each sum is the one sample of its tensor."""
        dense = [x.contiguous() for x in sums]
        flat = [x.view(1, -1) for x in dense]
        for of in alike(flat, [x[0] for x in flat], bits, GRADIENT_NOISE):
            self._release_sum(of, m, bits)
        for x, y in zip(sums, dense, strict=True):
            if x is not y:
                x.copy_(y)

    def _release_sum(self, of: Tensors, m: Mechanism, bits: Source) -> None:
        """As if a sum were one sample, whose factor is 1 and which has no grid of its own."""
        one = torch.ones(1, dtype=torch.float64, device=of.x[0].device)
        self.release(of, one, Numbers.of(m._replace(fine=0.0), bits))

    def noisy_softmax_sum(
        self, teachers: Sequence[Tensor], temperature: float, m: Mechanism, bits: Source
    ) -> Tensor:
        """The op `fastdistill::noisy_softmax_sum`."""
        return self._sum_rows(teachers, 1 / temperature, m, bits, ANSWER_NOISE)

    def noisy_gradient_sum(self, teachers: Sequence[Tensor], m: Mechanism, bits: Source) -> Tensor:
        """The op `fastdistill::noisy_gradient_sum`."""
        return self._sum_rows(teachers, 0.0, m, bits, ROW_GRADIENT_NOISE)

    def _sum_rows(
        self,
        teachers: Sequence[Tensor],
        inverse_temperature: float,
        m: Mechanism,
        bits: Source,
        purpose: int,
    ) -> Tensor:
        out = ops.allocate_rows(teachers)
        if out.numel() == 0:
            return out
        rows = _of_one_stride(teachers)
        sums = torch.empty(out.shape, dtype=torch.float64, device=out.device)
        exponentials = _MAGIC * EXPONENTIALS if m.grid else 0.0
        self.sum_rows(
            Rows(
                rows, addresses(rows), sums,
                inverse_temperature, exponentials, m.clip, m.unit, _MAGIC * m.fine,
            )
        )  # fmt: skip
        for of in alike([sums.view(1, -1)], [out.view(-1)], bits, purpose):
            self._release_sum(of, m, bits)
        return out
