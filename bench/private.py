"""`python -m bench private`: training steps of three models, private and not, in one run.

Every contender makes the same step on the same batch, in turn, after its gradient without noise has
been held against float64 micro-batches. The bars are ratios to the non-private step.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from bench import memory, schema
from bench.environment import describe, isa
from bench.private_models import CASES, Case, Step, contenders, truth
from bench.run import allocator
from bench.timing import QUIET, cpu_call, in_turn, summary

NON_PRIVATE, OURS, SILENT = "non-private", "fastdistill", "fastdistill (no noise)"
ALLOWED = 1e-3  # of the norm of the gradient, in float32

ABOUT = {
    "op": "private",
    "suite": "main",
    "dtype": "fp32",
    "device": "cpu",
    "pass": "both",
    "environment": 0,
}


def _errors(case: Case, names: list[str]) -> dict[str, float]:
    """Of each contender's gradient without noise."""
    want = torch.cat([t.flatten() for t in truth(case)])
    found = {}
    for name, build in contenders(case, 0.0).items():
        if name == NON_PRIVATE or name not in names:
            continue
        got = torch.cat([g.double().flatten() for g in build()()])
        found[name] = float((got - want).norm() / want.norm())
    return found


def _peak(case: Case, name: str) -> float | None:
    """MB by which two steps rise above the built model.

    A step of another instance was taken before: what it loads for good (code, thread pools) is no
    memory of a step. What the first of the two keeps for the second is.
    """

    def build() -> Step:
        made = contenders(case)
        for before in (NON_PRIVATE, name):
            made[before]()()
        gc.collect()
        return made[name]()

    return memory.rise(build)


def _row(key: str, case: Case, peaks: dict, names: list[str], seconds: float) -> dict[str, Any]:
    errors = _errors(case, names)
    made = {name: build() for name, build in contenders(case).items() if name in names}
    turns = in_turn({name: cpu_call(step) for name, step in made.items()}, seconds, 5, 100)
    stats = {name: summary(turns.samples[name]["both"]) for name in made}
    model, (x, _) = case.model(), case.batch()
    return {
        **ABOUT,
        "allocator": allocator(),
        "kind": key,
        "shape": list(x.shape),
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": torch.get_num_threads(),
        "isa": isa(),
        "ms": {name: s["median"] for name, s in stats.items()},
        "iqr_ms": {name: s["iqr"] for name, s in stats.items()},
        "right": {name: errors.get(name, 0.0) <= ALLOWED for name in made},
        "error": errors,
        "peak_mb": {name: peaks[key, name] for name in made if peaks[key, name] is not None},
        "bars": dict(zip((OURS, SILENT), case.bars, strict=True)),
        "repetitions": turns.kept,
        "disturbed": (turns.others or 0.0) > QUIET,
    }


def measure(
    models: list[str],
    threads: list[int],
    quick: bool,
    say: Callable[[str], None],
    names: list[str] | None = None,
) -> dict[str, Any]:
    """Every model at every number of threads, as schema.py describes."""
    begin = time.perf_counter()
    warnings.filterwarnings("ignore", message="Full backward hook")  # of Opacus's hooks
    chosen = names or list(contenders(CASES[models[0]]))
    # First: a fork has to come before the first thread.
    peaks = {(key, name): _peak(CASES[key], name) for key in models for name in chosen}
    rows = []
    for key in models:
        for count in threads:
            torch.set_num_threads(count)
            rows.append(_row(key, CASES[key], peaks, chosen, 2.0 if quick else 40.0))
            say("\n".join(_lines(rows[-1])))
    return {
        "schema": schema.VERSION,
        "seconds": round(time.perf_counter() - begin, 1),
        "environments": [describe("cpu")],
        "rows": rows,
    }


def wrong(results: dict[str, Any]) -> bool:
    """Whether the library's own was wrong anywhere."""
    return any(
        not right
        for row in results["rows"]
        for name, right in row["right"].items()
        if name.startswith(OURS)
    )


def _lines(row: dict[str, Any]) -> list[str]:
    bars = row["bars"]
    shape = "x".join(map(str, row["shape"]))
    lines = [
        f"{row['kind']} {shape}, {row['parameters']} parameters ({row['isa']}, {row['threads']} "
        f"threads, {row['allocator']}), {row['repetitions']} repetitions"
    ]
    base, base_memory = row["ms"].get(NON_PRIVATE), row["peak_mb"].get(NON_PRIVATE)
    for name, ms in row["ms"].items():
        text = f"  {name:22}{ms:10.2f} ms {row['iqr_ms'][name] / ms:5.0%}"
        if base:
            text += f" {ms / base:7.2f} x"
            if name in bars:
                text += f" (bar {bars[name]:g}: {'PASS' if ms <= bars[name] * base else 'short'})"
        if name in row["peak_mb"]:
            text += f"  {row['peak_mb'][name]:.0f} MB"
            if base_memory:
                text += f" ({row['peak_mb'][name] / base_memory:.2f} x)"
        if not row["right"][name]:
            text += f"  WRONG by {row['error'][name]:.1e}"
        lines.append(text)
    if row["disturbed"]:
        lines.append("  disturbed: other processes were at work; nothing is decided by this row")
    return lines
