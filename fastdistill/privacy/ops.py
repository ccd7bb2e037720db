"""Schema, fake and the table backend -> launcher of this room's op. Registration only.

The op is private: `api.py` validates for it, `source.py` sees that no counter comes twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill._backend import Launchers

launcher = Launchers({"cpu": "fastdistill.privacy.native"})
_library = torch.library.Library("fastdistill", "FRAGMENT")
_library.define(
    "clip_and_noise(Tensor[] grad_samples, float clip, float unit, float fine, float grid,"
    " float scale, float inverse, int kind, Tensor key, int stream, str backend) -> Tensor[]"
)


def allocate(grad_samples: Sequence[Tensor]) -> list[Tensor]:
    """Uninitialised results: [*shape] for [B, *shape], float32, or float64 for float64."""
    return [
        torch.empty(
            x.shape[1:],
            dtype=torch.float64 if x.dtype is torch.float64 else torch.float32,
            device=x.device,
        )
        for x in grad_samples
    ]


def _clip_and_noise(grad_samples: Sequence[Tensor], *args: Any) -> list[Tensor]:
    return launcher(args[-1]).clip_and_noise(grad_samples, *args[:-1])


for _key in ("CPU", "CUDA"):
    _library.impl("clip_and_noise", _clip_and_noise, _key)


@torch.library.register_fake("fastdistill::clip_and_noise", lib=_library)
def _fake(grad_samples: Sequence[Tensor], *args: object) -> list[Tensor]:
    return allocate(grad_samples)


clip_and_noise = torch.ops.fastdistill.clip_and_noise.default
"""The op."""
