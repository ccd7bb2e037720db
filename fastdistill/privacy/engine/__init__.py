"""`PrivacyEngine`: Opacus's engine with private gradients from one backward pass."""

from fastdistill.privacy.engine.engine import PrivacyEngine

__all__ = ["PrivacyEngine"]
