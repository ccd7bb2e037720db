"""Builds the CUDA C++ backend for the host, under cuemu/cuemu.h, and makes it a backend of tests.

Everything but the GPU is the real thing: the kernels' source, their launchers, the pybind11 module
and the Python launcher. `FASTDISTILL_CUEMU_FLAGS` adds compiler flags, such as sanitizers.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import pkgutil
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

import fastdistill
from fastdistill import _backend, _native

NAME = "cuda-emulated"
HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc" / "cuda"
EMULATOR = HERE / "cuemu"

FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
# The kernels read vectors of one type from memory of another, as CUDA allows.
KERNEL_FLAGS = [*FLAGS, "-fno-strict-aliasing", "-include", str(EMULATOR / "cuemu.h")]


def cuda_headers() -> Path | None:
    """Where cuda_bf16.h and cuda_fp16.h are: the triton wheel ships them."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        return None
    include = Path(found.origin).parent / "backends" / "nvidia" / "include"
    return include if (include / "cuda_bf16.h").exists() else None


def missing() -> str | None:
    """Why the emulation cannot be built here, or None."""
    if platform.machine() != "x86_64":
        return f"cuemu.h switches fibers in x86-64 assembly; this is {platform.machine()}"
    if shutil.which("g++") is None:
        return "no g++"
    if cuda_headers() is None:
        return "no CUDA headers: they come with the triton wheel"
    if importlib.util.find_spec("pybind11") is None:
        return "no pybind11"
    return None


def _cache() -> Path:
    path = Path(tempfile.gettempdir()) / f"fastdistill-cuemu-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


_BOUNDS = r"__launch_bounds__\s*\(((?:[^()]|\([^()]*\))*)\)"
_BOUNDED = re.compile(rf"(__global__[^;{{]*?{_BOUNDS}[^;{{]*\{{)")


def instrumented(sources: Path, folder: Path) -> Path:
    """A copy of `sources` whose kernels check their launch bounds, line by line the same."""
    shutil.copytree(sources, folder)
    for path in folder.rglob("*"):
        if path.suffix in (".cu", ".cuh", ".h", ".inl"):
            path.write_text(_BOUNDED.sub(r"\1 cuemu::launch_bounds(\2);", path.read_text()))
    return folder


def compile_kernels(
    source: Path, output: Path, flags: list[str], sources: Path = SOURCES
) -> list[str]:
    """The command that compiles `source` for the host, with the kernels in `sources`."""
    headers = cuda_headers()
    assert headers is not None
    include = ["-I", str(EMULATOR), "-I", str(sources), "-isystem", str(headers)]
    return ["g++", "-x", "c++", *KERNEL_FLAGS, *include, *flags, str(source), "-o", str(output)]


def _digest(parts: list[str], files: list[Path]) -> str:
    digest = hashlib.sha256("\0".join(parts).encode())
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build() -> Path:
    """The compiled module `_cuda`, built at most once for the same sources and flags."""
    import pybind11

    flags = ["-O2", *shlex.split(os.environ.get("FASTDISTILL_CUEMU_FLAGS", ""))]
    files = [p for folder in (SOURCES, EMULATOR) for p in folder.rglob("*") if p.is_file()]
    key = _digest([*KERNEL_FLAGS, *flags, sys.version, pybind11.__version__], files)
    folder = _cache() / key
    module = folder / "_cuda.so"
    if module.exists():
        return module
    with tempfile.TemporaryDirectory(dir=_cache()) as name:
        work = Path(name)
        python = ["-I", sysconfig.get_paths()["include"], "-I", pybind11.get_include()]
        objects = []
        commands = []
        sources = instrumented(SOURCES, work / "cuda")
        for source in sorted([*sources.glob("*.cu"), *sources.glob("*.cpp")]):
            objects.append(work / f"{source.stem}.o")
            if source.suffix == ".cu":
                commands.append(compile_kernels(source, objects[-1], ["-c", *flags], sources))
            else:
                bindings = ["-O0", "-c", str(source), "-o", str(objects[-1])]
                commands.append(["g++", *FLAGS, *python, *bindings])
        running = [subprocess.Popen(c, stderr=subprocess.PIPE, text=True) for c in commands]
        for process in running:
            errors = process.communicate()[1]
            assert process.returncode == 0 and not errors, errors  # a warning fails too
        built = work / "_cuda.so"
        link = ["g++", "-shared", *flags, *map(str, objects), "-o", str(built)]
        subprocess.run(link, check=True)
        folder.mkdir(exist_ok=True)
        built.rename(module)  # atomic: another process may be building the same
    return module


def load(path: Path) -> ModuleType:
    """The emulated module."""
    spec = importlib.util.spec_from_file_location("fastdistill_emulated._cuda", path)
    assert spec is not None and spec.loader is not None
    compiled = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compiled)
    return compiled


def launcher(compiled: ModuleType, name: str) -> ModuleType:
    """A copy of a room's real launcher `name`, on the emulated module."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)

    def launch(name: str, device: torch.device, **arguments: Any) -> None:
        getattr(compiled, name)(**arguments, stream=0)

    copy._launch = launch  # type: ignore[attr-defined]
    return copy


def rooms() -> dict[str, ModuleType]:
    """room -> its `ops`, of every room with CUDA launchers."""
    found = {}
    for info in pkgutil.iter_modules(fastdistill.__path__, "fastdistill."):
        if info.ispkg and importlib.util.find_spec(f"{info.name}.native_cuda"):
            found[info.name.rpartition(".")[2]] = importlib.import_module(f"{info.name}.ops")
    return found


@contextlib.contextmanager
def as_backend(
    name: str, like: str, launchers: dict[str, ModuleType], native: _native.Loaded | None = None
) -> Iterator[None]:
    """`fastdistill.backend(name)` works inside, on CPU tensors, with these launchers per room.

    It refuses what the real backend `like` refuses on a GPU that has what `native` says.
    """
    tables = {op: dict(table) for op, table in _backend.ops().items()}
    ops = rooms()
    for room, module in launchers.items():
        ops[room].launcher.modules[name] = module
    with mock.patch.object(_native, "_CUDA", native or _native._CUDA):
        for op, table in tables.items():
            if like in table:
                real = table[like]

                def refuse(case: _backend.Case, real: Any = real) -> str | None:
                    return real(case._replace(device="cuda"))

                _backend.register(op, {**table, name: refuse})
        try:
            yield
        finally:
            for op, table in tables.items():
                _backend.register(op, table)
            for room in launchers:
                del ops[room].launcher.modules[name]


def registered(compiled: ModuleType) -> contextlib.AbstractContextManager[None]:
    """`fastdistill.backend("cuda-emulated")` works inside, in every room."""
    launchers = {
        room: launcher(compiled, ops.launcher.names["cuda"]) for room, ops in rooms().items()
    }
    return as_backend(NAME, "cuda", launchers, _native.Loaded(compiled, None))
