"""What the figures of a run depend on, for results.json and the report."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy
import torch

import fastdistill


def versions() -> dict[str, str]:
    """Of everything that takes part in the arithmetic."""
    return {
        "fastdistill": fastdistill.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def describe(device: torch.device) -> dict[str, Any]:
    """Versions, machine and threads."""
    return {
        **versions(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()
