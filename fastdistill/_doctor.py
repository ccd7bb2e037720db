"""`fastdistill doctor`: what is there, and which backend each op would take."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator

import torch

import fastdistill
from fastdistill import _backend, _native

_PACKAGES = ("torch", "triton", "numpy", "opacus")
_CASES = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16))


def report() -> str:
    """Versions, instruction set, threads, GPU, and the choice of backend per op and device."""
    return "\n".join(_lines())


def main() -> int:
    """Print the report."""
    print(report())
    return 0


def _lines() -> Iterator[str]:
    yield f"fastdistill {fastdistill.__version__}, Python {platform.python_version()}, " + (
        f"{platform.system()} {platform.machine()}"
    )
    for name in _PACKAGES:
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{name} is not installed"
    yield from _cpu_lines()
    yield from _gpu_lines()
    wanted = os.environ.get(_backend.ENVIRONMENT_VARIABLE)
    yield f"backend requested: {_backend.requested()}" + (
        f" ({_backend.ENVIRONMENT_VARIABLE}={wanted})" if wanted else ""
    )
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for op in _backend.ops():
        for device in devices:
            for dtypes in _CASES:
                yield from _op_lines(op, _backend.Case(device, dtypes, False))


def _cpu_lines() -> Iterator[str]:
    module, reason = _native.cpu()
    yield f"threads: {torch.get_num_threads()} (torch.get_num_threads())"
    if module is None:
        yield f"CPU kernels: none; {reason}"
        return
    try:
        active = module.active_isa()
    except RuntimeError as error:  # FASTDISTILL_CPU_ISA names what this processor has not
        active = f"none: {error}"
    levels = ", ".join(f"{name}{'' if has else ' (not here)'}" for name, has in module.isas())
    yield f"CPU kernels: instruction set {active}; built: {levels}; OpenMP {module.openmp}"


def _gpu_lines() -> Iterator[str]:
    if not torch.cuda.is_available():
        yield f"GPU: none (torch {torch.__version__} sees no CUDA device)"
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        yield f"GPU {i}: {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"
    module, reason = _native.cuda()
    yield "CUDA C++ kernels: built" if module else f"CUDA C++ kernels: none; {reason}"


def _op_lines(op: str, case: _backend.Case) -> Iterator[str]:
    names = " and ".join(str(d).removeprefix("torch.") for d in case.dtypes)
    try:
        yield f"{op} on {case.device}, {names}: {_backend.choose(op, case)}"
    except RuntimeError as error:
        yield f"{op} on {case.device}, {names}: {error}"
    for name, reason in _backend.reasons(op, case).items():
        if reason is not None:
            yield f"    not {name}: {reason}"
