"""Schemas, fakes and the table backend -> launcher of this room's ops. Registration only.

The ops are private: `api.py` and `teachers.py` validate for them, `source.py` sees that no counter
comes twice. They take numbers one by one; the launchers take what the reference does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill._backend import Launchers
from fastdistill.privacy.mechanism import Mechanism
from fastdistill.privacy.source import Source

launcher = Launchers(
    {
        "cpu": "fastdistill.privacy.native",
        "cuda": "fastdistill.privacy.native_cuda",
        "triton": "fastdistill.privacy.triton",
    }
)
_library = torch.library.Library("fastdistill", "FRAGMENT")
_RELEASE = (  # a Mechanism, a Source
    "float clip, float unit, float fine, float grid, float scale, float inverse, int kind,"
    " Tensor key, int stream, str backend"
)
_library.define(f"clip_and_noise(Tensor[] grad_samples, {_RELEASE}) -> Tensor[]")
_library.define(f"add_noise_(Tensor(a!)[] sums, {_RELEASE}) -> ()")
_library.define(f"noisy_softmax_sum(Tensor[] teachers, float temperature, {_RELEASE}) -> Tensor")
_library.define(f"noisy_gradient_sum(Tensor[] teachers, {_RELEASE}) -> Tensor")


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


def allocate_rows(teachers: Sequence[Tensor]) -> Tensor:
    """An uninitialised result [n, C] for teachers' [n, C]: float32, or float64 for float64."""
    return allocate([teachers[0][None]])[0]


def _read(args: Sequence[Any]) -> tuple[Mechanism, Source]:
    """_RELEASE, but for the backend."""
    return Mechanism(*args[:6]), Source(*args[6:9])


def _clip_and_noise(grad_samples: Sequence[Tensor], *args: Any) -> list[Tensor]:
    return launcher(args[-1]).clip_and_noise(grad_samples, *_read(args))


def _add_noise_(sums: Sequence[Tensor], *args: Any) -> None:
    launcher(args[-1]).add_noise_(sums, *_read(args))


def _noisy_softmax_sum(teachers: Sequence[Tensor], temperature: float, *args: Any) -> Tensor:
    return launcher(args[-1]).noisy_softmax_sum(teachers, temperature, *_read(args))


def _noisy_gradient_sum(teachers: Sequence[Tensor], *args: Any) -> Tensor:
    return launcher(args[-1]).noisy_gradient_sum(teachers, *_read(args))


for _key in ("CPU", "CUDA"):
    _library.impl("clip_and_noise", _clip_and_noise, _key)
    _library.impl("add_noise_", _add_noise_, _key)
    _library.impl("noisy_softmax_sum", _noisy_softmax_sum, _key)
    _library.impl("noisy_gradient_sum", _noisy_gradient_sum, _key)


@torch.library.register_fake("fastdistill::clip_and_noise", lib=_library)
def _fake(grad_samples: Sequence[Tensor], *args: object) -> list[Tensor]:
    return allocate(grad_samples)


@torch.library.register_fake("fastdistill::add_noise_", lib=_library)
def _fake_add_noise(sums: Sequence[Tensor], *args: object) -> None:
    return None


@torch.library.register_fake("fastdistill::noisy_softmax_sum", lib=_library)
@torch.library.register_fake("fastdistill::noisy_gradient_sum", lib=_library)
def _fake_rows(teachers: Sequence[Tensor], *args: object) -> Tensor:
    return allocate_rows(teachers)


clip_and_noise = torch.ops.fastdistill.clip_and_noise.default
add_noise_ = torch.ops.fastdistill.add_noise_.default
noisy_softmax_sum = torch.ops.fastdistill.noisy_softmax_sum.default
noisy_gradient_sum = torch.ops.fastdistill.noisy_gradient_sum.default
"""The ops."""
