"""The Triton kernels of hint_loss: interpreted, and compiled ahead of time without spills."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

import triton_static as static

from fastdistill.hint import triton as hint_triton

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def test_under_the_interpreter() -> None:
    inner = Path(__file__).with_name("hint_triton_interpreted.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(inner)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = inner.parents[2]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.parametrize("target", static.TARGETS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_compiled(dtype: torch.dtype, target: str) -> None:
    x, t, w = torch.zeros(64, 96, dtype=dtype), torch.zeros(64, 128), torch.zeros(128, 96)
    bias, factors, loss = torch.zeros(128), torch.ones(64), torch.zeros(64)
    residual = torch.zeros(64, 128, dtype=dtype)
    with static.recording(hint_triton) as launches:
        hint_triton._project("smooth_l1", x, w.to(dtype), bias, t, factors, residual, loss)
        for distance, norm in itertools.product(("mse", "cosine"), ("none", "layer_norm")):
            hint_triton._rows(distance, norm, norm, t, t, bias, factors, residual, loss)
    for launch in launches:
        report = static.report(static.compile_launch(launch, static.TARGETS[target]))
        assert report.spills == 0, (launch.kernel, report)
