"""The promised ratios next to the measured ones."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

# shape -> allocator -> how many times as fast as (eager, compile), forward and backward, fp32.
FASTER = {
    (512, 32000): {"default": (20, 7), "thp": (9, 4)},
    (256, 128256): {"default": (20, 7), "thp": (9, 4)},
    (2048, 1024): {"default": (10, 5), "thp": (10, 5)},
    (8192, 100): {"default": (7, 4), "thp": (7, 4)},
}
OF_LIMIT = 1.6
AVX2_OF_AVX512 = 0.6
SMALL = (128, 10)


def lines(results: dict) -> list[str]:
    """One line per bar; a bar that was not measured says so."""
    rows = [row for row in results["rows"] if row["pass"] == "both" and row["device"] == "cpu"]
    main = [row for row in rows if row["suite"] == "main"]
    out = [f"{'bar':58}{'promised':>10}{'measured':>10}"]
    for name, sign, bar, value in [*_faster(main), *_small(main), *_bf16(main), *_isa(rows)]:
        if value is None:
            out.append(f"{name:58}{sign + f'{bar:g}':>10}{'?':>10}  not measured")
        else:
            kept = value >= bar if sign == ">=" else value <= bar
            verdict = "PASS" if kept else "short"
            out.append(f"{name:58}{sign + f'{bar:g}':>10}{value:10.2f}  {verdict}")
    return out


def _faster(main: list[dict]) -> Iterator[tuple]:
    for threads in sorted({row["threads"] for row in main}, reverse=True) or [0]:
        for allocator in ("default", "thp"):
            for shape, bars in FASTER.items():
                row = _find(main, shape, "fp32", threads, allocator)
                where = f"{_text(shape)}, {threads} threads, {allocator}"
                for rival, bar in zip(("eager", "compile"), bars[allocator], strict=True):
                    yield f"{where}: x {rival}", ">=", bar, _ratio(row, rival, "fastdistill")
                yield f"{where}: of the limit", "<=", OF_LIMIT, _ratio(row, "fastdistill", "limit")


def _small(main: list[dict]) -> Iterator[tuple]:
    for row in [r for r in main if tuple(r["shape"]) == SMALL]:
        where = f"{_text(SMALL)} {row['dtype']}, {row['threads']} threads, {row['allocator']}"
        yield f"{where}: of eager", "<=", 1, _ratio(row, "fastdistill", "eager")


def _bf16(main: list[dict]) -> Iterator[tuple]:
    for row in [r for r in main if r["dtype"] == "bf16" and tuple(r["shape"]) in FASTER]:
        other = _find(main, tuple(row["shape"]), "fp32", row["threads"], row["allocator"])
        where = f"{_text(row['shape'])}, {row['threads']} threads, {row['allocator']}"
        value = row["ms"]["fastdistill"] / other["ms"]["fastdistill"] if other else None
        yield f"{where}: bf16 time of fp32's", "<=", 1, value


def _isa(rows: list[dict]) -> Iterator[tuple]:
    times: dict[tuple, list[float]] = {}
    for row in rows:
        if row["suite"] == "isa":
            key = (tuple(row["shape"]), row["dtype"], row["isa"])
            times.setdefault(key, []).append(row["ms"]["fastdistill"])
    for shape, dtype, level in times:
        if level == "avx512" and (shape, dtype, "avx2") in times:
            value = median(times[shape, dtype, level]) / median(times[shape, dtype, "avx2"])
            name = f"{_text(shape)} {dtype}: speed of avx2 in avx512's"
            yield name, ">=", AVX2_OF_AVX512, value


def _find(rows: list[dict], shape: tuple, dtype: str, threads: int, allocator: str) -> dict | None:
    wanted = (shape, dtype, threads, allocator)
    for row in rows:
        if (tuple(row["shape"]), row["dtype"], row["threads"], row["allocator"]) == wanted:
            return row
    return None


def _ratio(row: dict | None, over: str, under: str) -> float | None:
    if row is None or over not in row["ms"] or under not in row["ms"]:
        return None
    return row["ms"][over] / row["ms"][under]


def _text(shape: tuple) -> str:
    return "x".join(map(str, shape))
