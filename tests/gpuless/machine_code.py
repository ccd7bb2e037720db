"""Registers, spills, access widths and instruction mix, read from machine code. No GPU is needed.

`sass` reads a cubin, of Triton or of nvcc, with cuobjdump and nvdisasm, which ship in the triton
wheel; `amdgcn` reads the assembly that Triton makes for AMD.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

Accesses = Counter[tuple[str, int]]  # ("load" | "store", width in bytes) of global memory -> count


class Loop(NamedTuple):
    """An innermost loop that loads, stores or takes exponentials; or all the code."""

    accesses: Accesses
    mix: Counter[str]  # kind of instruction -> count


class Code(NamedTuple):
    """What one compiled kernel uses; counts are in instructions."""

    registers: int
    stack: int  # bytes of local memory that a thread has
    spills: int  # accesses to it (on AMD: spilled vector registers)
    shared: int  # bytes, static
    everything: Loop
    loops: list[Loop]


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: from the path, the usual place, or the triton wheel."""
    triton = importlib.util.find_spec("triton")
    wheel = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else ""
    places = [os.environ.get("PATH", ""), "/usr/local/cuda/bin", str(wheel)]
    return shutil.which(name, path=os.pathsep.join(filter(None, places)))


def _run(name: str, *args: str) -> str:
    path = tool(name)
    assert path is not None, f"{name} not found"
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


# ----------------------------------------------------------------------------------------------
# NVIDIA.

_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_KINDS = {  # the first pattern that fits names the kind
    "ex2": r"MUFU\.EX2",
    "special": r"MUFU",
    "matrix": r"[HIDQ]?G?MMA|UTC\w*MMA",
    "float": r"[FHD](ADD|MUL|FMA|SETP|SET|SEL|MNMX|CHK|SWZADD)|FMNMX|HADD|HFMA|F2F|F2FP|I2F|F2I",
    "global": r"LDG|STG|LDGSTS|RED|ATOMG",
    "shared": r"LDS|STS|LDSM|STSM|ATOMS",
    "local": r"LDL|STL",
    "shuffle": r"SHFL|REDUX",
    "barrier": r"BAR|UCGABAR|SYNCS|BARRIER",
}
_PATTERNS = {kind: re.compile(pattern) for kind, pattern in _KINDS.items()}


def _kind(opcode: str) -> str:
    return next((k for k, pattern in _PATTERNS.items() if pattern.match(opcode)), "other")


