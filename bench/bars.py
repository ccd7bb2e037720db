"""The promised ratios next to the measured ones."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

# shape -> allocator -> how many times as fast as (eager, compile), forward and backward, fp32.
FASTER = {
    (512, 32000): {"default": (20, 7), "thp": (9, 4)},
    (256, 128256): {"default": (20, 7), "thp": (9, 4)},
    (2048, 1024): {"default": (10, 5), "thp": (10, 5)},
    (8192, 100): {"default": (7, 4), "thp": (7, 4)},
}
OF_LIMIT = 1.6
SOFTMAX = {(512, 32000): 2, (8192, 100): 2}  # shape -> x eager, forward and backward, fp32
AVX2_OF_AVX512 = 0.6
SMALL = (128, 10)
TIMES_NORMAL = {"philox": 4.0, "chacha20": 1.0}
"""How many times as fast as normal_ the noise is promised to be."""
OF_READING = 1.3  # the samples twice
OF_MEMORY = 1.1  # where nothing is materialised


WIDE = 0.25  # quartiles this far apart, of the median: the ratio is a guess


class Measured(NamedTuple):
    """A ratio, and what speaks against it."""

    value: float
    doubt: str


def lines(results: dict) -> list[str]:
    """One line per bar; a bar that was not measured, or not well, says so."""
    rows = [row for row in results["rows"] if row["pass"] == "both" and row["device"] == "cpu"]
    main = [row for row in rows if row["suite"] == "main"]
    out = [f"{'bar':66}{'promised':>10}{'measured':>10}"]
    kd, softmax, hint = ([r for r in main if r["op"] == op] for op in ("kd", "softmax", "hint"))
    bars: list[tuple] = []
    if kd:
        levels = [row for row in rows if row["op"] == "kd"]
        bars += [*_faster(kd), *_small(kd), *_bf16(kd), *_isa(levels)]
    bars += [*_softmax(softmax), *_hint(hint), *_clip_and_noise(main), *_private(main)]
    for name, sign, bar, measured in bars:
        start = f"{name:66}{sign + f'{bar:g}':>10}"
        if measured is None:
            out.append(f"{start}{'?':>10}  not measured")
        else:
            value, doubt = measured
            kept = value >= bar if sign == ">=" else value <= bar
            verdict = ("PASS" if kept else "short") + (f", {doubt}" if doubt else "")
            out.append(f"{start}{value:10.2f}  {verdict}")
    return out


def _faster(main: list[dict]) -> Iterator[tuple]:
    for threads in sorted({row["threads"] for row in main}, reverse=True):
        for allocator in ("default", "thp"):
            for shape, bars in FASTER.items():
                row = _find(main, shape, "fp32", threads, allocator)
                where = f"{_text(shape)}, {threads} threads, {allocator}"
                for rival, bar in zip(("eager", "compile"), bars[allocator], strict=True):
                    yield f"{where}: x {rival}", ">=", bar, _ratio(row, rival, row, "fastdistill")
                limit = _ratio(row, "fastdistill", row, "limit")
                yield f"{where}: of the limit", "<=", OF_LIMIT, limit


def _small(main: list[dict]) -> Iterator[tuple]:
    for row in [r for r in main if tuple(r["shape"]) == SMALL]:
        where = f"{_text(SMALL)} {row['dtype']}, {row['threads']} threads, {row['allocator']}"
        yield f"{where}: of eager", "<=", 1, _ratio(row, "fastdistill", row, "eager")


def _bf16(main: list[dict]) -> Iterator[tuple]:
    for row in [r for r in main if r["dtype"] == "bf16" and tuple(r["shape"]) in FASTER]:
        other = _find(main, tuple(row["shape"]), "fp32", row["threads"], row["allocator"])
        where = f"{_text(row['shape'])}, {row['threads']} threads, {row['allocator']}"
        ratio = _ratio(row, "fastdistill", other, "fastdistill")
        yield f"{where}: bf16 time of fp32's", "<=", 1, ratio


def _isa(rows: list[dict]) -> Iterator[tuple]:
    levels: dict[tuple, dict[str, list[dict]]] = {}
    for row in rows:
        if row["suite"] == "isa":
            of_case = levels.setdefault((tuple(row["shape"]), row["dtype"]), {})
            of_case.setdefault(row["isa"], []).append(row)
    for (shape, dtype), found in levels.items():
        if {"avx512", "avx2"} <= set(found):
            quiet = {  # a turn that was disturbed counts only where all were
                level: [r for r in turns if not r["disturbed"]] or turns
                for level, turns in found.items()
            }
            times = {k: median(r["ms"]["fastdistill"] for r in v) for k, v in quiet.items()}
            doubt = _doubt(*((r, "fastdistill") for turns in quiet.values() for r in turns))
            measured = Measured(times["avx512"] / times["avx2"], doubt)
            name = f"{_text(shape)} {dtype}: speed of avx2 in avx512's"
            yield name, ">=", AVX2_OF_AVX512, measured


def _softmax(main: list[dict]) -> Iterator[tuple]:
    for row in main:
        bar = SOFTMAX.get(tuple(row["shape"]))
        if bar and row["dtype"] == "fp32":
            where = f"softmax {_text(row['shape'])}, {row['threads']} threads, {row['allocator']}"
            yield f"{where}: x eager", ">=", bar, _ratio(row, "eager", row, "fastdistill")


def _hint(main: list[dict]) -> Iterator[tuple]:
    for row in main:
        shape = f"hint {_text(row['shape'])} {row['dtype']}"
        where = f"{shape}, {row['threads']} threads, {row['allocator']}"
        eager = _ratio(row, "eager", row, "fastdistill")
        if len(row["shape"]) == 2:
            yield f"{where}: x eager", ">=", 3, eager
            continue
        products = _ratio(row, "fastdistill", row, "limit")
        yield f"{where}: of products", "<=", 1.05 if row["dtype"] == "fp32" else 1.5, products
        if row["dtype"] == "fp32":
            yield f"{where}: x eager", ">=", 1, eager
        peaks = row["peak_mb"]
        if peaks.get("fastdistill") is not None and peaks.get("eager"):
            gradients = _gradients_mb(row)
            share = (peaks["fastdistill"] - gradients) / (peaks["eager"] - gradients)
            yield f"{where}: memory of eager's", "<=", 0.15, Measured(share, "")


def _clip_and_noise(main: list[dict]) -> Iterator[tuple]:
    for row in [r for r in main if r["op"] == "clip_and_noise"]:
        where = f"{row['threads']} threads, {row['allocator']}"
        shape = f"{row['kind']} {_text(row['shape'])} {row['dtype']}"
        if row["kind"] == "noise":
            for name, bar in TIMES_NORMAL.items():
                times = _ratio(row, "normal_", row, name)
                yield f"{shape} {name}, {where}: x normal_", ">=", bar, times
        else:
            limit = _ratio(row, "chacha20", row, "limit")
            yield f"{shape}, {where}: of reading twice", "<=", OF_READING, limit


def _private(main: list[dict]) -> Iterator[tuple]:
    for row in [r for r in main if r["op"] == "private"]:
        where = f"{row['threads']} threads, {row['allocator']}"
        for name, bar in row.get("bars", {}).items():
            if name not in row["ms"]:
                continue
            step = _ratio(row, name, row, "non-private")
            yield f"{row['kind']} {name}, {where}: of non-private", "<=", bar, step
            peaks = row["peak_mb"]
            if row["kind"] == "mlp" and name in peaks and peaks.get("non-private"):
                memory = Measured(peaks[name] / peaks["non-private"], "")
                yield f"{row['kind']} {name}, {where}: memory", "<=", OF_MEMORY, memory


def _gradients_mb(row: dict) -> float:
    rows, width, out = row["shape"]
    return (rows + out) * width * (4 if row["dtype"] == "fp32" else 2) / 2**20


def _find(rows: list[dict], *wanted: object) -> dict | None:
    """The row of (shape, dtype, threads, allocator)."""
    for row in rows:
        if (tuple(row["shape"]), row["dtype"], row["threads"], row["allocator"]) == wanted:
            return row
    return None


def _ratio(over: dict | None, name: str, under: dict | None, base: str) -> Measured | None:
    """Times of `name` in row `over` by those of `base` in row `under`."""
    if over is None or under is None or name not in over["ms"] or base not in under["ms"]:
        return None
    return Measured(over["ms"][name] / under["ms"][base], _doubt((over, name), (under, base)))


def _doubt(*measured: tuple[dict, str]) -> str:
    """What speaks against the times of these (row, contender); the limit has no quartiles."""
    if any(row["disturbed"] for row, _ in measured):
        return "disturbed"
    wide = any(row["iqr_ms"].get(name, 0) > WIDE * row["ms"][name] for row, name in measured)
    return "wide spread" if wide else ""


def _text(shape: tuple) -> str:
    return "x".join(map(str, shape))
