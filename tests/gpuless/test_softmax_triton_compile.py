"""The Triton kernels of the temperature softmaxes, compiled ahead of time: no GPU is needed.

No spills, 128-bit accesses in every loop, and for rows in registers no narrow access to the body.
"""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

import triton_static as static

from fastdistill.softmax import triton as softmax_triton

ARCHITECTURES = {"sm_80": "sm_8", "sm_90": "sm_9", "sm_100": "sm_10", "gfx942": "gfx9"}
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
CASES = [
    (100, BF16), (1000, F32), (4096, BF16), (8192, BF16), (50257, BF16), (50257, F64),
]  # fmt: skip


def record(x: torch.Tensor, log: bool, rows: bool, target: str) -> list[static.Launch]:
    """The launches of forward and backward; the temperature of each row with its gradient."""
    t = torch.ones(x.shape[:-1]) if rows else None
    name = ARCHITECTURES[target]
    with (
        mock.patch.object(softmax_triton, "architecture", lambda device: name),
        static.recording(softmax_triton) as launches,
    ):
        softmax_triton._config.cache_clear()
        _, stats = softmax_triton.softmax_fwd(x, t, 2.0, log)
        softmax_triton.softmax_bwd(torch.empty_like(x), x, stats, t, 2.0, log, rows)
        softmax_triton._config.cache_clear()
    return launches


@pytest.mark.parametrize("target", ARCHITECTURES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_softmax_compiled(case: tuple[int, torch.dtype], target: str) -> None:
    cols, dtype = case
    variants: list[tuple[bool, bool]] = [(False, False), (True, True)]
    for log, rows in variants:
        for launch in record(torch.zeros(4, cols, dtype=dtype), log, rows, target):
            report = static.report(static.compile_launch(launch, static.TARGETS[target]))
            assert report.spills == 0, (launch.kernel, report)
            assert not {key for loop in report.loops for key in loop if key[1] < 16}, report
            if "ROWS" not in launch.arguments:  # how often loops are unrolled is the compiler's
                assert len(report.loops) >= 2 and any(("store", 16) in x for x in report.loops)
                assert all(("load", 16) in x for x in report.loops), report
                continue
            tile = launch.arguments["LANES"] * launch.arguments["VEC"] * launch.arguments["ROWS"]
            threads = launch.options["num_warps"] * static.TARGETS[target].warp_size
            wide = report.accesses
            load, store = (wide[kind, 16] * 16 * threads / tile for kind in ("load", "store"))
            arrays = 2 if "g_ptr" in launch.arguments else 1  # each is read once
            assert (load, store) == (arrays * dtype.itemsize, dtype.itemsize), report


def test_softmax_one_kernel_serves_every_vocabulary() -> None:
    keys: set[Any] = set()
    for cols, rows in ((50257, 4), (49999, 1), (128255, 7)):
        for launch in record(torch.zeros(rows, cols, dtype=BF16), False, True, "sm_90"):
            varying = {p.name for p in launch.kernel.params if p.do_not_specialize}
            assert varying == set(softmax_triton._SIZES) & set(launch.arguments)
            constants = {p.name: launch.arguments[p.name] for p in launch.kernel.params
                         if p.is_constexpr}  # fmt: skip
            keys.add(tuple(map(str, constants.items())))
    assert len(keys) == 2
