"""Layers whose forward keeps what a private gradient needs, and no more.

A layer's forward becomes an autograd.Function that keeps its input and, in the backward pass, its
output's gradient. It returns the gradient of the input where one is needed, and none of the
parameters: the ordinary gradient of the weight, half of the work of a backward pass, is never
computed (hooks cannot avoid it).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastdistill.privacy.engine.gradients import Piece


class Rule(Protocol):
    """What a kind of layer has to say of itself."""

    def prepare(self, layer: Any, x: Tensor) -> Tensor:
        """The input as `run` takes it (padding); differentiated by torch."""

    def run(self, layer: Any, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output, and what is to be kept besides the input."""

    def input_gradient(
        self, layer: Any, x: Tensor, kept: tuple[Tensor, ...], grad: Tensor
    ) -> Tensor | None:
        """The gradient of the input."""

    def pieces(
        self, layer: Any, x: Tensor, kept: tuple[Tensor, ...], grad: Tensor
    ) -> list[tuple[Tensor, Piece]]:
        """The per-sample gradients of the layer's parameters; the batch comes first."""


class Use(NamedTuple):
    """One use of a layer in a forward pass that a backward pass has reached."""

    name: str
    layer: nn.Module
    rule: Rule
    x: Tensor
    kept: tuple[Tensor, ...]
    grad: Tensor


class Book:
    """Where the layers of a model report during a private backward pass."""

    def __init__(self) -> None:
        self._take: Callable[[Use], None] | None = None
        self.counts: dict[Tensor, int] = {}  # uses of each parameter since the last backward pass
        self.on = True  # False: layers behave as if nothing had been changed
        self.model: nn.Module | None = None  # whose layers report here

    @contextlib.contextmanager
    def open(self, take: Callable[[Use], None]) -> Iterator[None]:
        """A private backward pass, whose uses go to `take` as they come."""
        if self._take is not None:
            raise RuntimeError("backward: a private backward pass is already running")
        self._take = take
        try:
            yield
        finally:
            self._take = None
            self.counts.clear()

    def count(self, parameters: Iterable[Tensor]) -> None:
        """Called in the forward pass, once for each use of a layer."""
        for p in parameters:
            self.counts[p] = self.counts.get(p, 0) + 1

    def report(self, use: Use) -> None:
        """Called in the backward pass, once for each use of a layer."""
        if self._take is None:
            raise RuntimeError(
                "backward: this model's gradients are clipped sample by sample; call the criterion "
                "that make_private returned, and backward() of what it gives"
            )
        self._take(use)

    def watches(self, layer: nn.Module) -> bool:
        """Whether the layer's pass is to be kept: in training, of the layer or of the model."""
        training = layer.training or self.model is None or self.model.training
        return self.on and torch.is_grad_enabled() and training


class _Keep(torch.autograd.Function):
    """The layer's forward. Its parameters are inputs so that the output depends on them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, book: Book, name: str, layer: nn.Module, rule: Rule, *_: Tensor
    ) -> Tensor:
        y, kept = rule.run(layer, x)
        ctx.save_for_backward(x, *kept)
        ctx.book, ctx.name, ctx.layer, ctx.rule = book, name, layer, rule
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *kept = ctx.saved_tensors
        rule, layer = ctx.rule, ctx.layer
        grad = grad.contiguous()  # once: products and sums would each make it so
        ctx.book.report(Use(ctx.name, layer, rule, x, tuple(kept), grad))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = rule.input_gradient(layer, x, tuple(kept), grad)
        return grad_x, *(None,) * (len(ctx.needs_input_grad) - 1)


def _forward(layer: nn.Module, book: Book, name: str, rule: Rule, x: Tensor) -> Tensor:
    parameters = [p for p in layer.parameters() if p.requires_grad]
    if not (parameters and book.watches(layer)):
        return type(layer).forward(layer, x)
    book.count(parameters)
    y: Tensor = _Keep.apply(rule.prepare(layer, x), book, name, layer, rule, *parameters)
    return y


class _Tap(torch.autograd.Function):
    """The output of a layer that has no rule; what reaches it in the backward pass is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        book: Book,
        name: str,
        layer: nn.Module,
        rule: Rule,
        inputs: int,
        *x: Any,
    ) -> Tensor:
        ctx.save_for_backward(*x[:inputs])
        ctx.book, ctx.name, ctx.layer, ctx.rule = book, name, layer, rule
        return y.clone()  # not a view: torch lets nobody write into one that a Function has made

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *kept = ctx.saved_tensors
        ctx.book.report(Use(ctx.name, ctx.layer, ctx.rule, x, tuple(kept), grad))
        return grad, *(None,) * (len(ctx.needs_input_grad) - 1)


@contextlib.contextmanager
def _detached(layer: nn.Module) -> Iterator[None]:
    """The layer with parameters that need no gradient: its own pass then computes none for them."""
    held = [(m, dict(m._parameters)) for m in layer.modules()]
    try:
        for m, parameters in held:
            m._parameters.update(
                {k: p if p is None else p.detach() for k, p in parameters.items()}  # type: ignore[misc]
            )
        yield
    finally:
        for m, parameters in held:
            m._parameters.update(parameters)


def _forward_sampled(
    layer: nn.Module, book: Book, name: str, rule: Rule, *inputs: Any, **kwargs: Any
) -> Any:
    parameters = [p for p in layer.parameters() if p.requires_grad]
    if not (parameters and book.watches(layer)):
        return type(layer).forward(layer, *inputs, **kwargs)
    book.count(parameters)
    where = f"module: {name or 'the module'} ({type(layer).__name__})"
    if kwargs or not all(isinstance(x, Tensor) for x in inputs):
        raise ValueError(
            f"{where}: expected tensors as its inputs, by position: Opacus's samplers see no others"
        )
    with _detached(layer):
        y = type(layer).forward(layer, *inputs)
    if not isinstance(y, Tensor):
        raise ValueError(f"{where}: expected one tensor as its output, got {type(y).__name__}")
    return _Tap.apply(
        y, book, name, layer, rule, len(inputs), *(x.detach() for x in inputs), *parameters
    )


def patch(layer: nn.Module, book: Book, name: str, rule: Rule, sampled: bool) -> None:
    """Make the layer report to the book; `sampled`: it runs as it is, by a sampler of Opacus's."""
    if "forward" in vars(layer):
        raise ValueError(
            f"module: {name or 'the module'} has a forward of its own (another wrapper's?); "
            "give make_private the plain module"
        )
    forward = _forward_sampled if sampled else _forward
    layer.forward = functools.partial(forward, layer, book, name, rule)  # type: ignore[method-assign]


def unpatch(layer: nn.Module) -> None:
    """What it was before `patch`."""
    vars(layer).pop("forward", None)
