"""The loss of DistilBERT."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdistill import _validate
from fastdistill.hint import hint_loss
from fastdistill.kd import KDLossParts, kd_loss


class DistilBertLossParts(NamedTuple):
    """The loss with its three parts: loss = 5 soft + 2 task + 1 cosine, by default.

    The parts are detached and unweighted, T^2 included in `soft`.
    """

    loss: Tensor
    soft: Tensor
    task: Tensor
    cosine: Tensor


class DistilBertLoss(nn.Module):
    """The loss that DistilBERT was trained with: soft targets, masked language model, cosine.

    Sanh et al. 2019, "DistilBERT, a distilled version of BERT", section 3, as their published
    script (distiller.py of transformers) computes it::

        5 T^2 KL(softmax(z_t / T), softmax(z_s / T)) + 2 CE(z_s, labels) + 1 (1 - cos(h_s, h_t))

    with T = 2. The first and the last term are means over the tokens of `attention_mask`, the
    second one over the tokens with a label.

    Args:
        temperature: T > 0 of the soft targets.
        soft_weight: of the soft targets. A term of weight 0 is not computed, and is 0 in the parts.
        task_weight: of the cross-entropy with the labels.
        cosine_weight: of 1 - cosine of the last hidden states.
        restrict_to_labels: take the soft targets of the tokens with a label only (the script's
            `restrict_ce_to_mask`).
        ignore_index: the label of a token without label.
        return_parts: return `DistilBertLossParts`.

    Raises:
        TypeError, ValueError: a setting of another type, a temperature that is not positive.
    """

    def __init__(
        self,
        *,
        temperature: float = 2.0,
        soft_weight: float = 5.0,
        task_weight: float = 2.0,
        cosine_weight: float = 1.0,
        restrict_to_labels: bool = False,
        ignore_index: int = -100,
        return_parts: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = _validate.temperature(temperature, squared=True)
        self.soft_weight = _validate.factor("soft_weight", soft_weight)
        self.task_weight = _validate.factor("task_weight", task_weight)
        self.cosine_weight = _validate.factor("cosine_weight", cosine_weight)
        self.restrict_to_labels = _validate.boolean("restrict_to_labels", restrict_to_labels)
        self.ignore_index = _validate.integer("ignore_index", ignore_index)
        self.return_parts = _validate.boolean("return_parts", return_parts)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        student_hidden: Tensor | None = None,
        teacher_hidden: Tensor | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | DistilBertLossParts:
        """The loss.

        Args:
            student_logits: [B, L, V].
            teacher_logits: the same shape; gets no gradient.
            student_hidden: [B, L, D], the last hidden states; needed unless `cosine_weight` is 0.
            teacher_hidden: the same shape; gets no gradient.
            labels: [B, L] int64; needed unless `task_weight` is 0.
            attention_mask: [B, L], bool or integers: 0 or False marks padding. None: no padding.

        Raises:
            TypeError, ValueError: the argument's name, what was expected and what came.
        """
        _validate.floating("student_logits", student_logits)
        rows = student_logits.shape[:-1]
        kept = None
        if attention_mask is not None:
            _validate.tensor("attention_mask", attention_mask)
            _validate.same_shape("attention_mask", attention_mask, rows, "the tokens of the logits")
            if attention_mask.dtype.is_floating_point or attention_mask.dtype.is_complex:
                raise TypeError(
                    f"attention_mask: expected bool or integers, got {attention_mask.dtype}"
                )
            kept = attention_mask != 0
        if labels is None and (self.task_weight != 0 or self.restrict_to_labels):
            raise ValueError(
                f"labels: expected a tensor with task_weight={self.task_weight:g} and "
                f"restrict_to_labels={self.restrict_to_labels}, got None"
            )

        soft = task = cosine = torch.zeros((), dtype=torch.float32, device=student_logits.device)
        if self.soft_weight != 0:
            mask = kept
            if labels is not None and self.restrict_to_labels:
                mask = labels != self.ignore_index
            soft = _loss(
                kd_loss(student_logits, teacher_logits, temperature=self.temperature, mask=mask)
            )
        if self.task_weight != 0:
            task = _loss(
                kd_loss(
                    student_logits,
                    teacher_logits,
                    labels,
                    hard_weight=1.0,
                    soft_weight=0.0,
                    ignore_index=self.ignore_index,
                )
            )
        if self.cosine_weight != 0:
            hidden = (student_hidden, teacher_hidden)
            for name, value in zip(("student_hidden", "teacher_hidden"), hidden, strict=True):
                if value is None:
                    raise ValueError(
                        f"{name}: expected a tensor with cosine_weight={self.cosine_weight:g}, "
                        "got None"
                    )
            cosine = hint_loss(student_hidden, teacher_hidden, distance="cosine", mask=kept)  # type: ignore[arg-type]
        loss = self.soft_weight * soft + self.task_weight * task + self.cosine_weight * cosine
        if not self.return_parts:
            return loss
        return DistilBertLossParts(loss, soft.detach(), task.detach(), cosine.detach())

    def extra_repr(self) -> str:
        """The weights and the temperature."""
        return (
            f"temperature={self.temperature:g}, soft_weight={self.soft_weight:g}, "
            f"task_weight={self.task_weight:g}, cosine_weight={self.cosine_weight:g}"
        )


def _loss(value: Tensor | KDLossParts) -> Tensor:
    """Of a call without return_parts."""
    assert isinstance(value, Tensor)
    return value
