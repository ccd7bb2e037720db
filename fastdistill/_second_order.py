"""The gradient of a fused loss as a node that refuses to be differentiated again, in words.

As a constant it would be differentiated to a silent zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, anchor: Tensor, grad_output: Tensor, op: str) -> Tensor:
        ctx.op = op
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            f"{ctx.op}: the fused kernels have no second derivative; compute this loss under "
            'fastdistill.backend("reference"), or with a torch.func transform'
        )


def anchor(*inputs: Tensor) -> Tensor:
    """An empty sum: it leads to the inputs and keeps none of their memory."""
    total = inputs[0].narrow(-1, 0, 0).sum()
    for x in inputs[1:]:
        total = total + x.narrow(-1, 0, 0).sum()
    return total


def refusing(op: str, grad: Tensor, anchor: Tensor, grad_output: Tensor) -> Tensor:
    """`grad`, hung on `anchor` and on `grad_output`.

    Both: an engine that is asked for the derivative in one of them only must pass here too.
    """
    return _Refuse.apply(grad, anchor, grad_output, op)
