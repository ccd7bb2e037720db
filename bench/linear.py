"""The op "linear_kd": the kd loss from hidden states and output weights, with both gradients.

The library makes the logits and calls kd_loss; peers may do without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import fastdistill
from bench import peers
from bench.op import (
    DTYPES,
    HARD_WEIGHT,
    SOFT_WEIGHT,
    TEMPERATURE,
    Contender,
    Inputs,
    Limit,
    Op,
    ours,
)


def inputs(shape: tuple[int, ...], dtype: str, device: str) -> Inputs:
    """Rows x hidden x classes; the teacher is as wide as the student."""
    rows, hidden, classes = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator) * scale).to(device, DTYPES[dtype])

    labels = torch.randint(classes, (rows,), generator=generator).to(device)
    scale = (2 / hidden) ** 0.5
    student, weight = normal(rows, hidden), normal(classes, hidden, scale=scale)
    return Inputs(
        student.requires_grad_(),
        normal(rows, hidden),
        labels,
        (weight.requires_grad_(),),
        (normal(classes, hidden, scale=scale),),
    )


def eager(s: Tensor, w: Tensor, t: Tensor, v: Tensor, y: Tensor) -> Tensor:
    """As people write it in PyTorch."""
    student, teacher = F.linear(s, w), F.linear(t, v)
    log_q = F.log_softmax(student / TEMPERATURE, -1)
    p = F.softmax(teacher / TEMPERATURE, -1)
    kl = F.kl_div(log_q, p, reduction="batchmean")
    return HARD_WEIGHT * F.cross_entropy(student, y) + SOFT_WEIGHT * TEMPERATURE**2 * kl


def fastdistill_loss(x: Inputs) -> Tensor:
    """The public call, on logits."""
    return fastdistill.kd_loss(
        F.linear(x.student, x.weights[0]),
        F.linear(x.teacher, x.frozen[0]),
        x.labels,
        temperature=TEMPERATURE,
        hard_weight=HARD_WEIGHT,
        soft_weight=SOFT_WEIGHT,
    )


def contenders(device: str, dtype: str) -> dict[str, Contender]:
    """As those of kd."""
    compiled = torch.compile(eager, dynamic=False)

    def split(call: Callable[..., Tensor]) -> Callable[[Inputs], Tensor]:
        return lambda x: call(x.student, x.weights[0], x.teacher, x.frozen[0], x.labels)

    return {
        **ours("kd_loss", device, (DTYPES[dtype],) * 2, fastdistill_loss),
        "eager": Contender(split(eager)),
        "compile": Contender(split(compiled), needs="a C++ compiler, or Triton"),
        **peers.linear_contenders(),
    }


def truth(x: Inputs, *_: float) -> Iterator[tuple[int, int, Tensor, tuple[Tensor, ...]]]:
    """In float64, in one piece: all rows share the weight's gradient."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in x.leaves()]
    loss = eager(*leaves, x.teacher.double(), x.frozen[0].double(), x.labels)
    longest = max(len(leaf) for leaf in leaves)
    yield 0, longest, loss.detach(), torch.autograd.grad(loss, leaves)


def limit(x: Inputs) -> Limit:
    """Both models' logits, and the gradients of the student's hidden states and weight."""
    student, weight = x.student.detach(), x.weights[0].detach()
    gradient = torch.randn(len(student), len(weight), device=student.device).to(student.dtype)

    def work() -> object:
        logits = student @ weight.T, x.teacher @ x.frozen[0].T
        return logits, gradient @ weight, gradient.T @ student

    return Limit(products=work, flops=4 * 2 * student.numel() * len(weight))


OP = Op(
    name="linear_kd",
    shapes=[(256, 512, 32000)],
    inputs=inputs,
    contenders=contenders,
    truth=truth,
    limit=limit,
)
