"""Faults put by program into copies of the Triton kernels: the negative controls of the checks.

Every place in a room's triton.py, and in the functions that it takes from fastdistill/_triton.py,
where a fault of one of these kinds can be made gives one copy of the module, found in its syntax
tree; the rest of the text stays as it is.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import table

SHARED = "fastdistill._triton"


class Fault(NamedTuple):
    """One change of a module's text."""

    path: Path
    kind: str
    function: str
    code: str  # what stands there
    nth: int  # of this kind, function and code
    begin: int  # bytes of the text that are replaced,
    end: int
    instead: str  # and by what

    def __str__(self) -> str:
        again = f" (#{self.nth})" if self.nth > 1 else ""
        return f"{self.kind}: {self.function}: {self.code}{again}"


def _changes(node: ast.AST, source: bytes) -> Iterator[tuple[str, ast.AST, str]]:
    """(kind, what is replaced, by what) of the faults that begin at `node`."""

    def text(part: ast.AST) -> str:
        return ast.get_source_segment(source.decode(), part) or ""

    match node:
        case ast.Compare(left=left, ops=[ast.Lt()], comparators=[ast.Name(id=bound)]):
            if bound.islower():  # names in capitals are no sizes
                yield "mask loosened", node, f"{text(left)} <= {bound}"
        case ast.For(iter=ast.Call(func=ast.Name(id="range"), args=[first, end, step]) as call):
            shorter = f"range({text(first)}, {text(end)} - {text(step)}, {text(step)})"
            yield "tail missing", call, shorter
        case ast.Expr(value=ast.Call(func=ast.Attribute(attr="store")) as call):
            yield "store missing", call, "None"
        case ast.Attribute(value=ast.Name(id="tl"), attr="int64"):
            yield "offset of 32 bits", node, "tl.int32"
        case ast.Call(
            func=ast.Attribute(value=ast.Call(func=ast.Attribute(attr="load")) as load, attr="to")
        ):
            yield "arithmetic in the narrow type", node, text(load)
        case ast.If(test=ast.BoolOp(op=ast.And(), values=[first, *_]) as test, body=body):
            if any("multiple_of" in text(part) for part in body):
                yield "false alignment", first, "True"
                yield "alignment not told", test, "False"


def faults(path: Path) -> list[Fault]:
    """All that can be made in a room's module and in the functions it shares with other rooms."""
    text = path.read_text()
    shared = table.PACKAGE / "_triton.py"
    needed = {
        name.name
        for node in ast.parse(text).body
        if isinstance(node, ast.ImportFrom) and node.module == SHARED
        for name in node.names
    }
    return _of(path) + [f for f in _of(shared) if f.function in needed]


def _of(path: Path) -> list[Fault]:
    """Those of one file, in the order of its text."""
    source = path.read_bytes()
    starts = [0, *itertools.accumulate(len(x) for x in source.splitlines(keepends=True))]
    found: list[Fault] = []
    for function in table.jit_functions(ast.parse(source)):
        for node in ast.walk(function):
            for kind, part, instead in _changes(node, source):
                begin = starts[part.lineno - 1] + part.col_offset  # type: ignore[attr-defined]
                end = starts[part.end_lineno - 1] + part.end_col_offset  # type: ignore[attr-defined]
                code = " ".join(source[begin:end].decode().split())
                here = (kind, function.name, code)
                nth = 1 + sum((f.kind, f.function, f.code) == here for f in found)
                found.append(Fault(path, *here, nth, begin, end, instead))
    return found


def module_with(fault: Fault, path: Path, folder: Path) -> ModuleType:
    """A copy of the room's module at `path` with that fault, loaded from `folder`."""
    source = fault.path.read_bytes()
    source = source[: fault.begin] + fault.instead.encode() + source[fault.end :]
    if fault.path == path:
        return _loaded(source, folder)
    with mock.patch.dict(sys.modules, {SHARED: _loaded(source, folder)}):
        return _loaded(path.read_bytes(), folder)


def _loaded(source: bytes, folder: Path) -> ModuleType:
    name = f"faulty_{len(list(folder.iterdir()))}"
    copy = folder / f"{name}.py"
    copy.write_bytes(source)
    spec = importlib.util.spec_from_file_location(name, copy)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
