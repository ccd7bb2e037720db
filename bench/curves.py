"""`python -m bench curves`: time and peak memory along one size at a time.

Rows, classes, batch, sequence length and teachers of kd; the hidden size of hint and of linear_kd;
the parameters of clip_and_noise (privacy.py has those rows). Batch and sequence length have an op
of their own, `causal_kd`: logits [B, L, V] shifted by a token, as a language model's loss takes
them, where a contender may have to copy.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import fastdistill
from bench import cases
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

AXES: list[tuple[str, str, list[tuple[int, ...]], int]] = [
    # op, axis, shapes, which of their sizes it is
    ("kd", "rows", [(n, 4096) for n in (1, 4, 16, 64, 256, 1024, 4096)], 0),
    ("kd", "vocabulary", [(64, n) for n in (10, 100, 1000, 8000, 32000, 128256, 262144)], 1),
    ("causal_kd", "batch", [(n, 64, 4096) for n in (1, 2, 4, 8, 16, 32)], 0),
    ("causal_kd", "sequence length", [(4, n, 4096) for n in (8, 16, 32, 64, 128, 256, 512)], 1),
    ("teachers", "teachers", [(128, 8000, n) for n in (1, 2, 4, 8)], 2),
    ("hint", "hidden size", [(1024, n, n) for n in (64, 128, 256, 512, 1024)], 1),
    ("linear_kd", "hidden size", [(64, n, 8000) for n in (64, 128, 256, 512, 1024)], 1),
]
PARAMETERS = [(32, n) for n in (1000, 10_000, 100_000, 1_000_000)]


def causal_inputs(shape: tuple[int, ...], dtype: str, device: str) -> Inputs:
    """Logits [B, L, V], labels [B, L]."""
    return cases.kd_inputs(shape, dtype, device)


def _shifted(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return x.student[:, :-1], x.teacher[:, :-1], x.labels[:, 1:]


def causal_fastdistill(x: Inputs) -> Tensor:
    """The public call; nothing is copied on the way in."""
    s, t, y = _shifted(x)
    return fastdistill.kd_loss(
        s, t, y, temperature=TEMPERATURE, hard_weight=HARD_WEIGHT, soft_weight=SOFT_WEIGHT
    )


def causal_eager(x: Inputs) -> Tensor:
    """As people write it in PyTorch."""
    s, t, y = (part.flatten(0, 1) for part in _shifted(x))
    return cases.kd_eager(s, t, y)


def causal_contenders(device: str, dtype: str) -> dict[str, Contender]:
    """As those of kd."""
    found = ours("kd_loss", device, (DTYPES[dtype],) * 2, causal_fastdistill)
    return {**found, "eager": Contender(causal_eager)}


def causal_truth(
    x: Inputs, hard: float, soft: float
) -> Iterator[tuple[int, int, Tensor, tuple[Tensor, ...]]]:
    """A sequence at a time."""
    batch, length, _ = x.student.shape
    for i in range(batch):
        s = x.student.detach()[i : i + 1].double().requires_grad_()
        one = Inputs(s, x.teacher[i : i + 1].double(), x.labels[i : i + 1])
        part = cases.kd_eager(*(p.flatten(0, 1) for p in _shifted(one)), hard, soft) / batch
        yield i, i + 1, part.detach(), torch.autograd.grad(part, s)


def teachers_inputs(shape: tuple[int, ...], dtype: str, device: str) -> Inputs:
    """Rows x classes x teachers; `teacher` [K, N, V]."""
    rows, classes, count = shape
    x = cases.kd_inputs((rows, classes), dtype, device)
    generator = torch.Generator().manual_seed(2)
    teachers = torch.randn((count, rows, classes), generator=generator)
    return x._replace(teacher=teachers.to(device, DTYPES[dtype]))


def _mean(loss, x: Inputs) -> Tensor:
    return torch.stack([loss(x._replace(teacher=t)) for t in x.teacher]).mean()


def teachers_contenders(device: str, dtype: str) -> dict[str, Contender]:
    """The mean of the losses to each teacher."""

    def call(x: Inputs) -> Tensor:
        return _mean(cases.kd_fastdistill, x)

    return {
        **ours("kd_loss", device, (DTYPES[dtype],) * 2, call),
        "eager": Contender(lambda x: _mean(lambda one: cases.kd_eager(*one[:3]), x)),
    }


def teachers_truth(
    x: Inputs, hard: float, soft: float
) -> Iterator[tuple[int, int, Tensor, tuple[Tensor, ...]]]:
    """As that of kd, in one piece a teacher added up."""
    s = x.student.detach().double().requires_grad_()
    double = Inputs(s, x.teacher.double(), x.labels)
    part = _mean(lambda one: cases.kd_eager(*one[:3], hard, soft), double)
    yield 0, len(s), part.detach(), torch.autograd.grad(part, s)


OPS = {
    "causal_kd": Op(
        name="causal_kd",
        shapes=[],
        inputs=causal_inputs,
        contenders=causal_contenders,
        truth=causal_truth,
        limit=lambda x: Limit(arrays=3, exponentials=2),
    ),
    "teachers": Op(
        name="teachers",
        shapes=[],
        inputs=teachers_inputs,
        contenders=teachers_contenders,
        truth=teachers_truth,
        # The student once and every teacher; exponentials of all of them.
        limit=lambda x: Limit(arrays=2 + len(x.teacher), exponentials=1 + len(x.teacher)),
    ),
}
EVERY = {**cases.OPS, **OPS}
