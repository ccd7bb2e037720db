"""Norms of samples, and noise on sums that are already clipped: what the engine is made of.

`clip_and_noise` does all of it at once for those who have per-sample gradients; the engine has the
weighted sums without ever having had those.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistill.privacy import native, ops, reference, release
from fastdistill.privacy.mechanism import Mechanism
from fastdistill.privacy.source import Source

OP = "add_noise"


def add_noise_(sums: Sequence[Tensor], mechanism: Mechanism, bits: Source) -> None:
    """Round each sum to the grid, add its noise, divide: in place.

    Args:
        sums: tensors of one device, float32 or float64: sums of clipped gradients, finite, of at
            most 2^20 samples. The tensor's index is in the counter of its noise.
        mechanism: what `mechanism.plan` made for all of them.
        bits: a stream that nothing else has used.
    """
    backend = release.choose(OP, sums)
    with torch.no_grad():
        if backend == "reference":
            reference.add_noise_(sums, mechanism, bits)
        else:
            ops.add_noise_(list(sums), *mechanism, *bits, backend)


def square_norms(x: Tensor) -> Tensor:
    """The square norms of the samples of [B, ...], float64 [B]; squares of float32 are exact."""
    if release.choose(OP, [x]) == "cpu":
        return native.square_norms(x)
    rows = x.reshape(len(x), x.shape[1:].numel())
    out = torch.zeros(len(rows), dtype=torch.float64, device=x.device)
    step = max(_SLAB // max(rows.shape[1], 1), 1)
    for i in range(0, len(rows), step):
        out[i : i + step] = rows[i : i + step].double().square().sum(1)
    return out


_SLAB = 1 << 20
"""Elements that are widened at once."""

release.register(OP)
