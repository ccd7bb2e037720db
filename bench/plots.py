"""Rows as pictures (PNG)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from bench import schema

COLOURS = {
    "fastdistill": "#1b7837",
    "triton": "#1b7837",
    "cuda": "#5aae61",
    "chacha20": "#1b7837",
    "philox": "#5aae61",
    "cross_entropy_alone": "#9e9e9e",
    "compile": "#e08214",
    "eager": "#b35806",
}
OTHERS = ("#4575b4", "#74add1", "#762a83", "#c2a5cf", "#313695", "#8c510a", "#35978f")


def draw(results: dict, folder: Path) -> list[Path]:
    """Time and peak memory of every contender, of the main cases and along every curve."""
    import matplotlib

    matplotlib.use("Agg")
    found: dict[str, tuple[list[dict], Callable]] = {}
    for row in results["rows"]:
        if row["pass"] != "both":
            continue
        if row["suite"] == "main":
            measures = {"time": _time, "memory": _memory}
        elif row["suite"] == "curves":
            measures = {"curve": _curve}
        else:
            continue
        for measure, drawn in measures.items():
            found.setdefault(f"{stem(row)}-{measure}", ([], drawn))[0].append(row)
    written = []
    for name, (rows, drawn) in found.items():
        path = folder / f"{name}.png"
        if drawn(rows, results, path):
            written.append(path)
    return written


def stem(row: dict) -> str:
    """How the names of a row's pictures begin."""
    parts = [row["op"], row.get("kind"), row["device"], row.get("axis"), row["dtype"]]
    return "-".join(str(x).replace(" ", "_") for x in parts if x)


def _time(rows: list[dict], results: dict, path: Path) -> bool:
    """A panel per allocator and number of threads; the black line is the machine's limit."""
    panels: dict[str, list[dict]] = {}
    for row in rows:
        where = f"{row['threads']} threads"
        if row.get("allocator"):
            where += f", {row['allocator']} allocator"
        panels.setdefault("GPU" if row["device"] == "cuda" else where, []).append(row)
    figure, axes = _grid(len(panels))
    for axis, (name, members) in zip(axes, panels.items(), strict=True):
        _bars(axis, members, "ms")
        for i, row in enumerate(members):
            if "limit" in row["ms"]:
                axis.hlines(row["ms"]["limit"], i - 0.42, i + 0.42, color="black", lw=1.5)
        if any(row["disturbed"] for row in members):
            name += " (disturbed)"
        axis.set(title=name, ylabel="ms, forward + backward")
    _finish(figure, axes, rows[0], results, path)
    return True


def _memory(rows: list[dict], results: dict, path: Path) -> bool:
    first = rows[0]
    where = (first["threads"], first.get("allocator"))
    chosen = [
        row
        for row in rows
        if (row["threads"], row.get("allocator")) == where
        and math.prod(row["shape"]) >= 1 << 19  # below, pages are what one would see
        and row.get("peak_mb")
        and all(row["peak_mb"].values())
    ]
    if not chosen:
        return False
    figure, axes = _grid(1)
    _bars(axes[0], chosen, "peak_mb")
    axes[0].set(title="peak memory of one step above its inputs", ylabel="MB")
    _finish(figure, axes, first, results, path)
    return True


def _curve(rows: list[dict], results: dict, path: Path) -> bool:
    """Time, and memory where it was measured, along an axis; both scales logarithmic.

    Of one allocator.
    """
    rows = [row for row in rows if row.get("allocator") == rows[0].get("allocator")]
    rows = sorted(rows, key=lambda row: row["at"])
    measures = {"ms": "ms, forward + backward", "peak_mb": "MB, peak of a step above its inputs"}
    shown = [key for key in measures if any(row.get(key) for row in rows)]
    figure, axes = _grid(len(shown))
    for axis, key in zip(axes, shown, strict=True):
        for name, colour in _colours(rows):
            points = [(r["at"], (r.get(key) or {}).get(name)) for r in rows]
            points = [(x, y) for x, y in points if y]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", ms=3, color=colour, label=name)
        limits = [(r["at"], r["ms"]["limit"]) for r in rows if key == "ms" and "limit" in r["ms"]]
        if limits:
            axis.plot(*zip(*limits, strict=True), "k:", lw=1, label="limit")
        axis.set(xscale="log", yscale="log", xlabel=rows[0]["axis"], ylabel=measures[key])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(title=f"{rows[0]['threads']} threads, from {schema.text(rows[0]['shape'])}")
    _finish(figure, axes, rows[0], results, path)
    return True


def _grid(count: int):
    import matplotlib.pyplot as plt

    columns = min(count, 2)
    lines = -(-count // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(6.2 * columns, 3.6 * lines), squeeze=False)
    for spare in axes.flat[count:]:
        spare.remove()
    return figure, list(axes.flat[:count])


def _colours(rows: list[dict]) -> list[tuple[str, str]]:
    """Every contender of these rows with its colour."""
    names = list(dict.fromkeys(name for row in rows for name in row["ms"] if name != "limit"))
    spare = (OTHERS[i % len(OTHERS)] for i in range(len(names)))
    return [(name, COLOURS.get(name) or next(spare)) for name in names]


def _bars(axis, rows: list[dict], key: str) -> None:
    colours = _colours(rows)
    width = 0.84 / len(colours)
    for j, (name, colour) in enumerate(colours):
        at = [i - 0.42 + (j + 0.5) * width for i, row in enumerate(rows) if name in row[key]]
        heights = [row[key][name] for row in rows if name in row[key]]
        drawn = axis.bar(at, heights, width * 0.92, color=colour, label=name)
        axis.bar_label(drawn, [_three(h) for h in heights], fontsize=6, rotation=90, padding=2)
    axis.set_xticks(range(len(rows)), [schema.text(row["shape"]) for row in rows])
    axis.tick_params(labelsize=8)
    axis.set_yscale("log")
    axis.margins(y=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _finish(figure, axes, row: dict, results: dict, path: Path) -> None:
    import matplotlib.pyplot as plt

    about = results["environments"][row["environment"]]
    where = about.get("gpu") or f"{about['cpu']}, {about['isa']}"
    what = " ".join(filter(None, [row["op"], row.get("kind"), row["dtype"]]))
    figure.suptitle(f"{what}: {where}, torch {about['torch']}, {about['date'][:10]}", fontsize=10)
    axes[0].legend(fontsize=7, frameon=False, loc="best")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
