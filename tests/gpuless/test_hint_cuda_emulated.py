"""The CUDA C++ backend of hint_loss, run by the CPU under cuemu/cuemu.h.

The row kernel, its launcher and the Python launcher are the real ones. The products are torch's on
widened operands: cuBLAS's, with 16-bit operands and float32 sums, need a GPU.
"""

from __future__ import annotations

import importlib.util
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
NORMS: list[Any] = [None, "layer_norm", "l2", ("l2", "layer_norm")]


@pytest.fixture(scope="module")
def compiled() -> Any:
    path = emulation.build()
    spec = importlib.util.spec_from_file_location("fastdistill_emulated._cuda", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def emulated(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`fastdistill.backend("cuda-emulated")` works, on CPU tensors; blocks are small."""

    def launch(name: str, device: torch.device, **arguments: Any) -> None:
        getattr(compiled, name)(**arguments, stream=0)

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
@pytest.mark.parametrize("dtypes", list(itertools.product((F32, BF16, F16), repeat=2)), ids=str)
def test_the_distance_alone(dtypes: Any, distance: str) -> None:
    for width, norm in itertools.product((1, 9, 100, 1030), NORMS):
        if width == 1 and (norm is not None or distance == "cosine"):
            continue  # all equal or opposite: nothing but rounding
        s, t = features(3, width, dtype=dtypes[0]), features(3, width, dtype=dtypes[1])
        check(s, t, distance=distance, feature_norm=norm)


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


def test_feature_maps_and_layouts() -> None:
    s, t = features(2, 6, 5, 7), features(2, 10, 5, 7)
    check(s, t, features(10, 6), features(10), channel_dim=1, mask=torch.rand(2, 5, 7) > 0.5)
    check(t, t.flip(0), channel_dim=1, distance="cosine")
    base, other = features(4, 9, 21), features(4, 9, 21)
    for view in (lambda x: x[:, :-1], lambda x: x.transpose(0, 1), lambda x: x[..., 3:]):
        check(view(base), view(other), distance="smooth_l1")


def test_equal_zero_and_bad_rows() -> None:
    x = features(6, 100)
    for distance, norm in itertools.product(DISTANCES, NORMS[:3]):
        loss, grad = run(NAME, x, x.clone(), distance=distance, feature_norm=norm)
        assert loss == 0 and (grad == 0).all()
        s, t = x.clone(), features(6, 100)
        s[0], t[1], s[2, 5], t[3, 99] = 0.0, 0.0, float("nan"), float("nan")
        rows = run(NAME, s, t, distance=distance, feature_norm=norm, reduction="none")[0]
        assert rows.isnan().tolist() == [False, False, True, True, False, False]
    near = x + 1e-4 * torch.randn_like(x)
    rows = run(NAME, x, near, distance="cosine", reduction="none")[0]
    want = run("reference", x.double(), near.double(), distance="cosine", reduction="none")[0]
    torch.testing.assert_close(rows.double(), want, rtol=1e-4, atol=0)


def test_no_rows_and_a_kept_graph() -> None:
    w, b = features(8, 6), features(8)
    got = run(NAME, features(0, 6), features(0, 8), w, b)
    assert all((x == 0).all() for x in got)
    s = features(4, 6, dtype=F16).requires_grad_()
    with fastdistill.backend(NAME):
        loss = fastdistill.hint_loss(s, features(4, 8), proj_weight=w.half()) * 3
    (first,) = torch.autograd.grad(loss, s, retain_graph=True)
    (second,) = torch.autograd.grad(loss, s)
    assert torch.equal(first, second)
