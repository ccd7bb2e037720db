"""The pictures of the report, as PNG bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.ticker import MaxNLocator

from fastdistill.distill.plots import INK, panels, png, style
from fastdistill.distill.text import measures

if TYPE_CHECKING:
    from fastdistill.distill.text.job import Outcome

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito's, as in distill
MOST_PAIRS = 20_000  # drawn; a density is all that one sees of more


def curves(outcome: Outcome) -> bytes:
    """Correlation and neighbours over the epochs, and the losses."""
    figure, (left, right) = panels(2)
    epochs = np.arange(len(outcome.curve) + 1)
    training = outcome.training
    for name, label, measure, colour in (
        ("correlation", "similarity correlation", measures.correlation, BLUE),
        ("overlap", "top-10 neighbours shared", measures.overlap, ORANGE),
    ):
        start = measure(training.before, training.wanted)
        values = [start, *(entry[name] for entry in outcome.curve)]
        left.plot(epochs, values, color=colour, marker="o", markersize=3.5, label=label)
    left.set_ylim(0, 1)
    style(left, "Agreement with the teacher, held-out sentences", "epoch (0: as cut)")
    left.legend(loc="lower right", frameon=False)
    for name, colour in (("hidden", BLUE), ("attention", ORANGE), ("pooled", GREEN)):
        if name in outcome.curve[0]:
            right.plot(
                epochs[1:],
                [entry[name] for entry in outcome.curve],
                color=colour,
                marker="o",
                markersize=3.5,
                label=name,
            )
    right.set_yscale("log")
    style(right, "Training loss by part (weighted)", "epoch")
    right.legend(loc="upper right", frameon=False)
    return png(figure)


def similarity(outcome: Outcome) -> bytes:
    """The similarity of pairs of sentences: the teacher's against the student's."""
    training = outcome.training
    wanted = measures.pairs(training.wanted)
    generator = torch.Generator().manual_seed(0)
    shown = torch.randperm(len(wanted), generator=generator)[:MOST_PAIRS]
    figure, axes = panels(2)
    low = float(wanted.min())
    for axis, found, title in (
        (axes[0], training.before, "Before: the teacher's layers as cut"),
        (axes[1], outcome.after, "After distillation"),
    ):
        ours = measures.pairs(found)
        low = min(low, float(ours.min()))
        axis.scatter(wanted[shown], ours[shown], s=2, color=BLUE, alpha=0.25, linewidths=0)
        axis.axline((0, 0), slope=1, color=INK, linestyle=":", linewidth=1)
        style(axis, f"{title} (r = {measures.correlation(found, training.wanted):.3f})",
              "similarity of a pair of sentences, teacher")  # fmt: skip
        axis.set_ylabel("student", color=INK)
        axis.xaxis.set_major_locator(MaxNLocator())  # style() counts epochs
    for axis in axes:
        axis.set_xlim(low, 1)
        axis.set_ylim(low, 1)
    return png(figure)