def sass(path: Path | str) -> dict[str, Code]:
    """Mangled name -> code, of every kernel of a cubin."""
    usage = _run("cuobjdump", "--dump-resource-usage", str(path))
    listing = _run("nvdisasm", "-c", str(path))
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    parts = re.split(r"^\s*\.section\s+\.text\.([^,\s]+).*$", listing, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    kernels = {}
    for name, registers, stack, shared, local in found:
        everything, loops = _sections(sections[name])
        kernels[name] = Code(
            int(registers), int(stack) + int(local), everything.mix["local"], int(shared),
            everything, loops,
        )  # fmt: skip
    return kernels


def _sections(text: str) -> tuple[Loop, list[Loop]]:
    code: list[tuple[str, tuple[str, int] | None]] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            opcode, *modifiers = found[1].split(".")
            if opcode == "BRA" and (to := re.search(r"\((\.L_x_\w+)\)", found[2])):
                branches.append((len(code), to[1]))
            access = {"LDG": "load", "LDGSTS": "load", "STG": "store"}.get(opcode)
            width = next((_WIDTHS[m] for m in modifiers if m in _WIDTHS), 4)
            code.append((_kind(found[1]), (access, width) if access else None))
    # A loop is what lies between a label and a later branch to it; only innermost ones count.
    spans = {(labels[to], at) for at, to in branches if labels.get(to, at) < at}
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    loops = [_counted(code[a : b + 1]) for a, b in sorted(inner)]
    return _counted(code), [x for x in loops if x.accesses or x.mix["ex2"]]


def _counted(code: list[tuple[str, tuple[str, int] | None]]) -> Loop:
    return Loop(Counter(a for _, a in code if a), Counter(kind for kind, _ in code))


def ptx_bytes(text: str) -> list[int]:
    """Bytes of the accesses in each of PTX's innermost loops that load (or in all the code).

    ptxas may unroll a loop; what it made of it divided by this is how often.
    """
    code: list[tuple[str, int]] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in text.splitlines():
        if label := re.match(r"(\$L\w+):", line):
            labels[label[1]] = len(code)
        elif to := re.search(r"\bbra(?:\.uni)?\s+(\$L\w+)", line):
            branches.append((len(code), to[1]))
        elif found := re.search(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[a-z](\d+)\b", line):
            code.append((found[1], int(found[2] or 1) * int(found[3]) // 8))
        elif found := re.search(
            r"\bcp\.async\.c[ag]\.shared\.global.*?\], (0x[0-9a-f]+|\d+)", line
        ):
            code.append(("ld", int(found[1], 0)))
    spans = {(labels[to], at) for at, to in branches if labels.get(to, at) < at}
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    loops = [code[a:b] for a, b in sorted(inner) if any(kind == "ld" for kind, _ in code[a:b])]
    return [sum(width for _, width in loop) for loop in loops or [code]]


# ----------------------------------------------------------------------------------------------
# AMD.

_AMD_WIDTHS = {"ubyte": 1, "byte": 1, "ushort": 2, "short": 2, "dword": 4, "dwordx2": 8}
_AMD_WIDTHS |= {"dwordx3": 12, "dwordx4": 16}
_AMD_KINDS = {
    "ex2": r"v_exp_",
    "special": r"v_(log|rcp|rsq|sqrt|sin|cos)_",
    "matrix": r"v_mfma",
    "float": r"v_\w+_(f16|f32|f64|bf16)",
    "global": r"(buffer|global|flat)_",
    "shared": r"ds_(read|write|load|store)",
    "local": r"scratch_",
    "shuffle": r"ds_(bpermute|permute|swizzle)|v_readlane|v_\w+_dpp",
    "barrier": r"s_barrier",
}
_AMD_PATTERNS = {kind: re.compile(pattern) for kind, pattern in _AMD_KINDS.items()}


def amdgcn(text: str) -> Code:
    """The code of the one kernel in `text`."""

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found, name
        return int(found[1])

    # The blocks of a loop may lie anywhere; the compiler's comments say which loop each is in.
    headers = set(re.findall(r"Header=(BB\w+)", text))
    headers |= set(re.findall(r"\.L(BB\w+):.*Loop Header", text))
    everything = Loop(Counter(), Counter())
    loops = {name: Loop(Counter(), Counter()) for name in sorted(headers)}
    loop = None
    for line in text.splitlines():
        if block := re.match(r"(?:\.L(BB\w+):|; %bb\.\d+:)", line):
            within = re.search(r"Header=(BB\w+)", line)
            loop = within[1] if within else block[1] if block[1] in headers else None
        elif found := re.match(r"\s+([a-z]+_\w+)", line):
            opcode = found[1]
            kind = next((k for k, p in _AMD_PATTERNS.items() if p.match(opcode)), "other")
            access = re.match(r"(?:buffer|global|flat)_(load|store)_(\w+)", opcode)
            for part in [everything] + ([loops[loop]] if loop else []):
                part.mix[kind] += 1
                if access:
                    width = access[2].removesuffix("_hi").removesuffix("_d16")
                    part.accesses[access[1], _AMD_WIDTHS[width]] += 1
    kept = [x for x in loops.values() if x.accesses or x.mix["ex2"]]
    # Scalar registers spill into lanes of vector registers, not to memory.
    return Code(
        field("vgpr_count"), field("private_segment_fixed_size"), field("vgpr_spill_count"),
        field("group_segment_fixed_size"), everything, kept,
    )  # fmt: skip
