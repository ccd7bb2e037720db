"""The oracle of this room: plain differentiable PyTorch, no hand-written backward.

It is also the fallback on devices without a kernel and under functorch transforms, and it gives
the fused gradient its derivative. Never edit it to match a kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill import _rows, _torch_private


def softmax(x: Tensor, temperature: Tensor | None, scalar: float, log: bool) -> Tensor:
    """softmax(x / T) of [..., V], or its logarithm, in x's dtype: T is `temperature` [...], or
    `scalar` without it. Half precision is computed in float32.
    """
    z = x.to(torch.float64 if x.dtype is torch.float64 else torch.float32)
    z = z - z.detach().amax(-1, keepdim=True)  # a small T must not overflow x / T
    if temperature is None:
        z = z / scalar
    else:
        if _torch_private.has_values(x):
            _rows.check_temperature(temperature)
        t = _rows.valid_temperature(temperature).to(z.dtype).unsqueeze(-1)
        # A class that -inf masks is masked at every T: it has no part in the gradient of T.
        masked = z == -float("inf")
        z = torch.where(masked, z / t.detach(), torch.where(masked, 0.0, z) / t)
    y = torch.log_softmax(z, -1) if log else torch.softmax(z, -1)
    return y.to(x.dtype)
