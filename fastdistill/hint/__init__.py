"""Room: distances between a layer of the teacher and a projected layer of the student."""

from fastdistill.hint.api import hint_loss
from fastdistill.hint.relations import attention_kl, attention_transfer

__all__ = ["attention_kl", "attention_transfer", "hint_loss"]
