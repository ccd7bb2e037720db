"""The pictures of the report, as PNG bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, ScalarFormatter

from fastdistill.distill.plots import INK, panels, png, style

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's
LEVELS = {"non_private": (":", "no privacy"), "labels": ("--", "public labels alone")}


def epsilon(figures: dict[str, Any]) -> bytes:
    """Accuracy against epsilon: recipes on the left, R3's strategies on the right."""
    figure, (left, right) = panels(2)
    runs, settings = figures["runs"], central(figures)
    random = [run for run in of(runs, "R3", **settings) if run["strategy"] == "random"]
    lines = [("R1, DP teacher", of(runs, "R1")), ("R2, DP student", of(runs, "R2"))]
    label = f"R3, {settings['k']} teachers, {settings['queries']} queries"
    lines += [(label, random), ("R3, noisy gradients", of(runs, "R3 gradient"))]
    for (name, entries), colour in zip(lines, COLOURS, strict=False):
        _line(left, entries, "target_epsilon", name, colour)
    for name, (dashes, text) in LEVELS.items():
        level = of(runs, name)[0]["accuracy_mean"]
        left.axhline(level, color=INK, linestyle=dashes, linewidth=1.2, label=text)
    _finish(left, "Accuracy against epsilon", "epsilon")
    found = of(runs, "R3", **settings)
    for i, strategy in enumerate(dict.fromkeys(run["strategy"] for run in found)):
        entries = [run for run in found if run["strategy"] == strategy]
        _line(right, entries, "target_epsilon", strategy, COLOURS[i])
    _finish(right, "R3: how the queries are chosen", "epsilon")
    return png(figure)


def queries(figures: dict[str, Any]) -> bytes:
    """Accuracy of R3 against the number of queries, and of teachers."""
    figure, (left, right) = panels(2)
    runs, middle = figures["runs"], central(figures)
    for axes, factor, fixed in ((left, "queries", "k"), (right, "k", "queries")):
        found = of(runs, "R3", strategy="random", **{fixed: middle[fixed]})
        for i, target in enumerate(sorted({run["target_epsilon"] for run in found})):
            entries = [run for run in found if run["target_epsilon"] == target]
            _line(axes, entries, factor, f"epsilon {target:g}", COLOURS[i])
    _finish(left, f"R3, {middle['k']} teachers", "queries")
    _finish(right, f"R3, {middle['queries']} queries", "teachers")
    return png(figure)


def central(figures: dict[str, Any]) -> dict[str, int]:
    """`k` and `queries` of the row that the others vary."""
    run = of(figures["runs"], "R3 gradient")[0]
    return {"k": run["k"], "queries": run["queries"]}


def of(runs: Sequence[dict[str, Any]], recipe: str, **values: Any) -> list[dict[str, Any]]:
    """The rows of a recipe with these values."""
    return [
        run
        for run in runs
        if run["recipe"] == recipe and all(run[key] == value for key, value in values.items())
    ]


def _line(
    axes: Axes, entries: Sequence[dict[str, Any]], factor: str, label: str, colour: str
) -> None:
    entries = sorted(entries, key=lambda run: run[factor])
    axes.errorbar(
        [run[factor] for run in entries],
        [run["accuracy_mean"] for run in entries],
        yerr=[run["accuracy_std"] or 0.0 for run in entries],
        color=colour, marker="o", markersize=4, capsize=2, linewidth=1.6, label=label,
    )  # fmt: skip


def _finish(axes: Axes, title: str, x: str) -> None:
    style(axes, title, x, percent=True)
    axes.set_xscale("log")
    ticks = sorted({float(v) for bars in axes.containers for v in bars[0].get_xdata()})
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False, fontsize=8)
