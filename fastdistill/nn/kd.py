"""`kd_loss` as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastdistill.kd.api import KDLossParts, check_settings, kd_loss


class KDLoss(nn.Module):
    """`fastdistill.kd_loss` with its settings kept in a module.

    Args:
        settings: any keyword of `kd_loss` but the per-call tensors `mask` and `row_weight`, which
            go to `forward` (as may `normalizer`, which then replaces the module's).

    Raises:
        TypeError, ValueError: a keyword that `kd_loss` does not have, or a value it would refuse.
    """

    _SETTINGS = (
        "temperature",
        "hard_weight",
        "soft_weight",
        "divergence",
        "scale_t2",
        "ignore_index",
        "label_smoothing",
        "dim",
        "reduction",
        "normalizer",
        "return_parts",
    )

    _PER_CALL = ("dim", "normalizer", "return_parts")  # checked with the logits

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        for name in settings:
            if name not in self._SETTINGS:
                raise TypeError(
                    f"KDLoss: expected one of {', '.join(self._SETTINGS)}; got {name!r}"
                )
        scalars = {k: v for k, v in settings.items() if k not in self._PER_CALL}
        check_settings(**scalars)
        self.settings = settings

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor | KDLossParts:
        """The loss; shapes and errors as in `fastdistill.kd_loss`."""
        settings = self.settings
        if normalizer is not None:
            settings = {**settings, "normalizer": normalizer}
        return kd_loss(
            student_logits, teacher_logits, labels, mask=mask, row_weight=row_weight, **settings
        )

    def extra_repr(self) -> str:
        """The settings that were given."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
