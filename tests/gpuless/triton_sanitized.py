"""The Triton kernels under triton-viz's sanitizer, which proves accesses in bounds symbolically.

    python tests/gpuless/triton_sanitized.py        each kernel, then one with a loosened mask

In a process of its own, on the pinned Triton (it works with 3.7, not with 3.9). It follows what
depends on program ids, sizes and loop counters; where control or a mask depends on what was loaded
it stops with an error of its own. Those launches it is not asked for: the interpreter's check of
every address (triton_shim.py) has them.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a program, from anywhere

import table
import torch
import triton
import triton_faults
import triton_static
import triton_viz
from entries import Config, TritonKernel
from triton_viz.clients import Sanitizer

CANNOT = (NotImplementedError, RuntimeError)
torch.set_num_threads(1)


def look(kernel: TritonKernel, config: Config, module: ModuleType) -> str:
    """ "clean", "out of bounds", or "not followed: ..."."""
    name = kernel.name
    traced = triton_viz.trace(Sanitizer(abort_on_error=True))(getattr(module, name))
    original = getattr(module, name)
    setattr(module, name, traced)
    try:
        with triton_static.on(config["target"], module, kernel.architecture):
            kernel.call(module, config)
    except SystemExit:
        return "out of bounds"
    except triton.runtime.errors.InterpreterError as error:
        cause = error.__cause__
        if isinstance(cause, CANNOT):
            return f"not followed: {cause}"
        raise
    finally:
        setattr(module, name, original)
    return "clean"


def main() -> int:
    status = 0
    for kernel in table.TRITON:
        module = importlib.import_module(kernel.module)
        path = Path(module.__file__ or "")
        if not kernel.sanitized:
            print(f"{kernel.name}: not asked for: {kernel.not_sanitized}")
            continue
        for config in kernel.sanitized:
            found = look(kernel, config, module)
            print(f"{kernel.name} {list(config.values())}: {found}", flush=True)
            status |= found != "clean"
        masks = [f for f in triton_faults.faults(path) if f.kind == "mask loosened"]
        caught = False
        for fault in (f for f in masks if f.function == kernel.name):
            with tempfile.TemporaryDirectory() as folder:
                faulty = triton_faults.module_with(fault, path, Path(folder))
                found = look(kernel, kernel.sanitized[0], faulty)
            print(f"{fault} -> {found}", flush=True)
            caught |= found == "out of bounds"
        if not caught:
            print(f"{kernel.name}: no loosened mask was found")
            status = 1
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
