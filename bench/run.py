"""The plan of a run: which measurement in which fresh process, and what comes of it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bench import curves, modelled, peers, report, schema
from bench.environment import Others
from bench.op import DTYPES
from bench.timing import QUIET

ROOT = Path(__file__).parent.parent
ALLOCATORS = ("default", "thp")
ISA_SHAPES = [(512, 32000), (2048, 1024), (8192, 100)]
ISA_TURNS = 3
NEAR_ELEMENTS = 1 << 24  # up to here inputs that are nearly alike are looked at too
PEER_SHAPES = {"kd": (512, 32000)}
GRID_OPS = ("kd", "softmax")
GRID_CLASSES = (10, 1000, 32000, 50257, 128256, 262144)
GRID_ROWS = (1, 16, 256, 4096, 16384)
GRID_ARRAYS = 8  # of the logits' size at once: inputs, gradient, and what eager makes besides
QUICK = ["fastdistill", "triton", "cuda", "eager", "cross_entropy_alone"]  # nothing to compile
QUICK_ELEMENTS = 1 << 23
MEMORY_GB = {"cpu": 1.0, "cuda": 16.0}


class Settings(NamedTuple):
    """What was asked for; None means all."""

    op: str
    device: str
    shapes: list[tuple[int, ...]]
    dtypes: list[str]
    threads: list[int] | None
    allocators: list[str] | None
    contenders: list[str] | None
    quick: bool
    patience: float = 0.0  # seconds that the run may wait, in all, for other processes to finish
    suites: tuple[str, ...] = ("main",)
    memory_gb: float | None = None  # of the largest case of the grid

    def all_threads(self) -> list[int]:
        """All, then one."""
        found = torch.get_num_threads()
        cpu = self.device == "cpu"
        one = [found] if self.quick or found == 1 or not cpu else [found, 1]
        return self.threads or one

    def all_allocators(self) -> list[str]:
        """Torch's own, then huge pages for every contender."""
        cpu = self.device == "cpu"
        return self.allocators or list(ALLOCATORS[:1] if self.quick or not cpu else ALLOCATORS)


Plan = Iterator[tuple[dict, dict[str, str]]]
"""(spec of one worker, its environment variables) in the order in which they run."""


def measure(settings: Settings, say: Callable[[str], None]) -> dict:
    """Results as schema.py describes; a row names its environment by index."""
    begin = time.perf_counter()
    results: dict = {"schema": schema.VERSION, "seconds": 0.0, "environments": [], "rows": []}
    patience = 0.0 if settings.quick else settings.patience
    for suite in settings.suites:
        for spec, variables in SUITES[suite](settings):
            for case in spec.pop("left_out", []):
                results.setdefault("left_out", []).append(case)
                say(f"left out: {case}")
            if not spec["shapes"]:
                continue
            patience -= Others.wait(QUIET, patience)
            found = _in_fresh_process(spec, variables)
            if settings.device == "cuda" and suite == "main":
                modelled.add_models(found["rows"], found["environment"]["gpu"])
            for row in found["rows"]:
                row["environment"] = len(results["environments"])
            results["environments"].append(found["environment"])
            results["rows"] += found["rows"]
            say(report.table(found))
    results["seconds"] = round(time.perf_counter() - begin, 1)
    say(f"{len(results['rows'])} rows in {results['seconds']:.0f} s")
    return results


def _base(s: Settings, suite: str, **changes: object) -> dict:
    base = {
        "op": s.op,
        "suite": suite,
        "device": s.device,
        "dtypes": s.dtypes,
        "threads": s.all_threads(),
        "allocator": s.all_allocators()[0],
        "contenders": s.contenders or (QUICK if s.quick else None),
        "memory": True,
        "near": False,
        "seconds": 0.3 if s.quick else 3.0,
        "least": 3 if s.quick else 5,
        "most": 50 if s.quick else 500,
    }
    return {**base, **changes}


def _variables(allocator: str) -> dict[str, str]:
    return {"THP_MEM_ALLOC_ENABLE": "1" if allocator == "thp" else "0"}


def _main(s: Settings) -> Plan:
    for i, allocator in enumerate(s.all_allocators()):
        for shape in s.shapes:
            if s.quick and math.prod(shape[:2]) > QUICK_ELEMENTS:
                continue
            near = i == 0 and math.prod(shape) <= NEAR_ELEMENTS
            about = {"shapes": [shape], "allocator": allocator, "near": near}
            yield _base(s, "main", **about), _variables(allocator)


