"""Rows as pictures (PNG)."""

from __future__ import annotations

import math
from pathlib import Path

COLOURS = {
    "fastdistill": "#1b7837",
    "triton": "#1b7837",
    "cuda": "#5aae61",
    "cross_entropy_alone": "#9e9e9e",
    "compile": "#e08214",
    "eager": "#b35806",
}


def draw(results: dict, folder: Path) -> list[Path]:
    """Time and peak memory of every contender; one file per dtype and measure."""
    import matplotlib

    matplotlib.use("Agg")
    rows = [r for r in results["rows"] if r["suite"] == "main" and r["pass"] == "both"]
    written = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        stem = f"{of_dtype[0]['op']}-{of_dtype[0]['device']}-{dtype}"
        for measure in (_time, _memory):
            path = folder / f"{stem}-{measure.__name__.strip('_')}.png"
            if measure(of_dtype, results, path):
                written.append(path)
    return written


def _time(rows: list[dict], results: dict, path: Path) -> bool:
    """A panel per allocator and number of threads; the black line is the machine's limit."""
    panels: dict[str, list[dict]] = {}
    for row in rows:
        where = f"{row['threads']} threads, {row['allocator']} allocator"
        panels.setdefault("GPU" if row["device"] == "cuda" else where, []).append(row)
    figure, axes = _grid(len(panels))
    for axis, (name, members) in zip(axes, panels.items(), strict=True):
        _bars(axis, members, "ms")
        for i, row in enumerate(members):
            if row["limit"]:
                axis.hlines(row["ms"]["limit"], i - 0.42, i + 0.42, color="black", lw=1.5)
        if any(row["disturbed"] for row in members):
            name += " (disturbed)"
        axis.set(title=name, ylabel="ms, forward + backward")
    _finish(figure, axes, rows[0], results, path)
    return True


def _memory(rows: list[dict], results: dict, path: Path) -> bool:
    first = rows[0]
    chosen = [
        row
        for row in rows
        if (row["threads"], row["allocator"]) == (first["threads"], first["allocator"])
        and math.prod(row["shape"]) >= 1 << 19  # below, pages are what one would see
        and all(row["peak_mb"].values())
    ]
    if not chosen:
        return False
    figure, axes = _grid(1)
    _bars(axes[0], chosen, "peak_mb")
    axes[0].set(title="peak memory of one step above its inputs", ylabel="MB")
    _finish(figure, axes, first, results, path)
    return True


def _grid(count: int):
    import matplotlib.pyplot as plt

    columns = min(count, 2)
    lines = -(-count // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(6.2 * columns, 3.6 * lines), squeeze=False)
    for spare in axes.flat[count:]:
        spare.remove()
    return figure, list(axes.flat[:count])


def _bars(axis, rows: list[dict], key: str) -> None:
    names = [name for name in COLOURS if any(name in row["error"] for row in rows)]
    width = 0.84 / len(names)
    for j, name in enumerate(names):
        at = [i - 0.42 + (j + 0.5) * width for i, row in enumerate(rows) if name in row[key]]
        heights = [row[key][name] for row in rows if name in row[key]]
        drawn = axis.bar(at, heights, width * 0.92, color=COLOURS[name], label=name)
        axis.bar_label(drawn, [_three(h) for h in heights], fontsize=6, rotation=90, padding=2)
    axis.set_xticks(range(len(rows)), ["x".join(map(str, row["shape"])) for row in rows])
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
    figure.suptitle(
        f"{row['op']} {row['dtype']}: {where}, torch {about['torch']}, {about['date'][:10]}",
        fontsize=10,
    )
    axes[0].legend(fontsize=7, frameon=False, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
