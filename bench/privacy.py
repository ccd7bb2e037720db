"""`python -m bench clip_and_noise`: the noise alone, and the clipped, noisy sum of given samples.

Two kinds of rows: "noise" fills [P] numbers, beside torch.Tensor.normal_; "clip" makes the private
gradient of per-sample gradients [B, P], beside what Opacus's optimizer does with them. The limit of
the second is reading the samples twice, by the kernels' own loop of loads: a sample's factor is
known only when all of it has been read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

import fastdistill
from bench import curves, schema
from bench.bars import OF_READING, TIMES_NORMAL
from bench.environment import describe, isa
from bench.op import DTYPES
from bench.run import allocator
from bench.timing import QUIET, Step, cpu_call, in_turn, summary
from fastdistill import _native

NOISE_SHAPES = [(1 << 20,), (1 << 24,)]
CLIP_SHAPES = [(64, 1 << 20), (256, 10_000)]
MAX_NORM, NOISE_MULTIPLIER = 1.0, 1.0

ABOUT = {
    "op": "clip_and_noise",
    "suite": "main",
    "device": "cpu",
    "pass": "both",
    "environment": 0,
}

Run = Callable[[Tensor, float], Tensor]  # (samples [B, P], noise multiplier) -> [P]


def _fastdistill(generator: torch.Generator | None) -> Run:
    def run(x: Tensor, sigma: float) -> Tensor:
        return fastdistill.privacy.clip_and_noise(
            [x], MAX_NORM, sigma, expected_batch_size=max(len(x), 1), generator=generator
        )[0]

    return run


def opacus_steps(x: Tensor, sigma: float) -> Tensor:
    """DPOptimizer.clip_and_accumulate, add_noise and scale_grad of Opacus 1.6, on one parameter."""
    norms = torch.stack([x.reshape(len(x), -1).norm(2, dim=-1)], dim=1).norm(2, dim=1)
    factor = (MAX_NORM / (norms + 1e-6)).clamp(max=1.0).to(x.dtype)
    total = torch.einsum("i,i...", factor, x)
    noise = torch.normal(0.0, sigma * MAX_NORM, total.shape) if sigma else 0.0
    return (total + noise) / len(x)


def _clip_truth(x: Tensor) -> Tensor:
    total = torch.zeros(x.shape[1], dtype=torch.float64)
    for row in x:
        g = row.double()
        total += g * min(1.0, MAX_NORM / (float(g.norm()) + 1e-6))
    return total / len(x)


def _noise_row(shape: tuple[int, ...], seconds: float) -> dict:
    (p,) = shape
    out, empty = torch.empty(p), torch.empty(0, p)
    ours = {
        "philox": _fastdistill(torch.Generator().manual_seed(0)),
        "chacha20": _fastdistill(None),
    }
    work = {name: (lambda run=run: run(empty, NOISE_MULTIPLIER)) for name, run in ours.items()}
    work["normal_"] = lambda: out.normal_()
    # Standard deviation to five standard errors.
    right = {
        name: abs(float(make().std()) - 1) < 5 / math.sqrt(2 * p) for name, make in work.items()
    }
    found = _times({name: cpu_call(make) for name, make in work.items()}, seconds)
    rate = {name: p / ms / 1e3 for name, ms in found["ms"].items()}
    return {**found, "kind": "noise", "dtype": "fp32", "right": right, "million_per_s": rate}


def _clip_row(shape: tuple[int, ...], dtype: str, threads: int, seconds: float) -> dict:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).mul_(2 / math.sqrt(shape[1])).to(DTYPES[dtype])
    contenders = {
        "chacha20": _fastdistill(None),
        "philox": _fastdistill(torch.Generator().manual_seed(0)),
        "opacus_steps": opacus_steps,
    }
    want = _clip_truth(x)
    allowed = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-3}[dtype]  # Opacus sums in the samples' type
    errors = {
        name: float((run(x, 0.0).double() - want).norm() / want.norm())
        for name, run in contenders.items()
    }
    steps: dict[str, Step] = {
        name: cpu_call(lambda run=run: run(x, NOISE_MULTIPLIER)) for name, run in contenders.items()
    }
    module = _native.cpu().module
    if module is not None:
        steps["limit"] = cpu_call(lambda: module.read_limit(x.data_ptr(), x.nbytes, threads), 2.0)
    found = _times(steps, seconds)
    right = {name: error <= allowed for name, error in errors.items()}
    return {**found, "kind": "clip", "dtype": dtype, "right": right, "error": errors}


def _curve(threads: int, quick: bool) -> list[dict]:
    """Clipped sums along the number of parameters, for the pictures of `curves`."""
    shapes = curves.PARAMETERS[::2] if quick else curves.PARAMETERS
    about = {"suite": "curves", "axis": "parameters"}
    seconds = 0.2 if quick else 1.0
    return [
        {"shape": list(x), **_clip_row(x, "fp32", threads, seconds), **about, "at": x[1]}
        for x in shapes
    ]


def _times(steps: dict[str, Step], seconds: float) -> dict:
    turns = in_turn(steps, seconds, 7, 200)
    stats = {name: summary(turns.samples[name]["both"]) for name in steps}
    return {
        "ms": {name: s["median"] for name, s in stats.items()},
        "iqr_ms": {name: s["iqr"] for name, s in stats.items()},
        "repetitions": turns.kept,
        "disturbed": (turns.others or 0.0) > QUIET,
    }


def measure(threads: list[int], dtypes: list[str], quick: bool, say: Callable[[str], None]) -> dict:
    """Every shape at every number of threads, and a curve at the first, as schema.py describes."""
    seconds = 1.0 if quick else 6.0
    begin = time.perf_counter()
    rows: list[dict] = []
    for count in threads:
        torch.set_num_threads(count)
        for shape in NOISE_SHAPES:
            rows.append({"shape": list(shape), **_noise_row(shape, seconds)})
        for shape in CLIP_SHAPES:
            for dtype in dtypes:
                rows.append({"shape": list(shape), **_clip_row(shape, dtype, count, seconds)})
        if count == threads[0]:
            rows += _curve(count, quick)
        for row in [r for r in rows if "threads" not in r]:
            row.update({**ABOUT, **row}, threads=count, isa=isa(), allocator=allocator())
            say("\n".join(_lines(row)))
    return {
        "schema": schema.VERSION,
        "seconds": round(time.perf_counter() - begin, 1),
        "environments": [describe("cpu")],
        "rows": rows,
    }


def wrong(results: dict) -> bool:
    """Whether one of the library's own was wrong anywhere."""
    return any(not row["right"][n] for row in results["rows"] for n in ("philox", "chacha20"))


