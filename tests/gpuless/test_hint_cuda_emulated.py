"""The CUDA C++ backend of hint_loss in small blocks of the projection; the suite has the rest.

The row kernel, its launcher and the Python launcher are the real ones, run by the CPU under
cuemu/cuemu.h. The products are torch's on widened operands: cuBLAS's, with 16-bit operands and
float32 sums, need a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cuda_emulation as emulation
import pytest
import torch
from hint_checks import check_projected_in_blocks

from fastdistill import _backend
from fastdistill.hint import blocks, gpu, native_cuda, ops

pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=str(emulation.missing()))

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAME = "cuda-emulated"
DISTANCES = ["mse", "l1", "smooth_l1", "cosine"]


@pytest.fixture(autouse=True)
def emulated(emulated_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`fastdistill.backend("cuda-emulated")` works, on CPU tensors; blocks are small."""

    def launch(name: str, device: torch.device, **arguments: Any) -> None:
        getattr(emulated_cuda, name)(**arguments, stream=0)

    monkeypatch.setattr(native_cuda, "_launch", launch)
    monkeypatch.setattr(gpu, "products", lambda w, dtype: blocks.WidenedProducts(w, dtype))
    monkeypatch.setattr(gpu, "_BLOCK", 2000)
    monkeypatch.setitem(ops.launcher.modules, NAME, native_cuda)
    table = dict(_backend.ops()["hint_loss"])
    _backend.register("hint_loss", {**table, NAME: lambda case: None})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    _backend.register("hint_loss", table)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_projected_in_blocks(dtype: torch.dtype, distance: str) -> None:
    check_projected_in_blocks(NAME, dtype, distance, 12, 40)
