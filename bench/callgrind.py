"""Instructions executed per element, counted under valgrind: the loops and all around them.

callgrind knows no AVX-512, so the module chooses its AVX2 level there. The kernels are called in a
process of their own without torch, on plain memory: this file, run with a case to make.
"""

from __future__ import annotations

import array
import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

CASES = [(16, 32000), (64, 1024), (256, 100), (256, 10)]
KERNELS = {
    "kd_fwd": "kd_forward",
    "softmax_fwd": "softmax_forward",
    "softmax_bwd": "softmax_backward",
}
FP32 = 0


def unavailable() -> str | None:
    """Why nothing can be counted here."""
    from fastdistill import _native

    module = _native.cpu().module
    if module is None:
        return f"no CPU kernels: {_native.cpu().reason}"
    if not dict(module.isas()).get("avx2"):
        return "this processor has no AVX2"
    return None if shutil.which("valgrind") else "needs valgrind"


def lines() -> Iterator[str]:
    """A line per case."""
    yield "callgrind, avx2, fp32, instructions an element" + "".join(f"{x:>14}" for x in KERNELS)
    for rows, cols in CASES:
        found = [executed(kernel, rows, cols) / (rows * cols) for kernel in KERNELS]
        yield f"{f'{rows}x{cols}':46}" + "".join(f"{x:14.2f}" for x in found)


def executed(kernel: str, rows: int, cols: int) -> int:
    """Instructions inside one kernel in one call."""
    from fastdistill import _native

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind.out"
        command = [
            "valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", "--collect-atstart=no",
            f"--toggle-collect=fd::avx2::{KERNELS[kernel]}(*",
            sys.executable, "-S", __file__, str(_native.cpu().module.__file__), kernel,
            str(rows), str(cols),
        ]  # fmt: skip
        environment = {**os.environ, "FASTDISTILL_CPU_ISA": "avx2", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode != 0:
            raise RuntimeError(f"valgrind: {done.stderr.strip()[-2000:]}")
        total = re.search(r"^(?:summary|totals): (\d+)", out.read_text(), re.M)
    if total is None or int(total[1]) == 0:
        raise RuntimeError(f"callgrind: nothing was counted in {KERNELS[kernel]}")
    return int(total[1])


def _call(path: str, kernel: str, rows: int, cols: int) -> None:
    """One call of the module's launcher, as the package makes it."""
    import importlib.machinery
    import importlib.util

    loader = importlib.machinery.ExtensionFileLoader("_cpu", path)
    spec = importlib.util.spec_from_loader("_cpu", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    held = []

    def memory(count: int, size: int = 4) -> int:
        raw = ctypes.create_string_buffer(count * size + 64)
        held.append(raw)
        at = ctypes.addressof(raw)
        return at + -at % 64

    def logits(step: int) -> int:
        pattern = array.array("f", ((i * step % 64) / 16 - 2 for i in range(64))).tobytes()
        size = rows * cols * 4
        at = memory(rows * cols)
        ctypes.memmove(at, pattern * (size // len(pattern) + 1), size)
        return at

    x = logits(37)
    stats = memory(2 * rows)
    if kernel == "kd_fwd":
        labels = memory(rows, 8)
        module.kd_fwd(
            x, FP32, 0, cols, logits(23), FP32, 0, cols, rows, cols, rows, labels, 0, 0,
            2.0, 0.5, 0.5, 1, True, -100, 0.0, 2, float(rows),
            memory(1), memory(rows), memory(rows), False, memory(rows * cols), 4, 0, 1,
        )  # fmt: skip
        return
    y = memory(rows * cols)
    forward = (x, FP32, 0, cols, rows, cols, rows, 0, 2.0, False, y, stats, False, 1)
    module.softmax_fwd(*forward)
    if kernel == "softmax_bwd":
        out = memory(rows * cols)
        module.softmax_bwd(
            logits(23), 0, cols, x, FP32, 0, cols, rows, cols, rows, 0, 2.0, False, stats, False,
            out, 0, 1,
        )  # fmt: skip


if __name__ == "__main__":
    _call(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
