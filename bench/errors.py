"""Is it right? Each contender's loss and gradient against float64, before anything is timed."""

from __future__ import annotations

import torch

from bench.op import Contender, Inputs, Op

ALLOWED = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
"""Relative error, of loss and of gradient, from which on a contender counts as wrong. PyTorch's
own formula in bf16 sets the second: it rounds log-probabilities to 8 bits."""

NEAR_ALLOWED = {"fp32": 1e-2, "bf16": 5e-2, "fp16": 5e-2}
"""The same where student and teacher are nearly alike and the loss is nothing but what is left of
a difference."""


def of_near(op: Op, contenders: dict[str, Contender], x: Inputs) -> dict[str, dict[str, float]]:
    """As `of_all`, of inputs that are nearly alike, by the term alone that they make small."""
    if op.near is None:
        return {}
    chosen = {
        name: c._replace(loss=c.near or c.loss, truth=c.near_truth or c.truth)
        for name, c in contenders.items()
        if (c.near_truth or c.truth)[1]
    }
    return of_all(op, chosen, op.near(x))


def of_all(op: Op, contenders: dict[str, Contender], x: Inputs) -> dict[str, dict[str, float]]:
    """{contender: {"loss": |l - l64| / |l64|, "gradient": norm(g - g64) / norm(g64)}}; of several
    gradients the worst."""
    outputs = {name: _outputs(c, x) for name, c in contenders.items()}
    found = {}
    for weights in dict.fromkeys(c.truth for c in contenders.values()):
        names = [name for name, c in contenders.items() if c.truth == weights]
        loss, leaves = 0.0, range(len(x.leaves()))
        square = [0.0 for _ in leaves]
        off = {name: [0.0 for _ in leaves] for name in names}
        for begin, end, part, gradients in op.truth(x, *weights):
            loss += float(part)
            for i, gradient in enumerate(gradients):
                square[i] += float(gradient.square().sum())
                for name in names:
                    difference = outputs[name][1][i][begin:end].double() - gradient
                    if rounding := outputs[name][2]:
                        difference = difference.abs().sub_(rounding).clamp_(min=0)
                    off[name][i] += float(difference.square().sum())
        for name in names:
            found[name] = {
                "loss": abs(outputs[name][0] - loss) / abs(loss),
                "gradient": max((off[name][i] / square[i]) ** 0.5 for i in leaves),
            }
    return {name: found[name] for name in contenders}


def acceptable(error: dict[str, float], allowed: float) -> bool:
    """False also for NaN."""
    return all(value <= allowed for value in error.values())


HALF_SCALE = 8192.0
HALF_ROUNDING = 2.0**-25  # half of float16's smallest number


def _outputs(contender: Contender, x: Inputs):
    """The loss, the gradients, and what of an error in them is float16's range and not counted.

    Gradients of float16 are those of a scaled loss, as a GradScaler has them.
    """
    x.forget()
    loss = contender.loss(x)
    half = x.student.dtype is torch.float16 and isinstance(loss, torch.Tensor)
    scale = HALF_SCALE if half else 1.0
    (loss * scale if half else loss).backward()
    gradients = [leaf.grad.double() / scale if half else leaf.grad for leaf in x.leaves()]
    x.forget()
    return float(loss.detach()), gradients, HALF_ROUNDING / scale if half else 0.0
