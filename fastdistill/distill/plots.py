"""The pictures of the report, as PNG bytes. Figures are made without pyplot: no global state."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fastdistill.distill.data import Images
from fastdistill.distill.workbench import HINT_DISTILLED, hint_epochs

if TYPE_CHECKING:
    from fastdistill.distill.job import Outcome
    from fastdistill.distill.workbench import Network

# Okabe and Ito's colours, distinct to colour-blind readers as well
COLOURS = {
    "labels_only": "#D55E00",
    "distilled": "#0072B2",
    "both": "#009E73",
    "hint_distilled": "#CC79A7",
}
INK, GRID = "#222222", "#DDDDDD"
RIGHT, WRONG = "#007A55", "#B8420F"
MOST_CLASSES = 20  # a heat map with more columns cannot be read
GRID_ROWS, GRID_COLUMNS = 3, 8


def curves(outcome: Outcome) -> bytes:
    """Test accuracy and training loss of all students, epoch by epoch."""
    figure, (left, right) = panels(2)
    _lines(left, outcome, lambda entry: entry["accuracy"])
    final = outcome.teacher.curve[-1]["accuracy"]
    left.axhline(final, color=INK, linestyle=":", linewidth=1.5, label=f"teacher ({final:.1%})")
    style(left, "Test accuracy", "epoch", percent=True)
    left.legend(loc="lower right", frameon=False)
    _lines(right, outcome, lambda entry: entry["loss"])
    right.set_yscale("log")
    style(right, "Training loss (each student has its own)", "epoch")
    right.legend(loc="upper right", frameon=False)
    return png(figure)


def agreement(outcome: Outcome) -> bytes:
    """How often students name the teacher's class: over the epochs, and class by class."""
    figure, (left, right) = panels(2)
    _lines(left, outcome, lambda entry: entry["agreement"])
    style(left, "Agreement with the teacher", "epoch", percent=True)
    left.legend(loc="lower right", frameon=False)
    if outcome.data.source.classes <= MOST_CLASSES:
        _by_class(right, outcome)
    else:
        right.axis("off")
    return png(figure)


def disagreement(outcome: Outcome) -> bytes:
    """Test images on which the teacher and one student name different classes."""
    student = shown_student(outcome)
    says, teacher = (n.test_logits.argmax(1).numpy() for n in (student, outcome.teacher))
    rows = np.flatnonzero(says != teacher)
    count = min(len(rows), GRID_ROWS * GRID_COLUMNS)
    title = (
        f"Teacher and {student.name} (seed {student.seed}) disagree on {len(rows)} of "
        f"{len(says)} test images" + (f", the first {count} of them" if count < len(rows) else "")
    )
    lines = max(1, -(-count // GRID_COLUMNS))
    figure = Figure(figsize=(10, 0.6 + 1.75 * lines), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=11, color=INK)
    axes = figure.subplots(lines, GRID_COLUMNS, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, row in zip(axes, rows[:count], strict=False):
        truth = int(outcome.data.test.labels[row])
        axis.imshow(picture(outcome.data.test, int(row)), cmap="gray_r", interpolation="nearest")
        for line, (who, answer) in enumerate((("teacher", teacher[row]), ("student", says[row]))):
            axis.text(
                0.5,
                -0.12 - 0.17 * line,
                f"{who}: {answer}",
                transform=axis.transAxes,
                ha="center",
                va="center",
                fontsize=8,
                color=RIGHT if answer == truth else WRONG,
            )
        axis.set_title(f"label {truth}", fontsize=8, color=INK, pad=3)
    return png(figure)


def shown_student(outcome: Outcome) -> Network:
    """The student in the picture of disagreements: the distilled one, else the last kind."""
    name = outcome.students[-1].name
    if any(student.name == "distilled" for student in outcome.students):
        name = "distilled"
    return next(student for student in outcome.students if student.name == name)


def picture(images: Images, row: int) -> np.ndarray[Any, Any]:
    """One image for imshow: [H, W] of its mean over the channels, or [H, W, 3] in 0..1."""
    pixels = images.pixels[row].astype(np.float64)
    if len(pixels) != 3:
        return np.asarray(pixels.mean(0))
    low, high = pixels.min(), pixels.max()
    scaled = pixels / 255 if images.pixels.dtype == np.uint8 else (pixels - low) / (high - low or 1)
    return np.asarray(scaled.transpose(1, 2, 0))


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """A wide figure with so many axes side by side."""
    figure = Figure(figsize=(10, 3.8), dpi=150, layout="constrained")
    return figure, list(figure.subplots(1, count))


def _lines(axes: Axes, outcome: Outcome, value: Callable[[dict[str, float]], float]) -> None:
    """Per student the mean over its seeds, and a band from the lowest to the highest."""
    for name in dict.fromkeys(student.name for student in outcome.students):
        runs = [student for student in outcome.students if student.name == name]
        values = np.array([[value(entry) for entry in run.curve] for run in runs])
        before = hint_epochs(outcome.config)[0] if name == HINT_DISTILLED else 0
        epochs = np.arange(1, values.shape[1] + 1) + before
        colour = COLOURS[name]
        axes.plot(
            epochs,
            values.mean(0),
            color=colour,
            linewidth=1.8,
            label=name,
            linestyle="--" if name == "both" else "-",  # it often lies on the line of "distilled"
            marker="o" if len(epochs) == 1 else None,  # a line needs two points
        )
        axes.fill_between(
            epochs, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0
        )


def agreement_by_class(outcome: Outcome) -> tuple[list[str], np.ndarray[Any, Any]]:
    """Share of test images on which student and teacher agree, by the class the teacher names.

    Returns:
        Names of the students, and [students, classes] over all their seeds; NaN for a class that
        the teacher never names.
    """
    teacher = outcome.teacher.test_logits.argmax(1).numpy()
    names = list(dict.fromkeys(student.name for student in outcome.students))
    table = np.full((len(names), outcome.data.source.classes), np.nan)
    for i, name in enumerate(names):
        runs = [student for student in outcome.students if student.name == name]
        says = np.stack([run.test_logits.argmax(1).numpy() for run in runs])
        for c in np.unique(teacher):
            table[i, c] = (says[:, teacher == c] == c).mean()
    return names, table


def _by_class(axes: Axes, outcome: Outcome) -> None:
    """A heat map of `agreement_by_class`, in percent."""
    names, table = agreement_by_class(outcome)
    low, high = min(float(np.nanmin(table)), 0.8), 1.05  # 1.05: the darkest blue is not needed
    axes.imshow(table, cmap="Blues", vmin=low, vmax=high, aspect="auto")
    for (i, c), share in np.ndenumerate(table):
        text = "" if np.isnan(share) else f"{100 * share:.0f}"
        colour = "white" if share > (low + high) / 2 else INK
        axes.text(c, i, text, ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(table.shape[1]))
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0, colors=INK)
    axes.spines[:].set_visible(False)
    axes.set_title("Agreement by the teacher's class, %", fontsize=11, color=INK)
    axes.set_xlabel("class named by the teacher", color=INK)


def style(axes: Axes, title: str, x: str, percent: bool = False) -> None:
    """Title, labels, grid and colours, the same in all pictures."""
    axes.set_title(title, fontsize=11, color=INK)
    axes.set_xlabel(x, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes."""
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()