def _isa(s: Settings) -> Plan:
    """The instruction sets in turn: a level is chosen once per process."""
    if s.device != "cpu" or s.quick or s.contenders or s.op != "kd":
        return
    for shape in [x for x in ISA_SHAPES if x in s.shapes]:
        alone = _base(
            s, "isa", shapes=[shape], allocator="default", memory=False,
            contenders=["fastdistill"], threads=s.all_threads()[:1], seconds=2.0,
        )  # fmt: skip
        for _ in range(ISA_TURNS):
            for level in _isa_levels()[:2]:
                yield alone, {**_variables("default"), "FASTDISTILL_CPU_ISA": level}


def _peers(s: Settings) -> Plan:
    """Other libraries beside ours and eager."""
    if s.op in PEER_SHAPES and not s.contenders and not s.quick:
        names = ["fastdistill", "triton", "cuda", "eager", *peers.OF_LOGITS]
        about = {"contenders": names, "near": True, "threads": s.all_threads()[:1]}
        shapes = [PEER_SHAPES[s.op]]
        yield _base(s, "peers", shapes=shapes, **about), _variables(s.all_allocators()[0])


def _grid(s: Settings) -> Plan:
    """Classes x rows, as far as the memory goes."""
    if s.op not in GRID_OPS:
        return
    budget = (s.memory_gb or MEMORY_GB[s.device]) * 1e9
    for classes in (1000, 50257) if s.quick else GRID_CLASSES:
        for dtype in ["fp32"] if s.quick else list(DTYPES):
            shapes, left_out = [], []
            for rows in (16, 256) if s.quick else GRID_ROWS:
                need = rows * classes * GRID_ARRAYS * DTYPES[dtype].itemsize
                if need <= budget:
                    shapes.append((rows, classes))
                else:
                    left_out.append(
                        f"{s.op} {rows}x{classes} {dtype}: takes {need / 1e9:.1f} GB with eager's "
                        f"temporaries, {budget / 1e9:g} GB are allowed (--memory-gb)"
                    )
            names = s.contenders or ["fastdistill", "triton", "cuda", "eager"]
            yield _base(
                s, "grid", shapes=shapes, dtypes=[dtype], left_out=left_out, memory=False,
                contenders=names, seconds=0.2, least=3, most=100,
            ), _variables(s.all_allocators()[0])  # fmt: skip


def _curves(s: Settings) -> Plan:
    """Along one size at a time, with memory; `op` of the settings does not matter."""
    for op, axis, shapes, which in curves.AXES:
        chosen = shapes[::2] if s.quick else shapes
        yield _base(
            s, "curves", op=op, shapes=chosen, threads=s.all_threads()[:1],
            about=[{"axis": axis, "at": shape[which]} for shape in chosen],
            contenders=s.contenders or ["fastdistill", "triton", "cuda", "eager"],
            seconds=0.3, least=3, most=200,
        ), _variables(s.all_allocators()[0])  # fmt: skip


SUITES: dict[str, Callable[[Settings], Plan]] = {
    "main": _main,
    "isa": _isa,
    "peers": _peers,
    "grid": _grid,
    "curves": _curves,
}


def _isa_levels() -> list[str]:
    from fastdistill import _native

    module = _native.cpu().module
    return [name for name, has in module.isas() if has] if module else []


def allocator() -> str:
    """This process's: torch has read it at start."""
    return ALLOCATORS[os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"]


def in_each(allocators: Sequence[str], arguments: list[str]) -> dict:
    """The results of `python -m bench ARGUMENTS`, run in a fresh process for each allocator."""
    together: dict = {"schema": schema.VERSION, "seconds": 0.0, "environments": [], "rows": []}
    for name in allocators:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.json"
            command = [sys.executable, "-m", "bench", *arguments, "--allocator", name]
            done = subprocess.run(
                [*command, "--json", str(path)], cwd=ROOT, env={**os.environ, **_variables(name)}
            )
            if not path.exists():  # status 1 alone: something was wrong, and the rows tell
                raise subprocess.CalledProcessError(done.returncode, done.args)
            found = json.loads(path.read_text())
        for row in found["rows"]:
            row["environment"] += len(together["environments"])
        together["seconds"] += found["seconds"]
        for name_of_list in ("environments", "rows"):
            together[name_of_list] += found[name_of_list]
    return together


def _in_fresh_process(spec: dict, variables: dict[str, str]) -> dict:
    # One compiling thread: a pool of them would still be awake while the next contender is timed.
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", **variables}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "bench.worker", json.dumps(spec), str(path)]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        return json.loads(path.read_text())
