"""What is measured: one entry per op, with its inputs, its contenders and its truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastdistill
from bench import linear, peers
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

NOISE = 1e-3
"""Of the teacher's logits around the student's, where they are nearly alike."""


def kd_inputs(shape: tuple[int, ...], dtype: str, device: str) -> Inputs:
    """Student and teacher disagree as much as they agree: no term of the loss is negligible."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(shape, generator=generator)
    student = shared + torch.randn(shape, generator=generator)
    teacher = shared.add_(torch.randn(shape, generator=generator))
    labels = torch.randint(shape[-1], shape[:-1], generator=generator)
    student, teacher = (x.to(device, DTYPES[dtype]) for x in (student, teacher))
    return Inputs(student.requires_grad_(), teacher, labels.to(device))


def near(x: Inputs) -> Inputs:
    """The same, with a teacher that is the student and a little noise."""
    noise = torch.randn(x.student.shape, generator=torch.Generator().manual_seed(1)) * NOISE
    teacher = x.student.detach().cpu().float() + noise
    return x._replace(teacher=teacher.to(x.teacher.device, x.teacher.dtype))


def kd_fastdistill(x: Inputs, hard: float = HARD_WEIGHT, soft: float = SOFT_WEIGHT) -> Tensor:
    """The public call."""
    return fastdistill.kd_loss(
        x.student,
        x.teacher,
        x.labels if hard else None,
        temperature=TEMPERATURE,
        hard_weight=hard,
        soft_weight=soft,
    )


def kd_eager(
    s: Tensor, t: Tensor, y: Tensor, hard: float = HARD_WEIGHT, soft: float = SOFT_WEIGHT
) -> Tensor:
    """The loss as people write it in PyTorch."""
    log_q, p = F.log_softmax(s / TEMPERATURE, -1), F.softmax(t / TEMPERATURE, -1)
    kl = soft * TEMPERATURE**2 * F.kl_div(log_q, p, reduction="batchmean")
    return hard * F.cross_entropy(s, y) + kl if hard else kl


def kd_contenders(device: str, dtype: str) -> dict[str, Contender]:
    """Ours, PyTorch's, and what it costs to have one term of the two."""
    found = ours("kd_loss", device, (DTYPES[dtype],) * 2, kd_fastdistill)
    compiled = torch.compile(kd_eager, dynamic=False)
    soft_alone = {"hard": 0.0, "soft": 1.0}  # beside labels no error of the divergence shows
    everything = {
        **{name: c._replace(near=_with(c.loss, soft_alone)) for name, c in found.items()},
        "eager": Contender(
            lambda x: kd_eager(*x[:3]), near=lambda x: kd_eager(*x[:3], **soft_alone)
        ),
        "compile": Contender(
            lambda x: compiled(*x[:3]),
            near=lambda x: compiled(*x[:3], **soft_alone),
            needs="a C++ compiler, or Triton",
        ),
        "cross_entropy_alone": Contender(
            lambda x: F.cross_entropy(x.student, x.labels), truth=(1.0, 0.0), passes=2
        ),
        # The negative control: T^2 forgotten, the mistake that the field makes most.
        "wrong": Contender(lambda x: kd_eager(*x[:3], soft=SOFT_WEIGHT / TEMPERATURE**2)),
    }
    everything = {
        name: c._replace(near_truth=(0.0, 1.0)) if c.near else c for name, c in everything.items()
    }
    return {**everything, **peers.kd_contenders(device)}


def _with(call: Callable[..., Any], settings: dict[str, float]) -> Callable[[Inputs], Any]:
    return lambda x: call(x, **settings)


