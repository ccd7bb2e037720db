"""What a job tells while it runs."""

from __future__ import annotations

from fastdistill.distill.snapshot import Curve


class Listener:
    """Silent; the command line overrides the methods to draw progress bars."""

    def say(self, text: str) -> None:
        """One line for the user."""

    def begin(self, epochs: int) -> None:
        """All networks together train so many epochs."""

    def progress(self, network: str, epochs: int, curve: Curve) -> None:
        """`network` has finished `len(curve)` of its epochs."""
