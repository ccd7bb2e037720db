"""What the roofline predicts of the Triton kernels, beside what was measured on a GPU."""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

GPULESS = Path(__file__).parent.parent / "tests" / "gpuless"


def add_models(rows: list[dict], device: str) -> None:
    """Put what the roofline says of the Triton kernel beside what was measured."""
    if importlib.util.find_spec("triton") is None:
        for row in rows:
            row["modelled"] = {"skipped": "no triton"}
        return
    if str(GPULESS) not in sys.path:
        sys.path.append(str(GPULESS))
    import roofline

    gpu = roofline.of_name(device)
    for row in rows:
        if gpu is None:
            row["modelled"] = {"skipped": f"no peak rates are known of {device}"}
            continue
        if row["pass"] != "both":  # the fused forward makes the gradient: backward has no model
            row["modelled"] = None
            continue
        found = _predict(roofline, row["op"], tuple(row["shape"]), row["dtype"], gpu)
        if found is None:
            row["modelled"] = {"skipped": f"no kernel of the table says what {row['op']} runs"}
            continue
        kernel, model = found
        elements = math.prod(row["shape"])
        row["modelled"] = {
            "gpu": gpu.name,
            "kernel": kernel,
            "ms": model.seconds * elements * 1e3,
            "bound": model.bound,
            "least_ms": model.least * elements * 1e3,
            "measured_over_modelled": {
                name: ms / (model.seconds * elements * 1e3) for name, ms in row["ms"].items()
            },
        }


@functools.cache
def _predict(roofline: Any, *case: Any) -> Any:
    return roofline.predict(*case)
