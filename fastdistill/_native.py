"""Loads the compiled modules, and keeps the reason when one cannot be loaded.

They load with the package (3 ms), not at first use: torch.compile cannot trace an import.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch  # first: the kernels share the OpenMP runtime that torch has loaded


class Loaded(NamedTuple):
    """A compiled module, or the reason why there is none."""

    module: ModuleType | None
    reason: str | None


def _load(name: str, hint: str) -> Loaded:
    try:
        return Loaded(importlib.import_module(f"fastdistill.{name}"), None)
    except ImportError as error:
        return Loaded(None, f"fastdistill.{name} did not load ({error}); {hint}")


_CPU = _load("_cpu", "reinstall with a C++ compiler on the path to build it")
_CUDA = _load("_cuda", "it is built where nvcc is found at install time")


def cpu() -> Loaded:
    """The CPU kernels (csrc/cpu)."""
    return _CPU


def cuda() -> Loaded:
    """The CUDA C++ kernels (csrc/cuda); they load without a GPU, and fail at launch there."""
    return _CUDA


def launch_cuda(name: str, device: torch.device, **arguments: Any) -> None:
    """Run a launcher of the CUDA module on `device` and on torch's current stream there."""
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        getattr(_CUDA.module, name)(**arguments, stream=stream)
