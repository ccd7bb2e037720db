"""Room: private releases: clipped gradients and teachers' answers, exact sums, Gaussian noise."""

from fastdistill.privacy.api import clip_and_noise
from fastdistill.privacy.teachers import noisy_gradient_sum, noisy_softmax_sum

__all__ = ["clip_and_noise", "noisy_gradient_sum", "noisy_softmax_sum"]
