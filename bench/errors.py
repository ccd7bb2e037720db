"""Is it right? Each contender's loss and gradient against float64, before anything is timed."""

from __future__ import annotations

from bench.cases import Contender, Inputs, Op

ALLOWED = {"fp32": 1e-4, "bf16": 5e-2}
"""Relative error, of loss and of gradient, from which on a contender counts as wrong. PyTorch's
own formula in bf16 sets the second: it rounds log-probabilities to 8 bits."""


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
                    off[name][i] += float(difference.square().sum())
        for name in names:
            found[name] = {
                "loss": abs(outputs[name][0] - loss) / abs(loss),
                "gradient": max((off[name][i] / square[i]) ** 0.5 for i in leaves),
            }
    return {name: found[name] for name in contenders}


def acceptable(error: dict[str, float], dtype: str) -> bool:
    """False also for NaN."""
    return all(value <= ALLOWED[dtype] for value in error.values())


def _outputs(contender: Contender, x: Inputs):
    x.forget()
    loss = contender.loss(x)
    loss.backward()
    gradients = [leaf.grad for leaf in x.leaves()]
    x.forget()
    return float(loss.detach()), gradients
