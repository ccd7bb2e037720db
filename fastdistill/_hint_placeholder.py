"""Stands in for `fastdistill.hint.hint_loss` until that room is here; then this file goes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill import _backend

_backend.register("hint_loss", {"reference": lambda case: None})


def hint_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    distance: str = "mse",
    mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    feature_norm: str | tuple[str | None, str | None] | None = None,
    channel_dim: int = -1,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """The signature of the hint room over plain PyTorch."""
    student = student_features.movedim(channel_dim, -1)
    teacher = teacher_features.detach().movedim(channel_dim, -1)
    if mask is not None:  # by select, so that nothing of a dropped row survives
        student = torch.where(mask[..., None], student, 0)
        teacher = torch.where(mask[..., None], teacher, 0)
    if proj_weight is not None:
        student = F.linear(student, proj_weight, proj_bias)
    if student.shape != teacher.shape:
        raise ValueError(
            f"teacher_features: expected shape {list(student.shape)}, got {list(teacher.shape)}"
        )
    pair = feature_norm if isinstance(feature_norm, tuple) else (feature_norm, feature_norm)
    wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    student, teacher = _normed(student.to(wide), pair[0]), _normed(teacher.to(wide), pair[1])
    if distance == "cosine":
        rows = 1 - F.cosine_similarity(student, teacher, -1)
    else:
        elementwise = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}[distance]
        rows = elementwise(student, teacher, reduction="none").mean(-1)
    weight = torch.ones_like(rows) if row_weight is None else row_weight
    if mask is not None:
        rows, weight = torch.where(mask, rows, 0), torch.where(mask, weight, 0)
    rows = rows * weight
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    return rows.sum() / (weight.sum() if normalizer is None else normalizer)


def _normed(x: Tensor, norm: str | None) -> Tensor:
    if norm == "layer_norm":
        return F.layer_norm(x, x.shape[-1:])
    return F.normalize(x, dim=-1) if norm == "l2" else x
