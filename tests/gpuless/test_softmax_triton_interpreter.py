"""Runs triton_softmax_interpreted.py in a process of its own: @triton.jit fixes its mode there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_softmax_triton_under_the_interpreter() -> None:
    inner = Path(__file__).with_name("triton_softmax_interpreted.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(inner)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = inner.parents[2]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout, done.stdout[-2000:]
