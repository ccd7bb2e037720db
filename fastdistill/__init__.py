"""fastdistill: fused kernels for knowledge distillation in PyTorch."""

from fastdistill import nn, privacy
from fastdistill._backend import backend
from fastdistill._version import __version__
from fastdistill.kd import KDLossParts, kd_loss

__all__ = ["KDLossParts", "__version__", "backend", "kd_loss", "nn", "privacy"]
