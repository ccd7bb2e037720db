"""Room: distances between a layer of the teacher and a projected layer of the student."""

from fastdistill._hint_placeholder import hint_loss

__all__ = ["hint_loss"]
