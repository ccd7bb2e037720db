"""What the table of kernels is made of: one entry per kernel that a launcher starts.

An entry says how to call the kernel and what to expect of it; every check of this folder runs for
every entry. docs/verification.md tells how to add one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch

Config = dict[str, Any]
"""Factor -> value, as it stands in the committed covering set: strings, numbers and booleans."""

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


class Least(NamedTuple):
    """What any implementation has to do for one element (a class of a row, say)."""

    load: float  # bytes
    store: float  # bytes
    exponentials: float = 0.0
    matrix_flops: float = 0.0


class TritonKernel(NamedTuple):
    """One @triton.jit function that a launcher starts.

    `factors` are what may select other compiled code or another path through it; "target" is
    always one of them. A covering set meets each pair of their values (`possible` says which
    configurations there are). `call` and `check` are given the module of the launchers, which may
    be a copy with a fault in it.
    """

    name: str
    module: str  # where it and its launcher are
    factors: Mapping[str, tuple[Any, ...]]
    possible: Callable[[Config], bool]
    call: Callable[[ModuleType, Config], None]  # start the launcher once, on tensors of the CPU
    check: Callable[[ModuleType, Config], None]  # its results against float64, or AssertionError
    tile: Callable[[Mapping[str, Any]], int]  # arguments -> elements that a program holds at once
    least: Callable[[Config], Least]
    passes: Callable[[Mapping[str, Any]], float]  # arguments -> how often it reads each element
    headlines: Mapping[str, Config]  # for all targets: of these the roofline is drawn
    architecture: str  # the name in `module` that tells a launcher its target, for a patch
    faults: tuple[Config, ...]  # configurations on which faults are looked for
    harmless: Mapping[str, str] = {}  # a fault that changes nothing -> why
    uniform: frozenset[tuple[str, int]] = frozenset()  # accesses in loops that all threads share
    sanitized: tuple[Config, ...] = ()  # configurations that triton-viz's sanitizer can follow,
    not_sanitized: str = ""  # or why it cannot
    measured: Callable[[tuple[int, ...], str], Config] | None = None  # (shape, dtype) of `bench`

    @property
    def room(self) -> str:
        return self.module.split(".")[1]


class CudaKernel(NamedTuple):
    """One __global__ function of csrc/cuda.

    `probe` is a program that runs it on small rows and checks them against plain loops in double.
    It is built with sanitizers, with faults, and for a GPU; it has an instance of each variant.
    """

    name: str
    room: str
    source: str  # the file in csrc/cuda that has the kernel
    probe: str  # the file in cuemu/
    headers: tuple[str, ...]  # files of csrc/cuda that faults are put into
    harmless: Mapping[str, str] = {}
    wide: tuple[str, ...] = ("load", "store")  # what it does 16 bytes at a time
