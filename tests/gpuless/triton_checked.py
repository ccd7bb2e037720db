"""Every Triton kernel of the table under Triton's interpreter: the covering set, then its faults.

Runs in a process of its own, with TRITON_INTERPRET=1 from the start; test_triton_interpreter.py
starts it. Outputs are NaN inside guard zones, inputs lie in NaN, accesses and promises of
alignment are checked (triton_shim.py), results are compared with float64.
"""

from __future__ import annotations

import importlib
import math
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import covering
import pytest
import table
import torch
import triton_faults
import triton_shim
from entries import Config, TritonKernel
from torch import Tensor
from triton.runtime.errors import InterpreterError

assert os.environ.get("TRITON_INTERPRET") == "1", __doc__
triton_shim.install()
torch.set_num_threads(1)  # small tensors: threads would only wait for one another

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on inf and NaN
GUARD = 64
REAL_EMPTY = torch.empty


class poisoned:  # noqa: N801 - used as a function
    """Allocations are NaN inside guard zones, which must be untouched at the end."""

    def __enter__(self) -> None:
        self.made: list[tuple[Tensor, int]] = []
        self.real = torch.empty, torch.empty_like

        def empty(*shape: Any, **options: Any) -> Tensor:
            if len(shape) == 1 and not isinstance(shape[0], int):
                shape = tuple(shape[0])
            n = math.prod(shape)
            whole = REAL_EMPTY(n + 2 * GUARD, **options)
            if not whole.is_floating_point():
                return whole[:n].view(shape)
            self.made.append((whole.fill_(float("nan")), n))
            return whole[GUARD : GUARD + n].view(shape)

        torch.empty = empty
        torch.empty_like = lambda x: empty(x.shape, dtype=x.dtype, device=x.device)

    def __exit__(self, *error: object) -> None:
        torch.empty, torch.empty_like = self.real
        if error[0] is None:
            for whole, n in self.made:
                beside = (whole[:GUARD], whole[GUARD + n :])
                assert all(x.isnan().all() for x in beside), "wrote beside a tensor"


CASES = [
    pytest.param(kernel, config, id=f"{kernel.name}: {' '.join(map(str, config.values()))}")
    for kernel in table.TRITON
    for config in (*kernel.faults, *covering.read(kernel))
]


@pytest.mark.parametrize(("kernel", "config"), CASES)
def test_values_gradients_and_accesses(kernel: TritonKernel, config: Config) -> None:
    module = importlib.import_module(kernel.module)
    with poisoned(), static_target(kernel, module, config):
        kernel.check(module, config)


def static_target(kernel: TritonKernel, module: ModuleType, config: Config) -> Any:
    import triton_static

    return triton_static.on(config["target"], module, kernel.architecture)


CHECKS = {
    "bounds": "out of bounds",
    "alignment": "false alignment",
    "types": "bfloat16 arithmetic",
    "guard zones": "wrote beside",
}


def caught_by(kernels: tuple[TritonKernel, ...], module: ModuleType) -> str | None:
    """The check that a module fails; None where it passes all."""
    for kernel in kernels:
        for config in kernel.faults:
            try:
                with poisoned(), static_target(kernel, module, config):
                    kernel.check(module, config)
            except (AssertionError, InterpreterError) as error:  # nothing else: not a broken test
                report = f"{error} {error.__cause__}"
                return next((c for c, word in CHECKS.items() if word in report), "values")
    return None


def looked_at(module: str) -> list[triton_faults.Fault]:
    """The faults that a run can show; the others show in what is compiled."""
    path = Path(importlib.import_module(module).__file__ or "")
    return [f for f in triton_faults.faults(path) if f.kind != "alignment not told"]


def test_every_fault_is_found(tmp_path: Path) -> None:
    for name in dict.fromkeys(kernel.module for kernel in table.TRITON):
        kernels = tuple(k for k in table.TRITON if k.module == name)
        path = Path(importlib.import_module(name).__file__ or "")
        excused = {place for k in kernels for place in k.harmless}
        outcomes: dict[str, str | None] = {}
        for fault in looked_at(name):
            # Those that have the function first: the others are asked where it is a helper's.
            own = sorted(kernels, key=lambda k: k.name != fault.function)  # noqa: B023
            module = triton_faults.module_with(fault, path, tmp_path)
            outcomes[str(fault)] = caught_by(tuple(own), module)
        for fault_name, check in outcomes.items():
            print(f"{fault_name} -> {check or 'SURVIVES'}")
        survivors = {name for name, check in outcomes.items() if check is None}
        assert survivors == excused, (
            f"found none: {survivors - excused}; needless: {excused - survivors}"
        )
        for kernel in kernels:  # each family has faults of these checks
            assert any(kernel.name in place for place in outcomes), kernel.name
        assert {"values", "bounds"} <= set(outcomes.values())
