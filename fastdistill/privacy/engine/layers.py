"""The layers whose per-sample gradients are known as products or sums, and a way for the others.

`LAYERS` is looked up by the exact type of a layer, as Opacus does. A layer that is not in it goes
by Opacus's own sampler for its type, or else by functorch, which runs the layer again for each
sample: `describe` says which.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastdistill.privacy.engine.capture import Rule
from fastdistill.privacy.engine.gradients import Dense, Pairs, Piece, wide

Kept = tuple[Tensor, ...]
Pieces = list[tuple[Tensor, Piece]]


class _Layer:
    """What most rules share."""

    def prepare(self, layer: Any, x: Tensor) -> Tensor:
        """The input as `run` takes it."""
        return x

    def input_gradient(self, layer: Any, x: Tensor, kept: Kept, grad: Tensor) -> Tensor | None:
        """The gradient of the input."""
        raise NotImplementedError


def _rows(x: Tensor) -> Tensor:
    """[B, d], [B, T, d] or [B, ..., d] as [B, T, d]."""
    return x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)


def _summed(x: Tensor) -> Tensor:
    """The sum over the rows of [B, ..., d], [B, d]."""
    x = wide(x)
    return x if x.ndim == 2 else x.flatten(1, -2).sum(1)


class _Linear(_Layer):
    """g_i = sum_t G_it A_it'; the bias: sum_t G_it."""

    def run(self, layer: nn.Linear, x: Tensor) -> tuple[Tensor, Kept]:
        """The output."""
        return F.linear(x, layer.weight, layer.bias), ()

    def input_gradient(self, layer: nn.Linear, x: Tensor, kept: Kept, grad: Tensor) -> Tensor:
        """G W."""
        return (grad @ layer.weight.to(grad.dtype)).to(x.dtype)

    def pieces(self, layer: nn.Linear, x: Tensor, kept: Kept, grad: Tensor) -> Pieces:
        """Of weight and bias."""
        out: Pieces = []
        if layer.weight.requires_grad:
            out.append((layer.weight, Pairs(_rows(x), _rows(grad))))
        if layer.bias is not None and layer.bias.requires_grad:
            out.append((layer.bias, Dense(_summed(grad))))
        return out


LAYERS: dict[type[nn.Module], Rule] = {nn.Linear: _Linear()}


FUSED = "ghost_fused"
"""What `find` says of a layer in `LAYERS`."""


def known(layer: nn.Module) -> bool:
    """Whether the layer has a rule."""
    return type(layer) in LAYERS


def find(layer: nn.Module, name: str, batch_first: bool) -> tuple[Rule, str]:
    """The layer's rule, and in words how its per-sample gradients are found."""
    rule = LAYERS.get(type(layer))
    if rule is None:
        raise ValueError(f"module: {name}: no rule for {type(layer).__name__}")
    return rule, FUSED