def _bar(kept: bool, bar: float) -> str:
    return f"bar {bar:g}: {'PASS' if kept else 'short'}"


def _lines(row: dict) -> list[str]:
    shape = "x".join(map(str, row["shape"]))
    about = f"{row['isa']}, {row['threads']} threads, {row['allocator']}"
    title = f"{row['kind']} {shape} {row['dtype']} ({about})"
    lines = [title + f", {row['repetitions']} repetitions"]
    for name, ms in row["ms"].items():
        text = f"  {name:14}{ms:10.3f} ms {row['iqr_ms'][name] / ms:6.0%}"
        if row["kind"] == "noise":
            times = row["ms"]["normal_"] / ms
            text += f" {row['million_per_s'][name]:8.0f} M/s {times:6.2f} x normal_"
            if name in TIMES_NORMAL:
                text += f" ({_bar(times >= TIMES_NORMAL[name], TIMES_NORMAL[name])})"
        elif "limit" in row["ms"]:
            times = ms / row["ms"]["limit"]
            text += f" {times:8.2f} x reading twice"
            if name == "chacha20" and row["suite"] == "main":
                text += f" ({_bar(times <= OF_READING, OF_READING)})"
        if row["right"].get(name) is False:
            text += "  WRONG"
        lines.append(text)
    if row["disturbed"]:
        lines.append("  disturbed: other processes were at work; nothing is decided by this row")
    return lines
