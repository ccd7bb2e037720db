"""What a GPU does where the CPU's backends look at values first; the suite has the rest."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import cuda_emulation as emulation
import pytest
import torch

import fastdistill as fd
from fastdistill.softmax import ops


@pytest.mark.parametrize("function", [fd.temperature_softmax, fd.temperature_log_softmax])
@pytest.mark.parametrize("cols", [12, 1100])
def test_softmax_a_bad_temperature_is_a_nan_row(
    emulated_cuda: ModuleType, cols: int, function: Any
) -> None:
    x = torch.randn(4, cols).requires_grad_()
    t = torch.tensor([2.0, -1.0, 0.0, 1.0]).requires_grad_()
    with emulation.registered(emulated_cuda), fd.backend(emulation.NAME):
        y = function(x, t)
        y.backward(torch.randn(4, cols))
    assert x.grad is not None and t.grad is not None
    bad = torch.tensor([False, True, True, False])
    for out in (y, x.grad):
        assert torch.equal(out.isnan().all(-1), bad) and torch.equal(out.isnan().any(-1), bad)
    assert torch.equal(t.grad.isnan(), bad)


def test_softmax_a_failed_launch_raises(emulated_cuda: ModuleType) -> None:
    launcher = emulation.launcher(emulated_cuda, ops.launcher.names["cuda"])
    with pytest.raises(RuntimeError, match="temperature_softmax: the CUDA kernel did not start"):
        launcher._launch(
            "softmax_forward", torch.device("cpu"), x=0, type=1, x_outer=0, x_step=0, rows=1,
            cols=1, inner=1, temperature=0, scalar=1.0, log=False, y=0, stats=0,
        )  # fmt: skip
