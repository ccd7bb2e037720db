"""What only the softmaxes promise of their compiled kernels; see test_triton_compile.py."""

from __future__ import annotations

import os
from typing import Any

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

import room_softmax
import triton_static as static
from room_softmax import LEARNED, WIDE

from fastdistill.softmax import triton as softmax_triton


@pytest.mark.parametrize("kernel", room_softmax.TRITON[1::2], ids=lambda k: k.name)
def test_softmax_one_kernel_serves_every_vocabulary(kernel: Any) -> None:
    """The sizes select nothing, so a new V does not compile again."""
    keys = set()
    for cols in (50257, 49999, 128255):
        launch = static.record(kernel, {**WIDE, **LEARNED, "cols": cols})
        varying = {p.name for p in launch.kernel.params if p.do_not_specialize}
        assert varying == set(softmax_triton._SIZES) & set(launch.arguments)
        constants = [launch.arguments[p.name] for p in launch.kernel.params if p.is_constexpr]
        keys.add(tuple(map(str, constants)))
    assert len(keys) == 1
