"""The Triton kernels of kd_loss, compiled ahead of time for each architecture: no GPU is needed.

No spills, 128-bit accesses in every loop and for every row held in registers, and no more
registers than the budget of this version of Triton, in triton_budgets.json. After a change that is
meant to move them, `python tests/gpuless/test_triton_compile.py` rewrites that version's budget
and prints what moved. Bytes per class are modelled from the code, not measured.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

import triton
import triton_static as static

from fastdistill.kd import triton as kd_triton

BUDGETS = Path(__file__).with_name("triton_budgets.json")
ARCHITECTURES = {"sm_80": "sm_8", "sm_90": "sm_9", "sm_100": "sm_10", "gfx942": "gfx9"}
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


class Case(NamedTuple):
    """A call whose kernel is compiled."""

    cols: int
    student: torch.dtype = BF16
    teacher: torch.dtype = BF16
    options: dict[str, Any] = {}  # noqa: RUF012 - read only

    def bytes_per_class(self, passes: int) -> tuple[int, int]:
        """What it should load and store."""
        width = self.student.itemsize
        if self.options.get("soft_weight") != 0.0:
            width += self.teacher.itemsize
        return passes * width, self.student.itemsize * self.options.get("need_grad", True)


SMOOTH_REVERSE = {"divergence": "reverse_kl", "label_smoothing": 0.1}
CASES = {
    "bf16-100": Case(100),
    "bf16-1000": Case(1000),
    "fp32-1000": Case(1000, F32, F32),
    "bf16-2001-reverse": Case(2001, options=SMOOTH_REVERSE),
    "bf16-4001": Case(4001),
    "bf16-5001": Case(5001),
    "bf16-8192": Case(8192),
    "bf16-32000": Case(32000),
    "bf16-50257": Case(50257),
    "bf16-50257-soft": Case(50257, options={"hard_weight": 0.0, "temperature": 1.0}),
    "bf16-50257-hard": Case(50257, options={"soft_weight": 0.0, "label_smoothing": 0.1}),
    "bf16-50257-reverse": Case(50257, options=SMOOTH_REVERSE),
    "bf16-50257-values": Case(50257, options={"need_grad": False}),
    "fp16-50257-reverse": Case(50257, F16, F16, SMOOTH_REVERSE),
    "fp32-50257": Case(50257, F32, F32),
    "bf16-fp32-50257": Case(50257, BF16, F32),
    "fp64-50257": Case(50257, F64, F64),
}
ARGUMENTS = {
    "temperature": 2.0,
    "hard_weight": 0.5,
    "soft_weight": 1.0,
    "divergence": "forward_kl",
    "scale_t2": True,
    "ignore_index": -100,
    "label_smoothing": 0.0,
    "reduction": "mean",
    "divisor": 1.0,
    "need_grad": True,
}


def test_the_longest_rows_that_are_read_once() -> None:
    for cols, target in ((8192, "sm_90"), (8192, "sm_80"), (8192, "gfx942"), (2048, "sm_100")):
        assert "ROWS" in forward(Case(cols), target).arguments
        assert "ROWS" not in forward(Case(cols + 1), target).arguments


def forward(case: Case, target: str, rows: int = 4) -> static.Launch:
    student = torch.zeros(rows, case.cols, dtype=case.student)
    teacher = torch.zeros(rows, case.cols, dtype=case.teacher)
    return record(student, teacher, target, **case.options)


def record(
    student: torch.Tensor, teacher: torch.Tensor, target: str, **options: Any
) -> static.Launch:
    labels = torch.zeros(student.shape[:-1], dtype=torch.int64)
    arguments = {**ARGUMENTS, **options}
    with on(target), static.recording(kd_triton) as launches:
        kd_triton.kd_fwd(student, teacher, labels, None, None, None, **arguments)
    (launch,) = launches
    return launch


class on:  # noqa: N801 - used as a function
    """The launchers see the configurations of `target`."""

    def __init__(self, target: str) -> None:
        name = ARCHITECTURES[target]
        self.patch = mock.patch.object(kd_triton, "_architecture", lambda device: name)

    def __enter__(self) -> None:
        kd_triton._config.cache_clear()
        self.patch.start()

    def __exit__(self, *_: object) -> None:
        self.patch.stop()
        kd_triton._config.cache_clear()


def bytes_per_class(
    launch: static.Launch, report: static.Report, target: str
) -> tuple[float, float]:
    """Loaded and stored by 128-bit accesses for each class of a tile, all passes together."""
    arguments = launch.arguments
    tile = arguments["LANES"] * arguments["VEC"] * arguments.get("ROWS", 1)
    threads = launch.options["num_warps"] * static.TARGETS[target].warp_size
    if "ROWS" in arguments:  # no loop
        wide = report.accesses
    else:  # without the loop that fills the gradient of a dropped row with zeros
        passes = [x for x in report.loops if any(kind == "load" for kind, _ in x)]
        wide = sum(passes, start=type(report.accesses)())
    load, store = (wide[kind, 16] * 16 * threads / tile for kind in ("load", "store"))
    return load, store


def compiled(name: str, target: str) -> tuple[static.Launch, static.Report]:
    launch = forward(CASES[name], target)
    return launch, static.report(static.compile_launch(launch, static.TARGETS[target]))


def check(name: str, target: str) -> int:
    """The compiled kernel is as wide and as free of spills as it should be; its registers."""
    launch, report = compiled(name, target)
    assert report.spills == 0, report
    narrow = {key for loop in report.loops for key in loop if key[1] < 16}
    assert not narrow, f"in a loop: {narrow}"
    passes = 1 if "ROWS" in launch.arguments else 2
    want = CASES[name].bytes_per_class(passes)
    assert bytes_per_class(launch, report, target) == want, report
    return report.registers


def budgets() -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}


@pytest.mark.parametrize("target", ARCHITECTURES)
@pytest.mark.parametrize("name", CASES)
def test_compiled(name: str, target: str) -> None:
    registers = check(name, target)
    budget = budgets().get(triton.__version__)
    if budget is None:
        pytest.skip(f"no budget for Triton {triton.__version__}; the other checks passed")
    assert registers <= budget[target][name], "run this file to see all differences"


def test_one_kernel_serves_every_vocabulary() -> None:
    """The sizes select nothing, so a new V or batch does not compile again."""
    keys = set()
    for cols, rows in ((50257, 4), (49999, 1), (128255, 7)):
        launch = forward(CASES["bf16-50257"]._replace(cols=cols), "sm_90", rows)
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
    """Teacher rows of a padded vocabulary begin elsewhere: only they lose the wide loads."""
    student = torch.zeros(4, 50257, dtype=BF16)
    teacher = torch.zeros(4, 50304, dtype=BF16)[:, :50257]
    launch = record(student, teacher, "sm_90")
    report = static.report(static.compile_launch(launch, static.TARGETS["sm_90"]))
    sums, gradient = (x for x in report.loops if ("load", 16) in x)
    assert sums == {("load", 16): 1, ("load", 2): 8}
    assert gradient == {("load", 16): 1, ("load", 2): 8, ("store", 16): 1}


def test_next_token_slices_keep_wide_stores() -> None:
    """logits[:, :-1] at an odd V: the gradient's rows begin elsewhere than the logits' rows."""
    student, teacher = (torch.zeros(2, 4, 50257, dtype=BF16)[:, :-1] for _ in range(2))
    launch = record(student, teacher, "sm_90")
    report = static.report(static.compile_launch(launch, static.TARGETS["sm_90"]))
    sums, gradient = (x for x in report.loops if ("load", 16) in x or ("load", 2) in x)
    assert sums == {("load", 16): 2}
    assert gradient == {("load", 2): 16, ("store", 16): 1}


def test_both_sums_are_taken_in_the_same_order() -> None:
    """S_s and S_t of identical logits are equal only if their reductions have one layout."""
    for name in ("bf16-50257", "bf16-fp32-50257", "bf16-1000"):
        launch = forward(CASES[name], "sm_90")
        text = static.compile_launch(launch, static.TARGETS["sm_90"]).asm["ttgir"]
        tile = rf"{launch.arguments['LANES']}x{launch.arguments['VEC']}"
        layouts = re.findall(rf"\(tensor<{tile}xf32, (#\w+)>\) -> tensor", text)
        assert len(layouts) >= 4 and len(set(layouts)) == 1, layouts


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_backward_compiled(dtype: torch.dtype, per_row: bool) -> None:
    grad = torch.zeros(4, 50257, dtype=dtype)
    scale = torch.zeros(4 if dtype is F16 else 0)
    for target in ARCHITECTURES:
        with on(target), static.recording(kd_triton) as launches:
            kd_triton.kd_bwd_(grad, scale, torch.zeros(4) if per_row else torch.zeros(()))
        report = static.report(static.compile_launch(launches[0], static.TARGETS[target]))
        (loop,) = report.loops
        assert report.spills == 0
        assert loop.keys() == {("load", 16), ("store", 16)}
        assert loop["load", 16] == loop["store", 16]


def main() -> None:
    """Rewrite the budgets of the installed Triton and print what changed."""
    everything = budgets()
    old = everything.get(triton.__version__, {})
    new: dict[str, dict[str, int]] = {target: {} for target in ARCHITECTURES}
    for target, name in itertools.product(ARCHITECTURES, CASES):
        launch, report = compiled(name, target)
        before, after = old.get(target, {}).get(name), report.registers
        new[target][name] = after
        load, store = bytes_per_class(launch, report, target)
        print(
            f"{target:6} {name:19} registers {before} -> {after}{' *' * (before != after)}, "
            f"{report.spills} spills, {load:g} + {store:g} bytes per class"
        )
    everything[triton.__version__] = new
    BUDGETS.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
