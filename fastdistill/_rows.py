"""Which rows count, and how much: plain PyTorch on [...] tensors, for every loss over rows.

References and GPU launchers share it (a CPU kernel may do the same inside its one pass). A row is
one position of the batch: one pair of class distributions, one pair of feature vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill import _validate


def check_values(
    labels: Tensor | None,
    mask: Tensor | None,
    row_weight: Tensor | None,
    normalizer: Tensor | None,
    classes: int,
    ignore_index: int,
    dtype: torch.dtype,
) -> None:
    """Refuse out-of-range labels, and weights that are bad or that `dtype` cannot hold.

    Reads values: only for tensors on the CPU.
    """
    if row_weight is not None:
        bad = ~((row_weight >= 0) & row_weight.to(dtype).isfinite())
        if bool(bad.any()):
            raise ValueError(bad_weight(float(row_weight[bad][0])))
    if labels is not None:
        bad = (labels != ignore_index) & ((labels < 0) | (labels >= classes))
        if mask is not None:
            bad = bad & mask
        if row_weight is not None:
            bad = bad & (row_weight != 0)
        if bool(bad.any()):
            raise ValueError(bad_label(int(labels[bad][0]), classes, ignore_index))
    if normalizer is not None:
        read_normalizer(normalizer)


def bad_label(value: int, classes: int, ignore_index: int) -> str:
    """The sentence for a label that names no class."""
    return (
        f"labels: expected values in [0, {classes - 1}] or ignore_index={ignore_index}, got {value}"
    )


def bad_weight(value: float) -> str:
    """The sentence for a row weight that is negative or not finite."""
    return f"row_weight: expected finite values >= 0, got {value} (in the type of the loss)"


def read_normalizer(normalizer: Tensor) -> float:
    """Its value; refused if it is no number to divide by. Only for tensors on the CPU."""
    value = float(normalizer)
    if not 0 < value < float("inf"):
        raise ValueError(f"normalizer: expected a finite number > 0, got {value}")
    return _validate.factor("normalizer", value)


def check_temperature(temperature: Tensor) -> None:
    """Refuse what is not finite and > 0. Reads values: only for tensors on the CPU."""
    bad = ~_usable(temperature)
    if bool(bad.any()):
        raise ValueError(
            f"temperature: expected finite values > 0, got {float(temperature[bad][0])} (and from "
            f"{_validate.SMALLEST} to {_validate.LARGEST})"
        )


def valid_temperature(temperature: Tensor) -> Tensor:
    """NaN in place of what `check_temperature` would refuse: no synchronisation, a NaN row."""
    return torch.where(_usable(temperature), temperature, float("nan"))


def _usable(temperature: Tensor) -> Tensor:
    """The ends of the range are 0 and infinity in float16."""
    inside = (temperature >= _validate.SMALLEST) & (temperature <= _validate.LARGEST)
    return inside & (temperature > 0) & (temperature < float("inf"))


def row_scale(
    logits: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    row_weight: Tensor | None,
    normalizer: Tensor | None,
    ignore_index: int,
    reduction: str,
    divisor: float,
    dtype: torch.dtype,
) -> Tensor:
    """The factor of each row in the loss, [...]: its weight over the divisor, 0 where dropped.

    `reduction` is "mean" (over the sum of the weights kept), "sum" (over `divisor` or
    `normalizer`) or "none". A label out of range or a bad weight gives NaN for that row, and no
    synchronisation. The other rows keep their values: neither enters the sum of the weights.
    """
    weight = torch.ones(logits.shape[:-1], dtype=dtype, device=logits.device)
    if row_weight is not None:
        weight = row_weight.detach().to(dtype)
    bad = ~((weight >= 0) & (weight < float("inf")))
    if labels is not None:
        weight = torch.where(labels == ignore_index, 0.0, weight)
        bad = bad | ((labels < 0) | (labels >= logits.shape[-1]))
    if mask is not None:
        weight = torch.where(mask, weight, 0.0)
    bad = bad & (weight != 0)
    if reduction == "mean":
        total = torch.where(bad, 0.0, weight).sum()
        weight = weight / torch.where(total == 0, 1.0, total)
    elif normalizer is not None:
        valid = (normalizer > 0) & (normalizer < float("inf"))
        weight = weight / torch.where(valid, normalizer.detach().to(dtype), float("nan"))
    elif divisor != 1.0:
        weight = weight / divisor
    return torch.where(bad, float("nan"), weight)
