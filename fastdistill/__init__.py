"""fastdistill: fused kernels for knowledge distillation in PyTorch."""

from fastdistill._backend import backend
from fastdistill.kd import KDLossParts, kd_loss

__version__ = "0.1.0"

__all__ = ["KDLossParts", "__version__", "backend", "kd_loss"]
