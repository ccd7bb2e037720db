"""What only kd_loss promises of its compiled kernels; test_triton_compile.py has the rest."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

import machine_code
import room_kd
import triton_static as static
from room_kd import PLAIN, WIDE

from fastdistill.kd import triton as kd_triton

ROWS, BLOCKS, SCALE = room_kd.TRITON


def test_the_longest_rows_that_are_read_once() -> None:
    for cols, target in ((8192, "sm_90"), (8192, "sm_80"), (8192, "gfx942"), (2048, "sm_100")):
        static.record(ROWS, {**PLAIN, "cols": cols}, target)
        static.record(BLOCKS, {**PLAIN, "cols": cols + 1}, target)


def loops(kernel: Any, config: dict[str, Any]) -> list[machine_code.Accesses]:
    launch = static.record(kernel, config)
    code = static.read(static.compile_launch(launch, config["target"]))
    return [loop.accesses for loop in static.passes(code)]


def test_one_kernel_serves_every_vocabulary() -> None:
    """The sizes select nothing, so a new V or batch does not compile again."""
    keys = set()
    for cols in (50257, 49999, 128255):
        launch = static.record(BLOCKS, {**WIDE, "cols": cols})
        sizes = set(kd_triton._SIZES)
        varying = {k: v for k, v in launch.arguments.items() if k in sizes}
        assert varying.keys() == sizes
        constants = {
            p.name: launch.arguments[p.name] for p in launch.kernel.params if p.is_constexpr
        }
        keys.add(tuple(map(str, constants.items())))
        for parameter in launch.kernel.params:
            assert parameter.do_not_specialize == (parameter.name in sizes)
    assert len(keys) == 1


def test_misaligned_teacher_is_read_narrowly_and_nothing_else() -> None:
    """Teacher rows of a padded vocabulary begin elsewhere: only they lose the wide loads.

    The student's padding, 8 elements, leaves its rows where the gradient's are.
    """
    sums, gradient = loops(BLOCKS, {**WIDE, "layout": "padded"})
    assert sums == {("load", 16): 1, ("load", 2): 8}
    assert gradient == {("load", 16): 1, ("load", 2): 8, ("store", 16): 1}


def test_next_token_slices_keep_wide_stores() -> None:
    """logits[:, :-1] at an odd V: the gradient's rows begin elsewhere than the logits' rows."""
    sums, gradient = loops(BLOCKS, {**WIDE, "layout": "next_token"})
    assert sums == {("load", 16): 2}
    assert gradient == {("load", 2): 16, ("store", 16): 1}


def test_both_sums_are_taken_in_the_same_order() -> None:
    """S_s and S_t of identical logits are equal only if their reductions have one layout."""
    mixed = {**WIDE, "teacher": "fp32"}
    for kernel, config in ((BLOCKS, WIDE), (BLOCKS, mixed), (ROWS, PLAIN)):
        launch = static.record(kernel, config)
        text = static.compile_launch(launch, "sm_90").asm["ttgir"]
        tile = rf"{launch.arguments['LANES']}x{launch.arguments['VEC']}"
        layouts = re.findall(rf"\(tensor<{tile}xf32, (#\w+)>\) -> tensor", text)
        assert len(layouts) >= 4 and len(set(layouts)) == 1, layouts


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_backward_reads_and_writes_alike(dtype: str, per_row: bool) -> None:
    config = {"cols": 50257, "student": dtype, "per_row": per_row, "in_place": True}
    (loop,) = loops(SCALE, {**config, "target": "sm_90"})
    assert loop.keys() == {("load", 16), ("store", 16)}
    assert loop["load", 16] == loop["store", 16]
