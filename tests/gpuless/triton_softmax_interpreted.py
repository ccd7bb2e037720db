"""Edges and layouts of the temperature softmaxes' Triton kernels under the interpreter.

triton_checked.py has the values. Runs in a process of its own, with TRITON_INTERPRET=1 from the
start; test_triton_interpreter.py does. Every torch.empty is NaN, and inputs lie in NaN.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton_shim
from budget import assert_within
from torch import Tensor

from fastdistill import _triton
from fastdistill.softmax import ops, reference
from fastdistill.softmax import triton as softmax_triton

assert os.environ.get("TRITON_INTERPRET") == "1", __doc__
triton_shim.install()
torch.set_num_threads(1)

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
INF, NAN = float("inf"), float("nan")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on inf and NaN


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


@pytest.fixture(params=["rows", "blocks"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both kinds of kernel; from 65 classes a row takes several blocks."""

    def config(device: torch.device, double: bool, cols: int) -> _triton.Config:
        block = 64 if cols <= 128 else 512
        return _triton.Config(cols, request.param == "rows", block, 4, None)

    monkeypatch.setattr(softmax_triton, "_config", config)
    return str(request.param)


def logits(*shape: int, dtype: torch.dtype = F32, scale: float = 3.0) -> Tensor:
    """Rows that lie in NaN, as in a padded vocabulary, and begin at odd offsets."""
    *leading, cols = shape
    whole = torch.full((*leading, cols + 11), NAN, dtype=dtype)
    view = whole[..., 5 : 5 + cols]
    view.copy_(torch.randn(shape, dtype=F64) * scale)
    return view


def oracle(x: Tensor, t: Any, log: bool, grad: Tensor, wide: bool) -> list[Tensor]:
    x = (x.double() if wide else x).detach().requires_grad_()
    scalar = t if isinstance(t, float) else 1.0
    t = None if isinstance(t, float) else (t.double() if wide else t).detach().requires_grad_()
    y = reference.softmax(x, t, scalar, log)
    leaves = [x] if t is None else [x, t]
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def check(x: Tensor, t: Any, log: bool, grad: Tensor) -> None:
    """Values and gradients within the budget of float64, for a number T or one of each row."""
    scalar, rows = (t, None) if isinstance(t, float) else (1.0, t)
    y, stats = softmax_triton.softmax_fwd(x, rows, scalar, log)
    args = (grad, x, stats, rows, scalar, log, rows is not None)
    gx, gt = softmax_triton.softmax_bwd(*args)
    want, native = oracle(x, t, log, grad, True), oracle(x, t, log, grad, False)
    assert y.dtype is gx.dtype is x.dtype and y.shape == gx.shape == x.shape
    assert_within("y", y, want[0], native[0])
    # Where a class takes nearly all, g - sum g p cancels: the largest gradients set the scale.
    assert_within("gradient", *(v.reshape(1, -1) for v in (gx, want[1], native[1])))
    if rows is not None:
        assert_within("temperature", *(v.reshape(1, -1) for v in (gt, want[2], native[2])))


def test_layouts(kernel: str) -> None:
    for cols, dtype in itertools.product((65, 520), (F32, BF16)):
        base = torch.randn(2, 4, cols).to(dtype)
        views = [base, base[:, :-1], base.transpose(0, 1), base[:1].expand(3, 4, cols)]
        views += [torch.randn(2, cols, 4).to(dtype).transpose(1, 2), base[0, 0]]
        odd = torch.randn(6 * cols).to(dtype).as_strided((2, 1, 3, cols), (3 * cols, 5, cols, 1))
        views += [odd, base.flatten()[3 : 3 + cols]]
        for x in views:
            for grad in (
                torch.randn(x.shape).to(dtype),
                torch.randn(cols).to(dtype).expand(x.shape),
            ):
                for log in (False, True):
                    check(x, 2.0, log, grad)
                    check(x, torch.rand(x.shape[:-1]) + 0.5, log, grad)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("cols", [12, 600])
def test_bad_rows_stay_alone(kernel: str, cols: int, log: bool) -> None:
    x = logits(8, cols)
    x[1, 3], x[2, 0], x[3] = NAN, INF, -INF
    x[4, ::3] = x[5, : cols // 2] = -INF
    t = torch.ones(8) * 2
    grad = torch.randn(8, cols)
    check(x, 2.0, log, grad)
    check(x, t, log, grad)
    t[6], t[7] = -1.0, 0.0  # not checked on a GPU: a NaN row
    y, stats = softmax_triton.softmax_fwd(x, t, 1.0, log)
    gx, gt = softmax_triton.softmax_bwd(grad, x, stats, t, 1.0, log, True)
    bad = torch.tensor([0, 1, 1, 1, 0, 0, 1, 1]).bool()
    for out in (y, gx):
        assert torch.equal(out.isnan().all(-1), bad) and torch.equal(out.isnan().any(-1), bad)
    assert torch.equal(gt.isnan(), bad)


def test_no_rows_and_the_fake_s_promise(kernel: str) -> None:
    for shape, dtype in itertools.product([(0, 5), (3, 10)], (F32, BF16, F64)):
        x = torch.randn(shape).to(dtype)
        made = softmax_triton.softmax_fwd(x, None, 2.0, False)
        made += softmax_triton.softmax_bwd(x, x, made[1], None, 2.0, False, False)
        fake = ops.allocate(x) + ops.allocate_gradients(x, False)
        for real, promised in zip(made, fake, strict=True):
            assert real.dtype is promised.dtype and real.shape == promised.shape
