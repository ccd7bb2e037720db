"""The machine code of the CUDA kernels, where nvcc is found: spills, widths, budgets."""

from __future__ import annotations

import re
from pathlib import Path

import cuda_static as static
import pytest
import table

pytestmark = pytest.mark.skipif(static.missing() is not None, reason=str(static.missing()))


@pytest.mark.parametrize("architecture", static.ARCHITECTURES)
def test_within_budget(architecture: str, tmp_path: Path) -> None:
    """`python tests/gpuless/cuda_static.py` rewrites the budgets and shows what moved."""
    seen = set()
    budget = static.read()
    for probe in dict.fromkeys(k.probe for k in table.CUDA):
        for name, code in static.compile_for(architecture, probe, tmp_path).items():
            seen.add(name.split("<")[0])
            now = static.figures(code)
            assert not code.spills and not code.stack, (name, now)
            for kind in next(k.wide for k in table.CUDA if k.name == name.split("<")[0]):
                assert code.everything.accesses[kind, 16], f"{name}: no {kind} of 16 bytes"
            if budget is not None:
                before = budget.get(architecture, {}).get(name)
                assert before is not None, f"{name} is new: run cuda_static.py"
                assert not static.budgets.exceeded(before, now), name
    assert seen == {k.name for k in table.CUDA}
    if budget is None:
        pytest.skip(f"no budget for nvcc {static.version()}; the other checks passed")


@pytest.mark.parametrize("probe", dict.fromkeys(k.probe for k in table.CUDA))
def test_forced_spills_are_seen(probe: str, tmp_path: Path) -> None:
    """The negative control, in every kernel; launch bounds would overrule the flag."""
    for path in table.CSRC.iterdir():
        text = re.sub(r"__launch_bounds__\((?:[^()]|\([^()]*\))*\)", "", path.read_text())
        (tmp_path / path.name).write_text(text)
    found = static.compile_for("sm_90", probe, tmp_path, "-maxrregcount=24", sources=tmp_path)
    tight = {name.split("<")[0] for name, code in found.items() if code.spills and code.stack}
    assert tight == {k.name for k in table.CUDA if k.probe == probe}
