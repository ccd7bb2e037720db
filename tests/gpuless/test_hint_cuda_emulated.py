"""The CUDA C++ backend of hint_loss in small blocks of the projection; the suite has the rest.

The row kernel, its launcher and the Python launcher are the real ones, run by the CPU under
cuemu/cuemu.h. The products are torch's on widened operands: cuBLAS's, with 16-bit operands and
float32 sums, need a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import cuda_emulation as emulation
import pytest
import torch

import fastdistill
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
    monkeypatch.setitem(ops._modules, NAME, native_cuda)
    table = dict(_backend.ops()["hint_loss"])
    _backend.register("hint_loss", {**table, NAME: lambda case: None})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    _backend.register("hint_loss", table)


def features(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def run(
    backend: str, s: Any, t: Any, w: Any = None, b: Any = None, go: Any = None, **kw: Any
) -> Any:
    leaves = [None if x is None else x.detach().requires_grad_() for x in (s, w, b)]
    with fastdistill.backend(backend):
        loss = fastdistill.hint_loss(leaves[0], t, proj_weight=leaves[1], proj_bias=leaves[2], **kw)
    loss.backward(torch.full_like(loss, 512.0) if go is None else go.to(loss.dtype))
    return [loss.detach(), *(x.grad for x in leaves if x is not None)]


def check(s: Any, t: Any, w: Any = None, b: Any = None, go: Any = None, **kw: Any) -> list[Any]:
    got = run(NAME, s, t, w, b, go, **kw)
    wide = [None if x is None else x.double() for x in (s, t, w, b)]
    want = run("reference", *wide, go, **kw)
    native = run("reference", s, t, w, b, go, **kw)
    eps = 0.0 if s.dtype == F32 else 1.1 * torch.finfo(s.dtype).eps
    for i, (g, x, n) in enumerate(zip(got, want, native, strict=True)):
        assert torch.equal(g.isnan(), x.isnan())
        g, x, n = (y.double().nan_to_num() for y in (g, x, n))
        band = (eps if i else 0.0) + 32 * 2.0**-23
        assert (g - x).norm() <= 2 * (n - x).norm() + band * x.norm() + 1e-30, (i, kw)
    return got


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_projected_in_blocks(dtype: torch.dtype, distance: str) -> None:
    for norm, reduction in itertools.product((None, "layer_norm"), ("mean", "none")):
        s, t = features(5, 20, 12, dtype=dtype), features(5, 20, 40, dtype=dtype)
        w, b = features(40, 12, dtype=dtype) / 4, features(40, dtype=dtype)
        mask = torch.rand(5, 20) > 0.4
        s[~mask], t[~mask] = float("nan"), float("inf")
        go = torch.randn(5, 20) * 64 if reduction == "none" else None
        got = check(s, t, w, b, go, distance=distance, feature_norm=norm, reduction=reduction,
                    mask=mask)  # fmt: skip
        assert (got[1][~mask] == 0).all() and all(x.isfinite().all() for x in got)
