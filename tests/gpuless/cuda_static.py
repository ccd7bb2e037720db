"""What nvcc makes of the CUDA kernels: registers, spills, shared memory, width of accesses.

As a program: a table of all kernels for both architectures, and an error where one spills or does
not access memory 16 bytes at a time. Runs nothing on a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
ARCHITECTURES = ("sm_80", "sm_90")
FLAGS = ["-O3", "-std=c++17", "-ftz=true"]


class Kernel(NamedTuple):
    """One compiled kernel."""

    architecture: str
    name: str
    registers: int
    shared: int  # bytes, static
    spills: int  # bytes
    loads: int  # instructions of 16 bytes from global memory,
    stores: int  # and to it
    local: int  # accesses to local memory: spills, or an array that was indexed at run time


def _tool(name: str) -> str | None:
    """nvcc from the path or the usual place; cuobjdump also from the triton wheel."""
    triton = importlib.util.find_spec("triton")
    wheel = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else None
    places = [os.environ.get("PATH", ""), "/usr/local/cuda/bin", str(wheel or "")]
    return shutil.which(name, path=os.pathsep.join(filter(None, places)))


def missing() -> str | None:
    """Why the compiled code cannot be looked at here, or None."""
    absent = [name for name in ("nvcc", "cuobjdump", "c++filt") if _tool(name) is None]
    return f"not found: {', '.join(absent)}" if absent else None


def _short(symbol: str) -> str:
    name = re.sub(r"\(fd::(Kd|Scale)Params\)|^void |\(fd::Divergence\)|fd::", "", symbol)
    return name.replace("__nv_bfloat16", "bf16").replace("__half", "f16").replace("> >", ">>")


def compile_for(architecture: str, source: Path, folder: Path) -> list[Kernel]:
    """Every kernel of `source`, compiled for an architecture such as "sm_90"."""
    nvcc, cuobjdump = _tool("nvcc"), _tool("cuobjdump")
    assert nvcc is not None and cuobjdump is not None
    binary = folder / f"{architecture}.cubin"
    command = [nvcc, *FLAGS, f"-arch={architecture}", "-cubin", "-Xptxas", "-v", "-I", str(SOURCES)]
    compiled = subprocess.run(
        [*command, str(source), "-o", str(binary)], check=True, capture_output=True, text=True
    )
    code = subprocess.run(
        [cuobjdump, "-sass", str(binary)], check=True, capture_output=True, text=True
    ).stdout
    listings = dict(
        part.split("\n", 1) for part in re.split(r"^\s*Function : ", code, flags=re.MULTILINE)[1:]
    )
    used = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)",
        compiled.stderr,
        re.DOTALL,
    )
    names = subprocess.run(
        ["c++filt"], input="\n".join(u[0] for u in used), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    kernels = []
    for (symbol, stores, loads, registers, rest), name in zip(used, names, strict=True):
        shared = re.search(r"(\d+) bytes smem", rest)
        listing = listings[symbol]
        kernels.append(
            Kernel(
                architecture,
                _short(name),
                int(registers),
                int(shared.group(1)) if shared else 0,
                int(stores) + int(loads),
                len(re.findall(r"\bLDG\.E\.128", listing)),
                len(re.findall(r"\bSTG\.E\.128", listing)),
                len(re.findall(r"\b(?:LDL|STL)\b", listing)),
            )
        )
    return sorted(kernels, key=lambda kernel: kernel.name)


def complaints(kernel: Kernel) -> list[str]:
    """What is wrong with a kernel's code."""
    who = f"{kernel.architecture} {kernel.name}"
    found = []
    if kernel.spills or kernel.local:
        found.append(f"{who}: {kernel.spills} bytes spilled, {kernel.local} local accesses")
    if not kernel.loads or not kernel.stores:
        found.append(f"{who}: no loads or no stores of 16 bytes")
    if "InRegisters" not in kernel.name and kernel.registers > 64:
        found.append(f"{who}: {kernel.registers} registers, over 64: no block of 1024 threads")
    return found


def main() -> int:
    """Print the table; 1 where there is a complaint."""
    reason = missing()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for architecture in ARCHITECTURES:
            for kernel in compile_for(architecture, SOURCES / "kd.cu", Path(folder)):
                print(
                    f"{kernel.architecture}  {kernel.registers:3} registers"
                    f"  {kernel.spills} spilled  {kernel.shared:4} shared  {kernel.loads:2} LDG.128"
                    f"  {kernel.stores:2} STG.128  {kernel.name}"
                )
                found += complaints(kernel)
    print("\n".join(found), file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
