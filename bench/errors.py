"""Is it right? Each contender's loss and gradient against float64, before anything is timed."""

from __future__ import annotations

from bench.cases import Contender, Inputs, Op

ALLOWED = {"fp32": 1e-4, "bf16": 5e-2}
"""Relative error, of loss and of gradient, from which on a contender counts as wrong. PyTorch's
own formula in bf16 sets the second: it rounds log-probabilities to 8 bits."""


def of_all(op: Op, contenders: dict[str, Contender], x: Inputs) -> dict[str, dict[str, float]]:
    """{contender: {"loss": |l - l64| / |l64|, "gradient": norm(g - g64) / norm(g64)}}."""
    outputs = {name: _outputs(c, x) for name, c in contenders.items()}
    found = {}
    for weights in dict.fromkeys(c.truth for c in contenders.values()):
        names = [name for name, c in contenders.items() if c.truth == weights]
        loss, square = 0.0, 0.0
        off = dict.fromkeys(names, 0.0)
        for begin, end, part, gradient in op.truth(x, *weights):
            loss += float(part)
            square += float(gradient.square().sum())
            for name in names:
                difference = outputs[name][1][begin:end].double() - gradient
                off[name] += float(difference.square().sum())
        for name in names:
            found[name] = {
                "loss": abs(outputs[name][0] - loss) / abs(loss),
                "gradient": (off[name] / square) ** 0.5,
            }
    return {name: found[name] for name in contenders}


def acceptable(error: dict[str, float], dtype: str) -> bool:
    """False also for NaN."""
    return all(value <= ALLOWED[dtype] for value in error.values())


def _outputs(contender: Contender, x: Inputs):
    x.student.grad = None
    loss = contender.loss(x)
    loss.backward()
    gradient, x.student.grad = x.student.grad, None
    return float(loss.detach()), gradient
