"""One measurement: one shape, one allocator, one instruction set, in a process of its own.

`python -m bench.worker '<json>' <file>` writes {"environment": ..., "rows": [...]} there.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import torch

from bench import environment, errors, limits, memory
from bench.cases import DTYPES, OPS, Contender, Inputs, Op
from bench.timing import PASSES, QUIET, CudaSteps, Step, Turns, cpu_step, in_turn, summary

NOISY_SPREAD = 0.15


def measure(spec: dict) -> dict:
    """All dtypes in turn within one round, so that they can be compared; then the next threads."""
    op = OPS[spec["op"]]
    device = spec["device"]
    about = environment.describe(device)
    peaks = {}
    if device == "cpu" and spec["memory"]:  # first: a fork has to come before the first thread
        for dtype in spec["dtypes"]:
            for name, found in _chosen(op, spec, dtype).items():
                if not found.unavailable:
                    peaks[dtype, name] = memory.cpu_peak(op, name, tuple(spec["shape"]), dtype)
    inputs = {dtype: op.inputs(tuple(spec["shape"]), dtype, device) for dtype in spec["dtypes"]}
    rows = []
    for threads in spec["threads"]:
        torch.set_num_threads(threads)
        torch._dynamo.reset()  # code for another number of threads is other code
        rows += _rows(op, spec, inputs, peaks)
    return {"environment": about, "rows": rows}


def _chosen(op: Op, spec: dict, dtype: str) -> dict[str, Contender]:
    known = op.contenders(spec["device"], dtype)
    names = spec["contenders"] or [name for name in known if name != "wrong"]
    return {name: known[name] for name in names}


def _rows(op: Op, spec: dict, inputs: dict[str, Inputs], peaks: dict) -> list[dict]:
    cuda = CudaSteps() if spec["device"] == "cuda" else None
    steps: dict[tuple[str, str], Step] = {}
    about: dict[str, dict] = {}
    for dtype, x in inputs.items():
        contenders, skipped, first = _ready(_chosen(op, spec, dtype), x)
        if cuda:
            for name, c in contenders.items():
                peaks[dtype, name] = memory.cuda_peak(c, x)
        pieces = limits.steps(op.limit, x, cuda)
        about[dtype] = {
            "contenders": contenders,
            "skipped": skipped,
            "first_call_s": first,
            "error": errors.of_all(op, contenders, x),
            "pieces": list(pieces),
        }
        for name, c in contenders.items():
            steps[dtype, name] = cuda.step(c, x) if cuda else cpu_step(c, x)
        for name, step in pieces.items():
            steps[dtype, name] = step
    turns = in_turn(steps, spec["seconds"], spec["least"], spec["most"])
    return [
        _row(op, spec, dtype, kind, turns, about[dtype], peaks)
        for dtype in inputs
        for kind in PASSES
    ]


def _ready(found: dict[str, Contender], x: Inputs) -> tuple[dict, dict, dict]:
    """Those that run here, why the others do not, and the seconds of each first call."""
    ready, skipped, first = {}, {}, {}
    for name, contender in found.items():
        if contender.unavailable:
            skipped[name] = contender.unavailable
            continue
        begin = time.perf_counter()
        try:
            contender.loss(x).backward()
        except Exception as error:
            if name != "compile":
                raise
            # The one rival that needs a tool of its own: a C++ compiler, or Triton.
            skipped[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        first[name] = round(time.perf_counter() - begin, 3)
        ready[name] = contender
    x.forget()
    return ready, skipped, first


def _row(op: Op, spec: dict, dtype: str, kind: str, turns: Turns, about: dict, peaks: dict) -> dict:
    stats = {name: summary(turns.samples[dtype, name][kind]) for name in about["contenders"]}
    pieces = {name: summary(turns.samples[dtype, name]["both"]) for name in about["pieces"]}
    limit = None
    if kind == "both":  # the fused forward makes the gradient: only the whole has a limit
        limit = limits.combine({n: s["median"] for n, s in pieces.items()}, spec["device"])
    logits = math.prod(spec["shape"][:2]) * DTYPES[dtype].itemsize  # bytes of one array
    ms = {name: s["median"] for name, s in stats.items()}
    if limit:
        ms["limit"] = limit["ms"]
    spread = {name: s["iqr"] / s["median"] for name, s in stats.items()}
    wide = [f"{name} {v:.0%}" for name, v in spread.items() if v > NOISY_SPREAD]
    noisy = [f"quartiles far apart ({', '.join(wide)})"] if wide else []
    if (turns.others or 0.0) > QUIET:
        noisy.append(f"other processes took {turns.others:.0%} of the machine")
    return {
        "op": op.name,
        "suite": spec["suite"],
        "shape": spec["shape"],
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "device": spec["device"],
        "allocator": spec["allocator"],
        "isa": environment.isa(),
        "pass": kind,
        "ms": ms,
        "iqr_ms": {name: s["iqr"] for name, s in stats.items()},
        "repetitions": turns.kept,
        "dropped": turns.dropped,
        "disturbed": (turns.others or 0.0) > QUIET,
        "gb_per_s": {
            name: about["contenders"][name].passes * logits / s["median"] / 1e6
            for name, s in stats.items()
        },
        "limit": limit,
        "error": about["error"],
        "right": {n: errors.acceptable(e, dtype) for n, e in about["error"].items()},
        "peak_mb": {name: peaks.get((dtype, name)) for name in stats},
        "first_call_s": about["first_call_s"],
        "skipped": about["skipped"],
        "noisy": noisy,
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(measure(json.loads(sys.argv[1]))))
