"""Launchers of the CUDA C++ kernels (csrc/cuda): pointers, strides and the stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill._native import launch_cuda as _launch
from fastdistill.privacy import gpu
from fastdistill.privacy.source import counter

_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_CHUNK = 8192  # elements of a partial sum: four rounds of a block's 256 threads
_TILE = 1024  # elements of a block of the release
_NARROW = 256  # elements of a row up to which it is read once


def _launch_for(name: str, of: gpu.Tensors, chunk: int, **arguments: Any) -> None:
    table, of_chunk = of.table(chunk)  # held here until the launch
    _launch(
        name,
        table.device,
        table=table.data_ptr(),
        of_chunk=of_chunk.data_ptr(),
        chunks=len(of_chunk),
        chunk=chunk,
        type=_TYPES[of.x[0].dtype],
        samples=of.x[0].shape[0],
        **arguments,
    )


def _square(of: gpu.Tensors, unit: float, squares: Tensor, first: int) -> None:
    _launch_for(
        "privacy_square",
        of,
        _CHUNK,
        most=max(x.shape[1] for x in of.x),
        unit=unit,
        squares=squares.data_ptr(),
        square_step=squares.shape[1],
        first=first,
    )


def _release(of: gpu.Tensors, factors: Tensor, numbers: gpu.Numbers) -> None:
    _launch_for(
        "privacy_release",
        of,
        _TILE,
        factors=factors.data_ptr(),
        out_double=of.out[0].dtype is torch.float64,
        generator=numbers.bits.kind,
        key=numbers.bits.key.tolist(),
        counter=counter(numbers.bits, 0)[1:],  # each tensor has its own first word
        fine=numbers.fine,
        grid=numbers.grid,
        scale=numbers.scale,
        inverse=numbers.inverse,
    )


def _sum_rows(of: gpu.Rows) -> None:
    x, (rows, cols) = of.teachers[0], of.sums.shape
    highest, factors = of.scratch() if cols > _NARROW else (None, None)
    _launch(
        "privacy_sum_rows",
        x.device,
        table=of.table.data_ptr(),
        type=_TYPES[x.dtype],
        teachers=len(of.teachers),
        rows=rows,
        cols=cols,
        step=x.stride(0),
        sums=of.sums.data_ptr(),
        highest=0 if highest is None else highest.data_ptr(),
        factors=0 if factors is None else factors.data_ptr(),
        inverse_temperature=of.inverse_temperature,
        exponentials=of.exponentials,
        fine=of.fine,
        clip=of.clip,
        unit=of.unit,
    )


_kernels = gpu.Kernels(_CHUNK, _square, _release, _sum_rows)
clip_and_noise, add_noise_ = _kernels.clip_and_noise, _kernels.add_noise_
noisy_softmax_sum, noisy_gradient_sum = _kernels.noisy_softmax_sum, _kernels.noisy_gradient_sum
