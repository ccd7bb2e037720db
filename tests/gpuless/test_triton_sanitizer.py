"""Runs triton_sanitized.py in a process of its own: triton-viz patches Triton."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import table
import triton

PINNED = "3.7"


@pytest.mark.skipif(importlib.util.find_spec("triton_viz") is None, reason="no triton-viz")
@pytest.mark.skipif(
    not triton.__version__.startswith(PINNED), reason=f"triton-viz works with Triton {PINNED}"
)
def test_accesses_are_in_bounds_for_all_programs() -> None:
    path = Path(__file__).with_name("triton_sanitized.py")
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "out of bounds" in done.stdout and ": clean" in done.stdout


def test_every_kernel_is_sanitized_or_says_why_not() -> None:
    for kernel in table.TRITON:
        assert bool(kernel.sanitized) != bool(kernel.not_sanitized), kernel.name
