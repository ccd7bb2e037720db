"""One measurement: some shapes, one allocator, one instruction set, in a process of its own.

`python -m bench.worker '<json>' <file>` writes {"environment": ..., "rows": [...]} there.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from bench import environment, errors, limits, memory, peers
from bench.curves import EVERY
from bench.op import DTYPES, Contender, Inputs, Limit, Op
from bench.timing import (
    PASSES,
    QUIET,
    REPLAY,
    CudaSteps,
    Step,
    Turns,
    cpu_step,
    in_turn,
    summary,
)

NOISY_SPREAD = 0.15
REPLAYED_ELEMENTS = 1 << 20  # up to here a step on a GPU is launches rather than work


class Prepared(NamedTuple):
    """A dtype's contenders, checked, and what is known before time is taken."""

    contenders: dict[str, Contender]
    skipped: dict[str, str]
    first_call_s: dict[str, float]
    error: dict[str, dict[str, float]]
    near: dict[str, dict[str, float]]
    pieces: list[str]
    limit: Limit
    x: Inputs


def measure(spec: dict) -> dict:
    """All dtypes in turn within one round, so that they can be compared; then the next threads."""
    op, device = EVERY[spec["op"]], spec["device"]
    about = environment.describe(device)
    peaks: dict = {}
    if device == "cpu" and spec["memory"]:  # first: a fork has to come before the first thread
        for shape in spec["shapes"]:
            for dtype in spec["dtypes"]:
                for name, found in _chosen(op, spec, dtype).items():
                    if not found.unavailable:
                        peak = memory.cpu_peak(op, name, tuple(shape), dtype)
                        peaks[(*shape, dtype, name)] = peak
    rows = []
    for i, shape in enumerate(spec["shapes"]):
        inputs = {dtype: op.inputs(tuple(shape), dtype, device) for dtype in spec["dtypes"]}
        for threads in spec["threads"]:
            torch.set_num_threads(threads)
            torch._dynamo.reset()  # code for another number of threads is other code
            found = _rows(op, spec, shape, inputs, peaks)
            rows += [{**row, **spec["about"][i]} if "about" in spec else row for row in found]
        del inputs
    return {"environment": about, "rows": rows}


def _chosen(op: Op, spec: dict, dtype: str) -> dict[str, Contender]:
    known = op.contenders(spec["device"], dtype)
    names = spec["contenders"] or [n for n in known if n != "wrong" and n not in peers.OF_LOGITS]
    return {name: known[name] for name in names if name in known}


def _rows(op: Op, spec: dict, shape: list, inputs: dict[str, Inputs], peaks: dict) -> list[dict]:
    cuda = CudaSteps() if spec["device"] == "cuda" else None
    steps: dict[tuple[str, str], Step] = {}
    prepared: dict[str, Prepared] = {}
    for dtype, x in inputs.items():
        contenders, skipped, first = _ready(_chosen(op, spec, dtype), x)
        limit = op.limit(x)
        pieces = limits.steps(limit, x, cuda)
        for name, c in contenders.items():
            if cuda:
                peaks[(*shape, dtype, name)] = memory.cuda_peak(c, x)
            steps[dtype, name] = cuda.step(c, x) if cuda else cpu_step(c, x)
            if cuda and x.student.numel() <= REPLAYED_ELEMENTS:
                replay = _replay(cuda, c, x)
                if isinstance(replay, str):
                    skipped[f"{name}, replayed"] = replay
                else:
                    steps[dtype, f"{REPLAY}:{name}"] = replay
        for name, step in pieces.items():
            steps[dtype, name] = step
        prepared[dtype] = Prepared(
            contenders,
            skipped,
            first,
            errors.of_all(op, contenders, x),
            errors.of_near(op, contenders, x) if spec["near"] else {},
            list(pieces),
            limit,
            x,
        )
    turns = in_turn(steps, spec["seconds"], spec["least"], spec["most"])
    kinds = [*PASSES, REPLAY] if cuda else PASSES
    rows = [
        _row(op, spec, shape, dtype, kind, turns, prepared[dtype], peaks)
        for dtype in inputs
        for kind in kinds
    ]
    return [row for row in rows if row["ms"]]


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
            if contender.needs is None:
                raise
            skipped[name] = f"{contender.needs}: {_short(error)}"
            continue
        first[name] = round(time.perf_counter() - begin, 3)
        ready[name] = contender
    x.forget()
    return ready, skipped, first


def _replay(cuda: CudaSteps, contender: Contender, x: Inputs) -> Step | str:
    try:
        return cuda.replay(contender, x)
    except RuntimeError as error:  # such as a synchronisation, which can't be captured
        return _short(error)


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _row(
    op: Op,
    spec: dict,
    shape: list,
    dtype: str,
    kind: str,
    turns: Turns,
    found: Prepared,
    peaks: dict,
) -> dict:
    samples = {
        name: turns.samples.get((dtype, f"{REPLAY}:{name}" if kind == REPLAY else name), {})
        for name in found.contenders
    }
    stats = {name: summary(sample[kind]) for name, sample in samples.items() if kind in sample}
    pieces = {name: summary(turns.samples[dtype, name]["both"]) for name in found.pieces}
    limit = None
    if kind == "both":  # the fused forward makes the gradient: only the whole has a limit
        medians = {name: s["median"] for name, s in pieces.items()}
        limit = limits.combine(medians, spec["device"], found.limit, found.x)
    logits = math.prod(shape[:2]) * DTYPES[dtype].itemsize  # bytes of one array
    ms = {name: s["median"] for name, s in stats.items()}
    if limit:
        ms["limit"] = limit["ms"]
    spread = {name: s["iqr"] / s["median"] for name, s in stats.items()}
    wide = [f"{name} {v:.0%}" for name, v in spread.items() if v > NOISY_SPREAD]
    noisy = [f"quartiles far apart ({', '.join(wide)})"] if wide else []
    if (turns.others or 0.0) > QUIET:
        noisy.append(f"other processes took {turns.others:.0%} of the machine")
    row = {
        "op": op.name,
        "suite": spec["suite"],
        "shape": shape,
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
            name: found.contenders[name].passes * logits / s["median"] / 1e6
            for name, s in stats.items()
        },
        "limit": limit,
        "error": {name: found.error[name] for name in stats},
        "right": {n: errors.acceptable(found.error[n], errors.ALLOWED[dtype]) for n in stats},
        "peak_mb": {name: peaks.get((*shape, dtype, name)) for name in stats},
        "first_call_s": found.first_call_s,
        "skipped": found.skipped,
        "noisy": noisy,
    }
    if found.near:
        row["near"] = found.near
        allowed = errors.NEAR_ALLOWED[dtype]
        row["near_right"] = {n: errors.acceptable(e, allowed) for n, e in found.near.items()}
    return row


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(measure(json.loads(sys.argv[1]))))
