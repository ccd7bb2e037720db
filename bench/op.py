"""What an op is to the benchmark: its inputs, its contenders and its truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastdistill
from fastdistill import _backend

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

TEMPERATURE, HARD_WEIGHT, SOFT_WEIGHT = 2.0, 0.5, 0.5


class Inputs(NamedTuple):
    """Leaves of one call; the gradient is taken with respect to `student` and `weights`."""

    student: Tensor  # [N, V]
    teacher: Tensor  # [N, V]
    labels: Tensor  # [N]
    weights: tuple[Tensor, ...] = ()
    frozen: tuple[Tensor, ...] = ()  # the teacher's

    def leaves(self) -> tuple[Tensor, ...]:
        return self.student, *self.weights

    def forget(self) -> None:
        """Let the gradients go."""
        for leaf in self.leaves():
            leaf.grad = None


Weights = tuple[float, float]
"""Of the labels' term and of T² KL, in what a contender should compute."""


class Contender(NamedTuple):
    """One way to compute the op."""

    loss: Callable[[Inputs], Any]  # with .backward() and .detach()
    truth: Weights = (HARD_WEIGHT, SOFT_WEIGHT)
    passes: int = 3  # arrays of the logits' size that any implementation has to move
    unavailable: str | None = None
    needs: str | None = None  # what may fail its first call: then it is skipped, and says so
    near: Callable[[Inputs], Any] | None = None  # for inputs nearly alike; None: as `loss`
    near_truth: Weights | None = None


class Limit(NamedTuple):
    """What any implementation has to do: see limits.py."""

    arrays: float = 3  # of the inputs' size, read or written
    exponentials: int = 0  # an element
    products: Callable[[], object] | None = None  # the matrix products, bare
    flops: float = 0.0  # theirs


class Op(NamedTuple):
    """An op, as the benchmark sees it."""

    name: str
    shapes: list[tuple[int, ...]]
    inputs: Callable[..., Inputs]
    contenders: Callable[[str, str], dict[str, Contender]]  # (device, dtype) -> in this order
    truth: Callable[..., Iterator[tuple[int, int, Tensor, tuple[Tensor, ...]]]]
    limit: Callable[[Inputs], Limit]
    near: Callable[[Inputs], Inputs] | None = None  # the same, student and teacher nearly alike


def ours(
    op: str, device: str, dtypes: tuple[torch.dtype, ...], call: Callable[[Inputs], Any]
) -> dict[str, Contender]:
    """On the CPU the library's choice, on a GPU each of its compiled backends as its own column."""
    refusals = _backend.reasons(op, _backend.Case(device, dtypes, False))
    if device == "cpu":
        return {"fastdistill": Contender(call, unavailable=refusals["cpu"])}
    return {
        name: Contender(_under(name, call), unavailable=refusals[name])
        for name in ("triton", "cuda")
    }


def _under(backend: str, call: Callable[[Inputs], Any]) -> Callable[[Inputs], Any]:
    def loss(x: Inputs) -> Any:
        with fastdistill.backend(backend):
            return call(x)

    return loss