def kd_truth(
    x: Inputs, hard: float, soft: float, elements: int = 1 << 17
) -> Iterator[tuple[int, int, Tensor, tuple[Tensor, ...]]]:
    """(first row, last row, their part of the loss, the gradients of the leaves there), in float64.

    In pieces of 1 MB: a large temporary would teach malloc to keep memory that it otherwise
    returns, and so change what is timed afterwards.
    """
    rows, classes = x.student.shape
    step = max(1, elements // classes)
    for begin in range(0, rows, step):
        end = min(rows, begin + step)
        s = x.student.detach()[begin:end].double().requires_grad_()
        part = hard * F.cross_entropy(s, x.labels[begin:end], reduction="sum")
        if soft != 0:
            log_q = F.log_softmax(s / TEMPERATURE, -1)
            log_p = F.log_softmax(x.teacher[begin:end].double() / TEMPERATURE, -1)
            kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
            part = part + soft * TEMPERATURE**2 * kl
        part = part / rows
        yield begin, end, part.detach(), torch.autograd.grad(part, s)


class Weighted(NamedTuple):
    """Stands for the scalar (y g).sum(), whose gradient in y is g: the product itself, which is no
    part of a softmax, is not timed.
    """

    y: Tensor
    g: Tensor

    def backward(self) -> None:
        self.y.backward(self.g)

    def detach(self) -> Tensor:
        return (self.y.detach().double() * self.g.double()).sum()


def softmax_inputs(shape: tuple[int, ...], dtype: str, device: str) -> Inputs:
    """`student` is x; in place of a teacher's logits, the gradient of the output."""
    x = kd_inputs(shape, dtype, device)
    return x._replace(student=x.student.detach().mul(3).requires_grad_())


def softmax_fastdistill(x: Inputs) -> Weighted:
    """The public call."""
    return Weighted(fastdistill.temperature_softmax(x.student, TEMPERATURE), x.teacher)


def softmax_eager(s: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """As people write it in PyTorch."""
    return torch.softmax(s / temperature, -1)


def softmax_contenders(device: str, dtype: str) -> dict[str, Contender]:
    """As `kd_contenders`. Five arrays move: x and y; x, the gradient of y and that of x."""
    found = ours("temperature_softmax", device, (DTYPES[dtype],), softmax_fastdistill)
    compiled = torch.compile(softmax_eager, dynamic=False)
    everything = {
        **found,
        "eager": Contender(lambda x: Weighted(softmax_eager(x.student), x.teacher)),
        "compile": Contender(
            lambda x: Weighted(compiled(x.student), x.teacher), needs="a C++ compiler, or Triton"
        ),
        # The negative control: the temperature forgotten.
        "wrong": Contender(lambda x: Weighted(softmax_eager(x.student, 1.0), x.teacher)),
    }
    return {name: c._replace(passes=5) for name, c in everything.items()}


def softmax_truth(
    x: Inputs, *_: float, elements: int = 1 << 17
) -> Iterator[tuple[int, int, Tensor, tuple[Tensor, ...]]]:
    """As `kd_truth`, of (y g).sum()."""
    rows, classes = x.student.shape
    step = max(1, elements // classes)
    for begin in range(0, rows, step):
        end = min(rows, begin + step)
        s = x.student.detach()[begin:end].double().requires_grad_()
        part = (softmax_eager(s) * x.teacher[begin:end].double()).sum()
        yield begin, end, part.detach(), torch.autograd.grad(part, s)


def hint_inputs(shape: tuple[int, ...], dtype: str, device: str) -> Inputs:
    """Rows x D_s x D_t with a regressor of that size, or rows x D for the distance alone."""
    rows, width, out = (*shape, shape[1])[:3]
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(rows, width, generator=generator)
    weight = torch.randn(out, width, generator=generator) / width**0.5
    teacher = torch.randn(rows, out, generator=generator)
    teacher += student if len(shape) == 2 else student @ weight.T
    student, teacher, weight = (x.to(device, DTYPES[dtype]) for x in (student, teacher, weight))
    weights = (weight.requires_grad_(),) if len(shape) == 3 else ()
    return Inputs(student.requires_grad_(), teacher, torch.empty(0), weights)


def hint_fastdistill(x: Inputs) -> Tensor:
    """The public call."""
    return fastdistill.hint_loss(
        x.student, x.teacher, proj_weight=x.weights[0] if x.weights else None
    )


def hint_eager(s: Tensor, t: Tensor, *weights: Tensor, reduction: str = "mean") -> Tensor:
    """The hint of FitNets as people write it in PyTorch."""
    return F.mse_loss(F.linear(s, *weights) if weights else s, t, reduction=reduction)


def hint_contenders(device: str, dtype: str) -> dict[str, Contender]:
    """As `kd_contenders`."""
    found = ours("hint_loss", device, (DTYPES[dtype],) * 2, hint_fastdistill)
    compiled = torch.compile(hint_eager, dynamic=False)
    return {
        **found,
        "eager": Contender(lambda x: hint_eager(x.student, x.teacher, *x.weights)),
        "compile": Contender(
            lambda x: compiled(x.student, x.teacher, *x.weights), needs="a C++ compiler, or Triton"
        ),
        # The negative control: the sum over the features in place of their mean.
        "wrong": Contender(
            lambda x: (
                hint_eager(x.student, x.teacher, *x.weights, reduction="sum") / x.student.shape[0]
            )
        ),
    }


def hint_truth(x: Inputs, *_: float) -> Iterator[tuple[int, int, Tensor, tuple[Tensor, ...]]]:
    """As `kd_truth`, in one piece: all rows share the regressor's gradient."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in x.leaves()]
    loss = hint_eager(leaves[0], x.teacher.double(), *leaves[1:])
    longest = max(len(leaf) for leaf in leaves)
    yield 0, longest, loss.detach(), torch.autograd.grad(loss, leaves)


def hint_limit(x: Inputs) -> Limit:
    """The projection, and the gradients of the features and of the weight; or traffic."""
    if not x.weights:
        return Limit(arrays=3)
    student, weight = x.student.detach(), x.weights[0].detach()
    residual = torch.randn(x.teacher.shape, device=student.device).to(student.dtype)

    def work() -> object:
        return student @ weight.T, residual @ weight, residual.T @ student

    return Limit(products=work, flops=3 * 2 * student.numel() * len(weight))


OPS = {
    "kd": Op(
        name="kd",
        shapes=[(512, 32000), (256, 128256), (2048, 1024), (8192, 100), (128, 10)],
        inputs=kd_inputs,
        contenders=kd_contenders,
        truth=kd_truth,
        limit=lambda x: Limit(arrays=3, exponentials=2),
        near=near,
    ),
    "softmax": Op(
        name="softmax",
        shapes=[(512, 32000), (2048, 1024), (8192, 100), (128, 10)],
        inputs=softmax_inputs,
        contenders=softmax_contenders,
        truth=softmax_truth,
        limit=lambda x: Limit(arrays=5, exponentials=2),
    ),
    "hint": Op(
        name="hint",
        shapes=[(4096, 384, 768), (8192, 768, 768), (8192, 768)],
        inputs=hint_inputs,
        contenders=hint_contenders,
        truth=hint_truth,
        limit=hint_limit,
    ),
    "linear_kd": linear.OP,
}
