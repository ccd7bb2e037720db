"""fastdistill: fused kernels for knowledge distillation in PyTorch."""

from fastdistill import nn, privacy
from fastdistill._backend import backend
from fastdistill._version import __version__
from fastdistill.hint import hint_loss
from fastdistill.kd import KDLossParts, kd_loss
from fastdistill.softmax import temperature_log_softmax, temperature_softmax

__all__ = [
    "KDLossParts",
    "__version__",
    "backend",
    "hint_loss",
    "kd_loss",
    "nn",
    "privacy",
    "temperature_log_softmax",
    "temperature_softmax",
]
