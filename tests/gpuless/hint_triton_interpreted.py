"""The Triton backend of hint_loss, its products and blocks, under Triton's interpreter.

triton_checked.py has its kernels alone. Run by test_triton_interpreter.py in a process of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton_shim

triton_shim.install()

from hint_checks import check, check_projected_in_blocks, features, run  # noqa: E402

from fastdistill import _backend  # noqa: E402
from fastdistill.hint import blocks, gpu, ops  # noqa: E402
from fastdistill.hint import triton as hint_triton  # noqa: E402

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAME = "triton-interpreted"
DISTANCES = ["mse", "l1", "smooth_l1", "cosine"]
NORMS: list[Any] = [None, "layer_norm", "l2", ("l2", "layer_norm")]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    products = blocks.WidenedProducts

    class Products(products):  # 16-bit operands reach the kernel as they would on a GPU
        def __init__(self, weight: torch.Tensor, dtype: torch.dtype) -> None:
            super().__init__(weight, dtype)
            self.wide = self.weight
            if weight.dtype in (BF16, F16) and dtype is F32:
                self.weight, self.residual = weight, weight.dtype

        def operand(self, x: torch.Tensor) -> torch.Tensor:
            return x if self.residual is not self.dtype else x.to(self.dtype)

        def project(self, x: torch.Tensor, out: torch.Tensor) -> None:
            out.copy_(x.to(self.dtype) @ self.wide.t())

        def student_gradient(self, residual: Any, out: Any, alpha: float) -> None:
            out.copy_(alpha * (residual.to(self.dtype) @ self.wide))

        def add_weight_gradient(self, total: Any, residual: Any, x: Any) -> None:
            total += residual.to(self.dtype).t() @ x.to(self.dtype)

    monkeypatch.setattr(gpu, "products", Products)
    monkeypatch.setattr(gpu, "_BLOCK", 4000)
    monkeypatch.setitem(ops.launcher.modules, NAME, hint_triton)
    table = dict(_backend.ops()["hint_loss"])
    _backend.register("hint_loss", {**table, NAME: lambda case: None})
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    _backend.register("hint_loss", table)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_projected_in_blocks(dtype: torch.dtype, distance: str) -> None:
    check_projected_in_blocks(NAME, dtype, distance, 37, 90)


def test_the_epilogue_is_what_projects(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    real = hint_triton._project
    monkeypatch.setattr(hint_triton, "_project", lambda *a: (called.append(a[0]), real(*a)))
    s, t, w = features(5, 8), features(5, 12), features(12, 8)
    for distance in DISTANCES:
        run(NAME, s, t, w, distance=distance)
        run(NAME, s, t, features(8, 12).t(), distance=distance, feature_norm="l2")
    assert called == ["mse", "l1", "smooth_l1"]
    first, again = (run(NAME, s, t, w) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_equal_zero_and_bad_rows() -> None:
    x = features(6, 100)
    for distance, norm in itertools.product(DISTANCES, NORMS[:3]):
        loss, grad = run(NAME, x, x.clone(), distance=distance, feature_norm=norm)
        assert loss == 0 and (grad == 0).all()
        s, t = x.clone(), features(6, 100)
        s[0], t[1], s[2, 5], t[3, 99] = 0.0, 0.0, float("nan"), float("nan")
        rows = run(NAME, s, t, distance=distance, feature_norm=norm, reduction="none")[0]
        assert rows.isnan().tolist() == [False, False, True, True, False, False]


def test_feature_maps_and_no_rows() -> None:
    s, t = features(2, 6, 5, 7), features(2, 10, 5, 7)
    check(NAME, s, t, features(10, 6), features(10), channel_dim=1, mask=torch.rand(2, 5, 7) > 0.5)
    check(NAME, t, t.flip(0), channel_dim=1, distance="cosine")
    got = run(NAME, features(0, 6), features(0, 8), features(8, 6), features(8))
    assert all((x == 0).all() for x in got)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("norms", [(None, "layer_norm"), (None, "l2"), ("layer_norm", None)])
@pytest.mark.parametrize("distance", ["mse", "l1", "smooth_l1"])
def test_a_side_as_it_is_has_no_norm(distance: str, norms: Any, value: float) -> None:
    """An odd feature of the side without a norm stays its own, beside one that has a norm."""
    odd, student = torch.randn(3, 70), norms[0] is None
    odd[1, 2] = value
    s, t = (odd, torch.randn(3, 70)) if student else (torch.randn(3, 70), odd)
    settings = {"distance": distance, "feature_norm": norms, "reduction": "none"}
    got, want = (run(name, s, t, **settings) for name in (NAME, "reference"))
    assert torch.equal(got[0].isnan(), want[0].isnan())
    assert torch.equal(got[0].isinf(), want[0].isinf())
    if student:
        assert torch.equal(got[1].isnan(), want[1].isnan())
