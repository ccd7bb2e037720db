"""The plan of a run: which measurement in which fresh process, and what comes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from bench import report, schema
from bench.environment import Others
from bench.timing import QUIET

ROOT = Path(__file__).parent.parent
ALLOCATORS = ("default", "thp")
ISA_SHAPES = [(512, 32000), (2048, 1024), (8192, 100)]
ISA_TURNS = 3


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


def measure(settings: Settings, say: Callable[[str], None]) -> dict:
    """{"schema", "seconds", "environments", "rows"}; a row names its environment by index."""
    begin = time.perf_counter()
    results: dict = {"schema": schema.VERSION, "seconds": 0.0, "environments": [], "rows": []}
    patience = 0.0 if settings.quick else settings.patience
    for spec, variables in _plan(settings):
        patience -= Others.wait(QUIET, patience)
        found = _in_fresh_process(spec, variables)
        for row in found["rows"]:
            row["environment"] = len(results["environments"])
        results["environments"].append(found["environment"])
        results["rows"] += found["rows"]
        say(report.table(found))
    results["seconds"] = round(time.perf_counter() - begin, 1)
    say(f"{len(results['rows'])} rows in {results['seconds']:.0f} s")
    return results


def _plan(s: Settings):
    """(spec of one worker, its environment variables) in the order in which they run."""
    cpu = s.device == "cpu"
    threads = torch.get_num_threads()
    everything = [threads] if s.quick or threads == 1 or not cpu else [threads, 1]
    allocators = s.allocators or (ALLOCATORS[:1] if s.quick or not cpu else ALLOCATORS)
    base = {
        "op": s.op,
        "device": s.device,
        "dtypes": s.dtypes,
        "threads": s.threads or everything,
        "contenders": s.contenders,
        "memory": True,
        "seconds": 1.0 if s.quick else 6.0,
        "least": 3 if s.quick else 7,
        "most": 50 if s.quick else 500,
    }
    for allocator in allocators:
        variables = {"THP_MEM_ALLOC_ENABLE": "1" if allocator == "thp" else "0"}
        for shape in s.shapes:
            yield {**base, "suite": "main", "shape": shape, "allocator": allocator}, variables
    if not cpu or s.quick or s.contenders:
        return
    levels = _isa_levels()[:2]
    for shape in [x for x in ISA_SHAPES if x in s.shapes and s.op == "kd"]:
        alone = {**base, "suite": "isa", "shape": shape, "allocator": "default", "memory": False}
        alone.update(contenders=["fastdistill"], threads=base["threads"][:1], seconds=3.0)
        for _ in range(ISA_TURNS):  # in turn: a level is chosen once per process
            for level in levels:
                yield alone, {"THP_MEM_ALLOC_ENABLE": "0", "FASTDISTILL_CPU_ISA": level}


def _isa_levels() -> list[str]:
    from fastdistill import _native

    module = _native.cpu().module
    return [name for name, has in module.isas() if has] if module else []


def _in_fresh_process(spec: dict, variables: dict[str, str]) -> dict:
    # One compiling thread: a pool of them would still be awake while the next contender is timed.
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", **variables}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "bench.worker", json.dumps(spec), str(path)]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        return json.loads(path.read_text())
