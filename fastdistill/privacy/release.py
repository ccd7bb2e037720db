"""What every release begins with: its numbers checked, a backend, a fresh stream of noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistill import _backend, _refusals, _torch_private, _validate
from fastdistill.privacy import mechanism, source
from fastdistill.privacy.source import Source


def clip_norm(value: object) -> float:
    """The argument `max_norm`."""
    max_norm = _validate.positive("max_norm", value)
    if not mechanism.SMALLEST_NORM <= max_norm <= mechanism.LARGEST_NORM:
        raise ValueError(f"max_norm: expected a number from 2^-64 to 2^64, got {max_norm}")
    return max_norm


def noise(name: str, value: object) -> float:
    """A multiplier or a standard deviation of noise: >= 0."""
    x = _validate.number(name, value)
    if x < 0:
        raise ValueError(f"{name}: expected a number >= 0, got {x}")
    return x


def check_generator(value: object) -> None:
    """A torch.Generator or None."""
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(
            f"generator: expected a torch.Generator or None, got {type(value).__name__}"
        )


def choose(op: str, tensors: Sequence[Tensor]) -> str:
    """The backend that runs the release of these tensors, all of one device.

    Raises:
        RuntimeError: none can; or the call would be recorded, and its noise with it.
    """
    device = tensors[0].device
    dtypes = tuple(dict.fromkeys(x.dtype for x in tensors))
    case = _backend.Case(device.type, dtypes, _torch_private.transforms_active())
    backend = _backend.choose(op, case)
    # A graph that is compiled or captured once would add the same noise to every gradient.
    if torch.compiler.is_compiling():
        raise RuntimeError(f"{op}: torch.compile cannot trace it: its noise would be a constant")
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{op}: a CUDA graph cannot capture it: its noise would be replayed")
    return backend


def stream(width: float, generator: torch.Generator | None) -> Source:
    """Fresh random bits, or none where the noise has no width."""
    if width == 0:
        return source.silent()
    return source.secure() if generator is None else source.seeded(generator)


def _no_transforms(case: _backend.Case) -> str | None:
    if case.transforms:
        return "a private release is not differentiated or mapped: call it outside the transform"
    return None


_REFUSALS: dict[str, _backend.Refusal] = {
    "cuda": lambda case: _no_transforms(case) or _refusals.cuda(case, None),
    "triton": lambda case: _no_transforms(case) or _refusals.triton(case),
    "cpu": lambda case: _no_transforms(case) or _refusals.cpu(case),
    "reference": _no_transforms,
}


def register(op: str) -> None:
    """Make a release known to the table of backends."""
    _backend.register(op, _REFUSALS)
