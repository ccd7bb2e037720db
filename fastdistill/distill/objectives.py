"""What each network is trained on: the cross-entropy with labels, the teacher's logits, or both."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

import fastdistill

HIDDEN = -100
"""The label of an image whose label the student must not see: `ignore_index` of both losses."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits [B, classes], rows [B] int64 of the training images) -> scalar loss."""


def hide(labels: Tensor, visible: Tensor) -> Tensor:
    """Labels [N] with all but the rows `visible` replaced by `HIDDEN`."""
    hidden = torch.full_like(labels, HIDDEN)
    hidden[visible] = labels[visible]
    return hidden


def labels_only(labels: Tensor) -> Loss:
    """Mean cross-entropy; every row drawn must have a label."""
    return lambda logits, rows: F.cross_entropy(logits, labels[rows])


def distilled(teacher_logits: Tensor, temperature: float) -> Loss:
    """Mean T^2 KL(teacher || student), no labels."""

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        soft = fastdistill.kd_loss(logits, teacher_logits[rows], temperature=temperature)
        return cast(Tensor, soft)  # not KDLossParts: return_parts is False

    return loss


def both(teacher_logits: Tensor, labels: Tensor, temperature: float) -> Loss:
    """The distillation loss of every row, plus the cross-entropy of each row that has a label.

    Two calls, because `kd_loss` drops a row whose label is `ignore_index` from both terms: in one
    call the unlabelled rows (seven in eight) would not be distilled at all. The cross-entropy is
    divided by all rows of the batch, not by the labelled ones, whose number changes from batch to
    batch and may be 0: so each labelled image weighs the same.
    """

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        teacher = teacher_logits[rows]
        soft = fastdistill.kd_loss(logits, teacher, temperature=temperature)
        hard = fastdistill.kd_loss(
            logits,
            teacher,
            labels[rows],
            hard_weight=1.0,
            soft_weight=0.0,
            ignore_index=HIDDEN,
            normalizer=float(len(rows)),
        )
        return cast(Tensor, soft) + cast(Tensor, hard)

    return loss
