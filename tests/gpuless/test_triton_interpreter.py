"""Runs what needs the interpreter in processes of their own: @triton.jit fixes the mode early."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


FILES = ["triton_checked.py", "triton_interpreted.py"]
FILES += ["triton_softmax_interpreted.py", "hint_triton_interpreted.py"]
FILES += ["triton_privacy_interpreted.py"]


@pytest.mark.parametrize("file", FILES)
def test_triton_under_the_interpreter(file: str) -> None:
    inner = Path(__file__).with_name(file)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(inner)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = inner.parents[2]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout, done.stdout[-2000:]
