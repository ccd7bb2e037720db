"""The terminal: progress bars on standard error, the summary on standard output."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from fastdistill.distill import report
from fastdistill.distill.listener import Listener
from fastdistill.distill.snapshot import Curve

QUIET_S = 15.0


class Terminal(Listener):
    """Two bars: all epochs of the job, and those of the network in training.

    Where standard error is no terminal, one line per finished network instead, one where a network
    is taken up again, and one per epoch if `QUIET_S` seconds have passed since the last: a long
    training in a log must not look like one that hangs.
    """

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} epochs"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.total: TaskID | None = None
        self.current: tuple[str, TaskID] | None = None
        self.counted = 0  # epochs of the current network that the bar of the job includes
        self.said = time.monotonic()

    def __enter__(self) -> Terminal:
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.stop()

    def say(self, text: str) -> None:
        """One line above the bars."""
        self.said = time.monotonic()
        self.bars.console.print(text, markup=False, soft_wrap=True)

    def begin(self, epochs: int) -> None:
        """Show the bar of the whole job."""
        self.total = self.bars.add_task("all networks", total=epochs, figures="")

    def progress(self, network: str, epochs: int, curve: Curve) -> None:
        """Move both bars; a line for a network that is finished."""
        figures = _headline(curve[-1]) if curve else ""
        first = self.current is None or self.current[0] != network
        if self.current is None or self.current[0] != network:
            if self.current is not None:
                self.bars.remove_task(self.current[1])
            task = self.bars.add_task(network, total=epochs, figures=figures)
            self.current, self.counted = (network, task), 0
        self.bars.update(self.current[1], completed=len(curve), figures=figures)
        if self.total is not None:
            self.bars.advance(self.total, len(curve) - self.counted)
        self.counted = len(curve)
        if len(curve) == epochs:
            self.say(f"{network}: {figures}")
        elif curve and not self.console.is_terminal:
            if first or time.monotonic() - self.said >= QUIET_S:
                self.say(f"{network}: {len(curve)} of {epochs} epochs, {figures}")


def _headline(entry: dict[str, float]) -> str:
    """The figure that one watches, of an entry of a curve."""
    if "correlation" in entry:
        return f"correlation {entry['correlation']:.3f}"
    if "accuracy" in entry:
        return f"accuracy {entry['accuracy']:.1%}"
    return f"loss {entry['loss']:.4f}"


def summary(figures: dict[str, Any], out: str) -> None:
    """Print the table of `fastdistill distill`, its notes and where everything is."""
    notes = (*report.notes(figures), figures["data"]["licence"])
    show(report.HEADINGS, report.table(figures), notes, out)


def show(
    headings: Iterable[str],
    rows: Iterable[tuple[str, ...]],
    notes: Iterable[str],
    out: str | None,
) -> None:
    """Print a table, its notes and where the report is, if there is one."""
    console = Console(highlight=False)
    # no paddings, as its columns are 2 apart: it has to fit in 80 columns
    table = Table(*headings, box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for line in notes:
        console.print(line, markup=False)
    if out is not None:
        console.print(f"Report: {out}/report.html", markup=False, soft_wrap=True)
