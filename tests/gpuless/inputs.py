"""Rows as the rooms' entries draw them: small, strided in several ways, inside NaN."""

from __future__ import annotations

import mmap

import torch
from entries import DTYPES, Config
from torch import Tensor

ROWS = 3


def far_apart(rows: Tensor) -> Tensor:
    """The same rows, the third more than 2^31 elements after the first, at a stride that fits in
    32 bits; the memory between costs none where nothing touches it."""
    step = 2**30 + 2**10
    memory = mmap.mmap(-1, ((len(rows) - 1) * step + rows.shape[-1]) * rows.element_size())
    far = torch.frombuffer(memory, dtype=rows.dtype).as_strided(rows.shape, (step, 1))
    return far.copy_(rows)


def strided(config: Config, dtype: str, padded: int) -> Tensor:
    """Rows that lie in NaN, so that what is read beside them shows."""
    cols, layout = config["cols"], config["layout"]
    if layout == "next_token":
        x = torch.randn(2, ROWS + 1, cols).mul(2).to(DTYPES[dtype])
        x[:, -1] = float("nan")
        return x[:, :-1]
    x = torch.full((ROWS, cols + (padded if layout == "padded" else 0)), float("nan"))
    x = x.to(DTYPES[dtype])
    x[:, :cols] = torch.randn(ROWS, cols).mul(2)
    return far_apart(x) if layout == "far" else x[:, :cols]
