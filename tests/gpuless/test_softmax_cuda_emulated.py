"""The CUDA C++ backend of the temperature softmaxes, run by the CPU under cuemu/cuemu.h.

Judged against the reference in float64 on the same inputs. Every torch.empty is NaN in these tests.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import cuda_emulation as emulation
import pytest
import torch
from budget import assert_within
from torch import Tensor

import fastdistill as fd
from fastdistill import _backend
from fastdistill.softmax import api, native_cuda, ops

pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=str(emulation.missing()))
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FUNCTIONS = (fd.temperature_softmax, fd.temperature_log_softmax)
INF, NAN = float("inf"), float("nan")


@pytest.fixture(scope="module")
def launcher() -> Any:
    """The real launcher, on the emulated module."""
    path = emulation.build()
    spec = importlib.util.spec_from_file_location("fastdistill_emulated_softmax._cuda", path)
    assert spec is not None and spec.loader is not None
    compiled = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compiled)
    spec = importlib.util.find_spec(native_cuda.__name__)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._launch = lambda name, device, **a: getattr(compiled, name)(**a, stream=0)
    return module


@pytest.fixture(autouse=True)
def emulated(launcher: Any) -> Iterator[None]:
    tables = {op: dict(_backend.ops()[op]) for op in api.OPS}

    def refuse(case: _backend.Case) -> str | None:
        return None if native_cuda.supports(case.dtypes[0]) else "element types"

    ops._modules[emulation.NAME] = launcher
    for op, table in tables.items():
        _backend.register(op, {**table, emulation.NAME: refuse})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for op, table in tables.items():
        _backend.register(op, table)
    del ops._modules[emulation.NAME]


def run(backend: str, function: Any, x: Tensor, t: Any, grad: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    leaves = [x]
    if isinstance(t, Tensor):
        t = t.detach().requires_grad_()
        leaves.append(t)
    with fd.backend(backend):
        y = function(x, t)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def check(function: Any, x: Tensor, t: Any, grad: Tensor) -> None:
    got = run(emulation.NAME, function, x, t, grad)
    wide = t.double() if isinstance(t, Tensor) else t
    want = run("reference", function, x.double(), wide, grad.double())
    native = run("reference", function, x, t, grad)
    assert_within("y", got[0], want[0], native[0])
    # Where a class takes nearly all, g - sum g p cancels: the largest gradients set the scale.
    for name, g, w, n in zip(("x", "t"), got[1:], want[1:], native[1:], strict=False):
        assert_within(name, g.reshape(1, -1), w.reshape(1, -1), n.reshape(1, -1))


def logits(*shape: int, dtype: torch.dtype = F32, scale: float = 3.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_softmax_values_and_grads(dtype: torch.dtype, function: Any) -> None:
    for cols in (1, 2, 10, 33, 1000, 1024, 1025, 4099):
        x, grad = logits(5, cols, dtype=dtype), logits(5, cols, dtype=dtype, scale=1.0)
        for t in (0.7, 3.0, torch.rand(5) * 3 + 0.5):
            check(function, x, t, grad)


def test_softmax_layouts() -> None:
    for cols, dtype in ((9, F32), (1030, BF16)):
        base = logits(2, 4, cols + 3, dtype=dtype)
        views = [base[..., 1 : cols + 1], base[:, ::2], base.transpose(0, 1)]
        views += [base[:1].expand(3, 4, cols + 3), logits(cols, 4, dtype=dtype).t()]
        for x in views:
            for function in FUNCTIONS:
                rows = torch.rand((*x.shape[:-1], 2))[..., 0] + 0.5
                check(function, x, rows, torch.randn(x.shape[-1]).to(dtype).expand(x.shape))
                check(function, x, 2.0, torch.randn(x.shape).to(dtype))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("cols", [12, 1100])
def test_softmax_bad_rows_stay_alone(cols: int, function: Any, launcher: Any) -> None:
    x, grad = logits(8, cols), logits(8, cols)
    x[1, 3], x[2, 0], x[3] = NAN, INF, -INF
    x[4, ::3] = x[5, 8:] = -INF
    t = torch.full((8,), 2.0)
    check(function, x, 2.0, grad)
    check(function, x, t, grad)
    t[6], t[7] = -1.0, 0.0  # not checked on a GPU: a NaN row
    bad = torch.tensor([0, 1, 1, 1, 0, 0, 1, 1]).bool()
    y, gx, gt = run(emulation.NAME, function, x, t, grad)
    for out in (y, gx):
        assert torch.equal(out.isnan().all(-1), bad) and torch.equal(out.isnan().any(-1), bad)
    assert torch.equal(gt.isnan(), bad)


def test_softmax_no_rows_and_the_order_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in FUNCTIONS:
        assert run(emulation.NAME, function, logits(0, 7), 2.0, logits(0, 7))[1].shape == (0, 7)
    x, grad, t = logits(3, 4099), logits(3, 4099), torch.rand(3) + 1
    forward = run(emulation.NAME, fd.temperature_softmax, x, t, grad)
    monkeypatch.setenv("CUEMU_REVERSE", "1")
    reverse = run(emulation.NAME, fd.temperature_softmax, x, t, grad)
    assert all(torch.equal(a, b) for a, b in zip(forward, reverse, strict=True))


def test_softmax_a_failed_launch_raises(launcher: Any) -> None:
    with pytest.raises(RuntimeError, match="temperature_softmax: the CUDA kernel did not start"):
        launcher._launch(
            "softmax_forward", torch.device("cpu"), x=0, type=1, x_outer=0, x_step=0, rows=1,
            cols=1, inner=1, temperature=0, scalar=1.0, log=False, y=0, stats=0,
        )  # fmt: skip


def test_softmax_refusals() -> None:
    case = _backend.Case("cuda", (torch.float64,), False)
    assert "float64" in str(_backend.ops()["temperature_softmax"]["cuda"](case))
