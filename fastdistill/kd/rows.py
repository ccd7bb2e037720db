"""How the parts of each row become one loss: plain PyTorch on [...] tensors.

The reference and the GPU launchers share it (the CPU kernel does the same inside its one pass).
"""

from __future__ import annotations

import torch
from torch import Tensor


def reduce_rows(
    hard: Tensor,
    soft: Tensor,
    scale: Tensor,
    hard_weight: float,
    soft_weight: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, hard, soft) from the parts of each row, all [...]; "none" keeps the rows."""
    keep = scale != 0
    hard = torch.where(keep, hard * scale, 0.0)
    soft = torch.where(keep, soft * scale, 0.0)
    if hard_weight == 0:
        loss = soft_weight * soft
    elif soft_weight == 0:
        loss = hard_weight * hard
    else:
        loss = hard_weight * hard + soft_weight * soft
    if reduction != "none":
        loss, hard, soft = loss.sum(), hard.sum(), soft.sum()
    return loss, hard, soft
