"""The module: Opacus's wrapper, with layers that report to a book in place of hooks."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.layers import DPMultiheadAttention
from opacus.layers.dp_rnn import DPGRU, DPLSTM, DPRNN, RNNLinear
from torch import Tensor, nn

from fastdistill.privacy.engine import layers
from fastdistill.privacy.engine.capture import Book, Use, patch, unpatch
from fastdistill.privacy.engine.exact import full_precision
from fastdistill.privacy.engine.gradients import Gradient, Piece, Workspace, combine

logger = logging.getLogger(__name__)

MEMORY_BUDGET = 1 << 28
"""Bytes of per-sample gradients that a step may hold, unless the engine is given another number."""


class PrivateModule(GradSampleModuleFastGradientClipping):
    """The model, wrapped. `samplers` says how each layer's gradients are found.

    Args:
        m: the model; no BatchNorm, no buffers in trainable layers (Opacus's rules).
        batch_first: False: the batch is dimension 1 of inputs with 3 dimensions or more.
        loss_reduction: "mean" or "sum", of the criterion.
        memory_budget: bytes of per-sample gradients that a step may hold.
    """

    def __init__(
        self,
        m: nn.Module,
        *,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        strict: bool = True,
        max_grad_norm: float = 1.0,
        memory_budget: int = MEMORY_BUDGET,
    ) -> None:
        self._settings: Any = None  # the optimizer's, once there is one
        self._before = max_grad_norm
        self._book = Book()
        self.samplers: dict[str, str] = {}
        self._inputs = 0  # the largest batch since the last backward pass
        self._workspace = Workspace(memory_budget)
        super().__init__(
            m,
            batch_first=batch_first,
            loss_reduction=loss_reduction,
            strict=strict,
            max_grad_norm=max_grad_norm,
        )

    @property
    def max_grad_norm(self) -> float:
        """The optimizer's: there is one clip norm."""
        norm: float = self._before if self._settings is None else self._settings.max_grad_norm
        return norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        if self._settings is None:
            self._before = value
        else:
            self._settings.max_grad_norm = value

    def attach(self, settings: Any) -> None:
        """Take the clip norm from the optimizer's settings."""
        self._settings = settings

    def add_hooks(self, **_: Any) -> None:
        """Patch the layers."""
        self.autograd_grad_sample_hooks: list[Any] = []
        self._patched: list[nn.Module] = []
        self._book.model = self
        for name, part in self._module.named_modules():
            if isinstance(part, DPMultiheadAttention):
                layers.check_attention(name, part, self.batch_first)
        try:
            for name, layer in _layers(self._module):
                self._add(name, layer)
        except Exception:
            self.remove_hooks()
            raise
        self.enable_hooks()

    def _add(self, name: str, layer: nn.Module) -> None:
        rule, how = layers.find(layer, name, self.batch_first)
        self.samplers[name] = how
        if how != layers.FUSED:
            logger.warning("%s (%s): %s", name or "the module", type(layer).__name__, how)
        patch(layer, self._book, name, rule, how != layers.FUSED)
        self._patched.append(layer)

    def remove_hooks(self) -> None:
        """The layers as they were."""
        self.disable_hooks()
        while self._patched:
            layer = self._patched.pop()
            unpatch(layer)
            layers.forget(layer)
        self._workspace.release()

    def enable_hooks(self) -> None:
        """Let the layers report."""
        self.hooks_enabled = self._book.on = True

    def disable_hooks(self) -> None:
        """Let the layers behave as if they were not patched."""
        self.hooks_enabled = self._book.on = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        if self.training and torch.is_grad_enabled():
            for x in (*args, *kwargs.values()):
                if isinstance(x, Tensor) and x.ndim:
                    dim = 0 if self.batch_first or x.ndim == 1 else 1
                    self._inputs = max(self._inputs, x.shape[dim])
        return super().forward(*args, **kwargs)

    def get_norm_sample(self) -> Tensor:
        """Not kept: per-sample norms are not private."""
        raise NotImplementedError('ghost_fused keeps no norms: use grad_sample_mode="hooks"')

    def get_clipping_coef(self) -> Tensor:
        """Not kept: see `get_norm_sample`."""
        return self.get_norm_sample()

    def gradients(self, loss: Tensor, samples: int) -> dict[Tensor, Gradient]:
        """The per-sample gradients of the sum of `samples` losses, by one backward pass.

        Raises:
            RuntimeError: a parameter is used outside the layer that holds it, or in evaluation
                mode: its gradient is then not known for each sample.
            ValueError: a layer's batch is not that of the losses, or there are more losses than
                samples went in: each would be clipped by itself, and a sample count several times.
        """
        inputs, self._inputs = self._inputs, 0
        if samples > inputs > 0:
            raise ValueError(
                f"criterion: expected one loss for each of at most {inputs} samples that the "
                f"module was given, got {samples}; losses of tokens: criterion(logits, labels, "
                "shape=(samples, tokens))"
            )
        parameters = [p for p in self._module.parameters() if p.requires_grad]
        before = [p.grad for p in parameters]
        found: dict[Tensor, list[Piece]] = {}
        self._workspace.start()
        for p in parameters:
            p.grad = None
        try:
            with self._book.open(functools.partial(self._take, found, samples)):
                loss.backward()  # type: ignore[no-untyped-call]
            outside = [p for p in parameters if p.grad is not None]
        finally:
            for p, grad in zip(parameters, before, strict=True):
                p.grad = grad
        if outside:
            names = {id(p): name for name, p in self._module.named_parameters()}
            raise RuntimeError(
                f"module: {', '.join(names[id(p)] for p in outside)}: used outside the layer that "
                "holds it, or in evaluation mode, or frozen when make_private was called; its "
                "gradient is not known for each sample"
            )
        with torch.no_grad(), full_precision(loss.device):
            return {p: combine(some, self._workspace, p) for p, some in found.items()}

    def _take(self, found: dict[Tensor, list[Piece]], samples: int, use: Use) -> None:
        """What one use of a layer leaves, as the backward pass reaches it.

        Where the parameter has no other use its products are made at once: inputs and gradients are
        in the cache, and need not be held until the end.
        """
        with torch.no_grad(), full_precision(use.grad.device):
            x, kept, grad = _batch_first(use, self.batch_first, samples)
            for p, piece in use.rule.pieces(use.layer, x, kept, grad):
                some = found.setdefault(p, [])
                if self._book.counts.get(p) == 1:
                    piece = combine([piece], self._workspace, (p, len(some)))
                some.append(piece)


def _layers(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers whose gradients are asked for: as Opacus's `iterate_submodules` finds them."""
    own = any(p.requires_grad for p in module.parameters(recurse=False))
    if own and type(module) not in (DPRNN, DPLSTM, DPGRU):  # theirs are those of their cells
        yield name, module
        return
    for key, child in module.named_children():
        yield from _layers(child, f"{name}.{key}" if name else key)


def _batch_first(
    use: Use, batch_first: bool, samples: int
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    dim = 0
    fixed = isinstance(use.layer, RNNLinear | nn.Conv1d | nn.Conv2d | nn.GroupNorm)
    if not batch_first and not fixed:
        fewest = 2 if isinstance(use.layer, nn.Embedding) else 3
        dim = 1 if use.x.ndim >= fewest else 0
    if use.x.ndim <= dim or use.x.shape[dim] != samples:
        raise ValueError(
            f"module: {use.name or 'the module'} ({type(use.layer).__name__}): expected an input "
            f"with {samples} samples (as the loss has) in dimension {dim}, got shape "
            f"{list(use.x.shape)}; expand what all samples share, and keep samples apart (where "
            "the losses are those of tokens: criterion(logits, labels, shape=(samples, tokens)))"
        )
    if isinstance(use.layer, nn.Embedding) and use.x.ndim == 1 and samples > 2:
        places = torch.arange(samples, device=use.x.device)
        if torch.equal(use.x, places.to(use.x.dtype)):  # T = B: nothing else would tell
            raise ValueError(
                f"module: {use.name} (Embedding): expected one index or more for each sample, got "
                f"0 to {samples - 1} in order, which are places that all samples share; expand "
                "them to [B, T] (to [B, 1] where they are the samples' own)"
            )
    if dim == 0:
        return use.x, use.kept, use.grad
    first = [x.movedim(1, 0) for x in (use.x, *use.kept, use.grad)]
    return first[0], tuple(first[1:-1]), first[-1]
