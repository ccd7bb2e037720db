"""What a Triton launch compiles to, found without a GPU.

`launches` runs a launcher on CPU tensors with its kernels replaced by recorders, so that what is
compiled is what would be launched; `compile_launch` compiles it ahead of time for a target, and
`report` reads registers, spills and the width of every memory access from the machine code.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion", "maxnreg"}


class Launch(NamedTuple):
    """One recorded launch."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


class Report(NamedTuple):
    """What one compiled kernel uses. Widths are in bytes, counts in instructions."""

    registers: int
    spills: int  # spilled registers, or accesses to thread-local memory
    shared: int
    accesses: Counter[tuple[str, int]]  # ("load" | "store", width) -> count, in all the code
    loops: list[Counter[tuple[str, int]]]  # the same of each innermost loop that has any


@contextlib.contextmanager
def recording(module: Any) -> Iterator[list[Launch]]:
    """Replace every kernel of `module` by one that records its launches and runs nothing."""
    recorded: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*args: Any, **kwargs: Any) -> None:
                arguments = dict(zip(self.kernel.arg_names, args, strict=False))
                options = {k: v for k, v in kwargs.items() if k in OPTIONS}
                arguments.update((k, v) for k, v in kwargs.items() if k not in OPTIONS)
                recorded.append(Launch(self.kernel, grid, arguments, options))

            return launch

    kernels = {name: k for name, k in vars(module).items() if name.endswith("_kernel")}
    with mock.patch.multiple(module, **{name: Recorder(k) for name, k in kernels.items()}):
        yield recorded


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    """Compile a recorded launch as the just-in-time compiler would, for `target`."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name] = "constexpr"
            constants[name] = value
        elif parameter.annotation_type:
            signature[name] = parameter.annotation_type
        elif hasattr(value, "data_ptr"):
            signature[name] = triton.runtime.jit.mangle_type(value)
            if value.data_ptr() % 16 == 0:
                aligned[(i,)] = [["tt.divisibility", 16]]
        else:
            assert parameter.do_not_specialize, f"{name}: its value would select a kernel"
            signature[name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
    source = ASTSource(launch.kernel, signature, constants, aligned)
    return triton.compile(source, target=target, options=launch.options)


def report(compiled: Any) -> Report:
    """Read the machine code."""
    if "cubin" in compiled.asm:
        return _report_cubin(compiled.asm["cubin"])
    return _report_amdgcn(compiled.asm["amdgcn"])


def _tool(name: str, *args: str) -> str:
    path = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


_SASS_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def _report_cubin(cubin: bytes) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, shared, local = map(int, found.groups())
    instructions: list[tuple[str, int] | None] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    spills = stack + local
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\w+):", line):
            labels[label[1]] = len(instructions)
        elif code := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            name, *modifiers = code[1].split(".")
            access = {"LDG": "load", "STG": "store"}.get(name)
            spills += name in ("LDL", "STL")
            if name == "BRA" and (to := re.search(r"\((\.L_x_\w+)\)", code[2])):
                branches.append((len(instructions), to[1]))
            width = next((_SASS_WIDTHS[m] for m in modifiers if m in _SASS_WIDTHS), 4)
            instructions.append((access, width) if access else None)
    # A loop is what lies between a label and a later branch to it; only innermost ones count.
    spans = {(labels[to], at) for at, to in branches if labels.get(to, at) < at}
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    loops = [Counter(filter(None, instructions[a : b + 1])) for a, b in sorted(inner)]
    accesses = Counter(filter(None, instructions))
    return Report(registers, spills, shared, accesses, [x for x in loops if x])


_AMD_WIDTHS = {"ubyte": 1, "byte": 1, "ushort": 2, "short": 2, "dword": 4, "dwordx2": 8}
_AMD_WIDTHS |= {"dwordx3": 12, "dwordx4": 16}


def _report_amdgcn(text: str) -> Report:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found, name
        return int(found[1])

    # The blocks of a loop may lie anywhere; the compiler's comments say which loop each is in.
    headers = set(re.findall(r"Header=(BB\w+)", text))
    headers |= set(re.findall(r"\.L(BB\w+):.*Loop Header", text))
    accesses: Counter[tuple[str, int]] = Counter()
    loops: dict[str, Counter[tuple[str, int]]] = {name: Counter() for name in sorted(headers)}
    loop = None
    for line in text.splitlines():
        if block := re.match(r"(?:\.L(BB\w+):|; %bb\.\d+:)", line):
            within = re.search(r"Header=(BB\w+)", line)
            loop = within[1] if within else block[1] if block[1] in headers else None
        elif code := re.match(r"\s+(?:buffer|global|flat)_(load|store)_(\w+)", line):
            width = _AMD_WIDTHS[code[2].removesuffix("_hi").removesuffix("_d16")]
            accesses[code[1], width] += 1
            if loop:
                loops[loop][code[1], width] += 1
    # Scalar registers spill into lanes of vector registers, not to memory.
    spills = field("vgpr_spill_count") + field("private_segment_fixed_size")
    shared = field("group_segment_fixed_size")
    return Report(field("vgpr_count"), spills, shared, accesses, [x for x in loops.values() if x])
