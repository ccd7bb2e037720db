"""The modelled roofline: of every headline and GPU, from the committed budgets."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

import roofline
import table
import triton_budgets
from entries import Least


def test_the_slowest_resource_bounds() -> None:
    gpu = roofline.GPU("test", "sm_90", bandwidth=100.0, processors=1, clock=10.0, matrix=1000.0)
    figures = {"load": 6.0, "store": 2.0, "ex2": 16.0, "instructions": 128.0}
    figures |= {"wide_load": 6.0, "wide_store": 2.0}
    m = roofline.model(gpu, figures, Least(4.0, 2.0, 2.0, 1000.0))
    want = {"bytes": 0.08, "exponentials": 0.1, "matrix": 1.0, "instructions": 0.1}
    assert m.parts == pytest.approx(want)
    assert m.bound == "matrix" and m.least == 1.0 and m.share == 1.0
    m = roofline.model(gpu, figures, Least(4.0, 2.0, 2.0))
    assert m.bound in ("exponentials", "instructions")
    assert m.least == pytest.approx(0.06) and m.share == pytest.approx(0.6)


@pytest.mark.skipif(triton_budgets.read() is None, reason="no budget for this version of Triton")
def test_every_headline_has_a_model_that_is_possible() -> None:
    found = list(roofline.models())
    seen = {(kernel.name, headline, gpu.name) for kernel, headline, _, gpu, _ in found}
    for kernel in table.TRITON:
        for headline, config in kernel.headlines.items():
            for gpu in roofline.GPUS:
                possible = kernel.possible({**config, "target": gpu.target})
                assert ((kernel.name, headline, gpu.name) in seen) == possible
    for _, _, _, _, m in found:
        assert 0 < m.share <= 1 and m.seconds > 0
