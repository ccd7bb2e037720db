"""Builds the CUDA C++ backend for the host, under cuemu/cuemu.h, and makes it a backend of tests.

Everything but the GPU is the real thing: the kernels' source, their launchers, the pybind11 module
and the Python launcher. `FASTDISTILL_CUEMU_FLAGS` adds compiler flags, such as sanitizers.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
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

import torch

from fastdistill import _backend
from fastdistill.kd import native_cuda, ops

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
        for source in sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*.cpp")]):
            objects.append(work / f"{source.stem}.o")
            if source.suffix == ".cu":
                commands.append(compile_kernels(source, objects[-1], ["-c", *flags]))
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
    """The real launcher, on the emulated module."""
    spec = importlib.util.spec_from_file_location("fastdistill_emulated._cuda", path)
    assert spec is not None and spec.loader is not None
    compiled = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compiled)

    spec = importlib.util.find_spec(native_cuda.__name__)
    assert spec is not None and spec.loader is not None
    launcher = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launcher)

    def launch(name: str, device: torch.device, **arguments: Any) -> None:
        getattr(compiled, name)(**arguments, stream=0)

    launcher._launch = launch  # type: ignore[attr-defined]
    return launcher


@contextlib.contextmanager
def registered(launcher: ModuleType) -> Iterator[None]:
    """`fastdistill.backend("cuda-emulated")` works inside, on CPU tensors."""
    table = dict(_backend.ops()["kd_loss"])

    def refuse(case: _backend.Case) -> str | None:
        return None if native_cuda.supports(*case.dtypes) else "element types"

    ops._modules[NAME] = launcher
    _backend.register("kd_loss", {**table, NAME: refuse})
    try:
        yield
    finally:
        _backend.register("kd_loss", table)
        del ops._modules[NAME]
