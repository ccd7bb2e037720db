"""The one table of GPU kernels, and what the sources say should be in it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import room_hint
import room_kd
import room_privacy
import room_softmax
from entries import CudaKernel, TritonKernel

TABLE: tuple[TritonKernel | CudaKernel, ...] = (
    *room_kd.KERNELS,
    *room_softmax.KERNELS,
    *room_hint.KERNELS,
    *room_privacy.KERNELS,
)
TRITON = tuple(k for k in TABLE if isinstance(k, TritonKernel))
CUDA = tuple(k for k in TABLE if isinstance(k, CudaKernel))

ROOT = Path(__file__).parents[2]
PACKAGE, CSRC = ROOT / "fastdistill", ROOT / "csrc" / "cuda"


def triton_kernels(package: Path = PACKAGE) -> set[tuple[str, str]]:
    """(module, name) of every @triton.jit function that no other one calls: those are launched."""
    found, called = set(), set()
    for path in sorted(package.rglob("*.py")):
        module = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        tree = ast.parse(path.read_text())
        imports = (node for node in tree.body if isinstance(node, ast.ImportFrom))
        real = {name.asname: name.name for node in imports for name in node.names if name.asname}
        for function in jit_functions(tree):
            found.add((module, function.name))
            calls = {
                node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                for node in ast.walk(function)
                if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute))
            }
            called |= {real.get(name, name) for name in calls}
    return {(module, name) for module, name in found if name not in called}


def jit_functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    """Those with a decorator `jit`, `triton.jit` or `triton.jit(...)`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                d = decorator.func if isinstance(decorator, ast.Call) else decorator
                if (d.attr if isinstance(d, ast.Attribute) else getattr(d, "id", "")) == "jit":
                    yield node


def cuda_kernels(folder: Path = CSRC) -> set[tuple[str, str]]:
    """(file, name) of every __global__ function."""
    found = set()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".cu", ".cuh", ".h", ".inl"):
            code = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
            for head in re.findall(r"__global__(.*?)\{", code, re.DOTALL):
                head = re.sub(r"__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)", "", head)
                found.add((path.relative_to(folder).as_posix(), head.split("(")[0].split()[-1]))
    return found
