"""Room: the distance between a teacher's layer and a projected student's layer."""

from fastdistill.hint.api import hint_loss

__all__ = ["hint_loss"]
