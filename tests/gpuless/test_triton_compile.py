"""The Triton kernels, compiled ahead of time for each architecture: no GPU is needed.

The headlines of the table for every target, and a pairwise covering set of what else may select
code. Nothing spills; what a headline loads and stores is what the op needs, 16 bytes at a time;
and no figure exceeds the budget of this version of Triton (triton_budgets.json; triton_budgets.py
rewrites it and shows what moved).
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

import covering
import table
import triton
import triton_budgets as budgets
import triton_faults
import triton_static as static

JOBS = {f"{job.kernel.name}: {job.name}": job for job in budgets.jobs()}
HEADLINES = [name for name, job in JOBS.items() if job.name.endswith(f"/{job.target}")]


@pytest.fixture(scope="session")
def compiled() -> dict[str, budgets.Compiled]:
    return dict(zip(JOBS, budgets.compile_all(list(JOBS.values())), strict=True))


@pytest.mark.parametrize("kernel", table.TRITON, ids=lambda k: k.name)
def test_covering_set_covers(kernel: table.TritonKernel) -> None:
    chosen = covering.read(kernel)
    for config in chosen:
        assert config.keys() == kernel.factors.keys(), "rewrite the covering sets"
        assert all(config[name] in values for name, values in kernel.factors.items())
        assert kernel.possible(config)
    assert not covering.missing(kernel, chosen), "rewrite the covering sets"


@pytest.mark.parametrize("name", JOBS)
def test_within_budget(name: str, compiled: dict[str, budgets.Compiled]) -> None:
    result = compiled[name]
    figures = result.figures()
    assert not figures["spills"] and not figures["stack"], figures
    budget = budgets.read()
    if budget is None:
        pytest.skip(f"no budget for Triton {triton.__version__}; the other checks passed")
    before = budget.get(result.job.kernel.name, {}).get(result.job.name)
    assert before is not None, "a new configuration: run triton_budgets.py"
    assert not budgets.exceeded(before, figures), "run triton_budgets.py to see all that moved"


@pytest.mark.parametrize("name", HEADLINES)
def test_headlines_move_what_they_must_and_wide(
    name: str, compiled: dict[str, budgets.Compiled]
) -> None:
    job, launch, code, cost = compiled[name]
    least, passes = job.kernel.least(job.config), job.kernel.passes(launch.arguments)
    assert cost.wide_load == pytest.approx(passes * least.load)
    assert cost.wide_store == pytest.approx(least.store)
    narrow = {access for loop in code.loops for access in loop.accesses if access[1] < 16}
    assert not narrow - job.kernel.uniform, f"in a loop: {narrow}"


@pytest.mark.parametrize("kernel", table.TRITON, ids=lambda k: k.name)
def test_forced_spills_are_seen(kernel: table.TritonKernel) -> None:
    """One warp with few registers has to spill: the negative control of the check above."""
    config = next(iter(kernel.headlines.values()))
    launch = static.record(kernel, config, "sm_90")
    tight = launch._replace(options={**launch.options, "maxnreg": 32, "num_warps": 1})
    code = static.read(static.compile_launch(tight, "sm_90"))
    assert code.spills and code.stack, code


@pytest.mark.parametrize("kernel", table.TRITON, ids=lambda k: k.name)
def test_alignment_that_is_not_told_is_seen(kernel: table.TritonKernel, tmp_path: Path) -> None:
    """Without the hints the accesses are narrow: the negative control of the widths."""
    path = Path(importlib.import_module(kernel.module).__file__ or "")
    hints = [f for f in triton_faults.faults(path) if f.kind == "alignment not told"]
    assert hints
    name, config = next(iter(kernel.headlines.items()))
    budget = (budgets.read() or {}).get(kernel.name, {}).get(f"{name}/sm_90", {"wide_load": 1.0})
    for fault in hints:
        module = triton_faults.module_with(fault, path, tmp_path)
        launch = static.record(kernel, config, "sm_90", module)
        compiled = static.compile_launch(launch, "sm_90")
        cost = static.cost(kernel, launch, compiled, static.read(compiled), "sm_90")
        assert cost.wide_load < budget["wide_load"], str(fault)
