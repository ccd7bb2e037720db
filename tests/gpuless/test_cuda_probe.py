"""The CUDA C++ kernels under sanitizers, faults put into them on purpose, and their machine code.

`cuemu/probe_kd.cu` runs one kernel of each kind on small rows. It has to be clean under
AddressSanitizer and UndefinedBehaviorSanitizer, and under ThreadSanitizer with a thread per CUDA
thread. Each fault has to be found, or these checks prove nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_emulation as emulation
import cuda_static as static
import pytest

needs_host_build = pytest.mark.skipif(
    emulation.missing() is not None, reason=str(emulation.missing())
)

PROBE = emulation.EMULATOR / "probe_kd.cu"
MEMORY = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
RACES = ["-O0", "-fsanitize=thread", "-DCUEMU_THREADS", "-pthread"]

FAULTS = {
    # name: (file, what stands there, what takes its place, a word of the report)
    "no barrier": (
        "group.cuh", "__syncthreads();", "", "probe: "
    ),
    "part of a barrier": (
        "group.cuh", "__syncthreads();", "if (threadIdx.x < 32) __syncthreads();", "cuemu: "
    ),
    "lanes beyond the last warp": (
        "group.cuh", "slots[threadIdx.x % warps]", "slots[Warp::rank()]", "probe: "
    ),
    "one slot too few": (
        "group.cuh", "FD_SHARED(V, slots, kMaxThreads / kWarp)", "FD_SHARED(V, slots, 1)",
        "heap-buffer-overflow",
    ),
    "a vector over the end of a row": (
        "chunk.cuh", "if (aligned && first >= 0 && first + kChunk <= cols)",
        "if (aligned && first >= 0 && first < cols)", "heap-buffer-overflow",
    ),
    "an element over the end of a row": (
        "chunk.cuh", "first + i < cols) row", "first + i <= cols) row", "heap-buffer-overflow"
    ),
    "a vector off its boundary": (
        "chunk.cuh", "shift * sizeof(E)) % sizeof(uint4) == 0",
        "shift * sizeof(E)) % sizeof(E) == 0", "misaligned address",
    ),
    "a kept row too short": (
        "kd.cuh", "uint4* to = cache + j;", "uint4* to = cache + j + kWarp;",
        "heap-buffer-overflow",
    ),
    "a maximum of nothing": (
        "kd.cuh", "kLowest = -3.402823466e38f", "kLowest = -INFINITY", "probe: "
    ),
}  # fmt: skip


def build(folder: Path, flags: list[str], sources: Path = emulation.SOURCES) -> Path:
    program = folder / "probe"
    command = emulation.compile_kernels(PROBE, program, flags, sources)
    subprocess.run(command, check=True, capture_output=True, text=True)
    return program


def run(program: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


@needs_host_build
def test_memory_and_undefined_behaviour(tmp_path: Path) -> None:
    program = build(tmp_path, MEMORY)
    for environment in ({}, {"CUEMU_REVERSE": "1"}):
        result = run(program, **environment)
        assert result.returncode == 0 and not result.stderr, result.stderr


@needs_host_build
def test_races(tmp_path: Path) -> None:
    result = run(build(tmp_path, RACES))
    assert result.returncode == 0 and not result.stderr, result.stderr


def put_in(fault: str, folder: Path) -> Path:
    """A copy of the kernels with that fault."""
    name, before, after, _ = FAULTS[fault]
    sources = folder / "csrc"
    shutil.copytree(emulation.SOURCES, sources)
    text = (sources / name).read_text()
    assert text.count(before) == 1, (fault, text.count(before))
    (sources / name).write_text(text.replace(before, after))
    return sources


@needs_host_build
def test_faults_are_found(tmp_path: Path) -> None:
    def report(fault: str) -> str:
        folder = tmp_path / fault.replace(" ", "-")
        folder.mkdir()
        result = run(build(folder, MEMORY, put_in(fault, folder)))
        return result.stderr if result.returncode != 0 else ""

    with ThreadPoolExecutor(2) as pool:
        reports = dict(zip(FAULTS, pool.map(report, FAULTS), strict=True))
    missed = {f: r[:300] for f, r in reports.items() if FAULTS[f][3] not in r}
    assert not missed, missed


@needs_host_build
def test_a_race_is_found(tmp_path: Path) -> None:
    result = run(build(tmp_path, RACES, put_in("no barrier", tmp_path)))
    assert "ThreadSanitizer: data race" in result.stderr


@pytest.mark.skipif(static.missing() is not None, reason=str(static.missing()))
@pytest.mark.parametrize("architecture", static.ARCHITECTURES)
def test_machine_code(architecture: str, tmp_path: Path) -> None:
    """For the probe's kernels; `python tests/gpuless/cuda_static.py` looks at all of them."""
    kernels = static.compile_for(architecture, PROBE, tmp_path)
    assert len(kernels) == 6
    complaints = [c for kernel in kernels for c in static.complaints(kernel)]
    assert not complaints, complaints
