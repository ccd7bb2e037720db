"""Room: per-sample clipping, exact sums and Gaussian noise for differentially private gradients."""

from fastdistill.privacy.api import clip_and_noise

__all__ = ["clip_and_noise"]
