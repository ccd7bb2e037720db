"""Room: divergences between temperature-scaled class distributions, with the hard-label term."""

from fastdistill.kd.api import KDLossParts, kd_loss

__all__ = ["KDLossParts", "kd_loss"]
