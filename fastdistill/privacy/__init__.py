"""Room: private releases: clipped gradients and teachers' answers, exact sums, Gaussian noise."""

from typing import TYPE_CHECKING, Any

from fastdistill.privacy.api import clip_and_noise
from fastdistill.privacy.teachers import noisy_gradient_sum, noisy_softmax_sum

if TYPE_CHECKING:
    from fastdistill.privacy.engine import PrivacyEngine

__all__ = ["PrivacyEngine", "clip_and_noise", "noisy_gradient_sum", "noisy_softmax_sum"]


def __getattr__(name: str) -> Any:
    if name == "PrivacyEngine":  # on demand: Opacus takes longer to import than all else here
        from fastdistill.privacy.engine import PrivacyEngine

        return PrivacyEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
