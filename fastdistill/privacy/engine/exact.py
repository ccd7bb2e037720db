"""The arithmetic that the bounds are of, whatever the caller has switched on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products of float32 in float32, for clip factors, norms and sums.

    Under autocast, or with tf32 allowed, they would be of factors rounded to 8 or 11 bits, often
    upwards: a sample would contribute up to 1.004 C.
    """
    places = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [place.fp32_precision for place in places]
    changed = [(p, value) for p, value in zip(places, before, strict=True) if value != "ieee"]
    for place, _ in changed:
        place.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for place, value in changed:
            place.fp32_precision = value
