"""The one table of GPU kernels, and what the sources say should be in it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import room_kd
from entries import CudaKernel, TritonKernel

TABLE: tuple[TritonKernel | CudaKernel, ...] = (*room_kd.KERNELS,)
TRITON = tuple(k for k in TABLE if isinstance(k, TritonKernel))
CUDA = tuple(k for k in TABLE if isinstance(k, CudaKernel))

ROOT = Path(__file__).parents[2]
PACKAGE, CSRC = ROOT / "fastdistill", ROOT / "csrc" / "cuda"


def triton_kernels(package: Path = PACKAGE) -> set[tuple[str, str]]:
    """(module, name) of every @triton.jit function that no other one calls: those are launched."""
    found, called = set(), set()
    for path in sorted(package.rglob("*.py")):
        module = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        for function in jit_functions(ast.parse(path.read_text())):
            found.add((module, function.name))
            called |= {
                node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                for node in ast.walk(function)
                if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute))
            }
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
