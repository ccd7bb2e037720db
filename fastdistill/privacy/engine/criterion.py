"""The criterion: losses of single samples, and a backward pass that ends in clipped sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill.privacy.engine.losses import PerSample
from fastdistill.privacy.engine.module import PrivateModule
from fastdistill.privacy.engine.optimizer import PrivateOptimizer

Number = int | float


class PrivateLoss:
    """The losses of a batch's samples [B], with arithmetic; `backward` clips sample by sample.

    Losses of several criteria of the same module and optimizer add up before the one backward pass.
    `item` and `detach` give the mean or sum over the samples, which is not private.
    """

    def __init__(self, criterion: PrivateCriterion, per_sample: Tensor) -> None:
        self.criterion = criterion
        self.loss_per_sample = per_sample
        self.loss_reduction = criterion.loss_reduction

    def backward(self) -> None:
        """One backward pass; then the optimizer has the clipped sums, and `p.grad` is None."""
        module, optimizer = self.criterion.module, self.criterion.optimizer
        samples = len(self.loss_per_sample)
        if samples == 0:  # an empty Poisson batch: its release is noise alone
            with torch.no_grad():
                optimizer.take({}, 0)
            return
        found = module.gradients(self.loss_per_sample.sum(), samples)
        with torch.no_grad():
            optimizer.take(found, samples)

    def detach(self) -> Tensor:
        """The reduced loss, a scalar without gradient; 0 for an empty batch."""
        loss = self.loss_per_sample.detach()
        return loss.sum() / max(len(loss), 1) if self.loss_reduction == "mean" else loss.sum()

    def item(self) -> float:
        """The reduced loss as a number."""
        return float(self.detach())

    def _with(self, value: Tensor) -> PrivateLoss:
        return PrivateLoss(self.criterion, value)

    def _other(self, other: object, operation: str) -> Any:
        if isinstance(other, PrivateLoss):
            mine, theirs = self.criterion, other.criterion
            if mine.module is not theirs.module or mine.optimizer is not theirs.optimizer:
                raise ValueError(
                    f"loss {operation} loss: expected losses of one module and one optimizer"
                )
            if len(self.loss_per_sample) != len(other.loss_per_sample):
                raise ValueError(
                    f"loss {operation} loss: expected {len(self.loss_per_sample)} samples, got "
                    f"{len(other.loss_per_sample)}"
                )
            return other.loss_per_sample
        if isinstance(other, bool) or not isinstance(other, int | float):
            raise TypeError(
                f"loss {operation} x: expected a number or a loss of a criterion that make_private "
                f"made, got {type(other).__name__}: it would not be clipped sample by sample"
            )
        return other

    def __add__(self, other: PrivateLoss | Number) -> PrivateLoss:
        return self._with(self.loss_per_sample + self._other(other, "+"))

    def __radd__(self, other: Number) -> PrivateLoss:
        return self + other

    def __sub__(self, other: PrivateLoss | Number) -> PrivateLoss:
        return self._with(self.loss_per_sample - self._other(other, "-"))

    def __rsub__(self, other: Number) -> PrivateLoss:
        return -self + other

    def __mul__(self, other: Number) -> PrivateLoss:
        if isinstance(other, PrivateLoss):
            raise TypeError("loss * x: expected a number, got a loss")
        return self._with(self.loss_per_sample * self._other(other, "*"))

    def __rmul__(self, other: Number) -> PrivateLoss:
        return self * other

    def __truediv__(self, other: Number) -> PrivateLoss:
        if isinstance(other, PrivateLoss):
            raise TypeError("loss / x: expected a number, got a loss")
        return self._with(self.loss_per_sample / self._other(other, "/"))

    def __neg__(self) -> PrivateLoss:
        return self._with(-self.loss_per_sample)

    def __float__(self) -> float:
        return self.item()

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec else repr(self)

    def __repr__(self) -> str:
        return f"PrivateLoss({len(self.loss_per_sample)} samples, {self.loss_reduction})"


class PrivateCriterion:
    """A criterion that gives a `PrivateLoss`.

    Args:
        module, optimizer: what `make_private` returned.
        criterion: see `losses.PerSample`.
        loss_reduction: the module's; the criterion's has to agree.

    Another criterion for the same model: `PrivateCriterion(module, optimizer, other)`.
    """

    def __init__(
        self,
        module: PrivateModule,
        optimizer: PrivateOptimizer,
        criterion: Any,
        loss_reduction: str | None = None,
    ) -> None:
        reduction = module.loss_reduction if loss_reduction is None else loss_reduction
        if not reduction == module.loss_reduction == optimizer.loss_reduction:
            raise ValueError(
                f"loss_reduction: expected one for all, got {reduction} (criterion), "
                f"{module.loss_reduction} (module), {optimizer.loss_reduction} (optimizer)"
            )
        self.module, self.optimizer, self.criterion = module, optimizer, criterion
        self.loss_reduction = reduction
        self._per_sample = PerSample(criterion, reduction)

    def __call__(self, *args: Any, shape: Any = None, **kwargs: Any) -> PrivateLoss:
        """The losses of the batch.

        `shape`: (samples, tokens, ...) where logits and labels were flattened over both, as in
        Opacus: the losses of a sample's tokens are reduced first.
        """
        return PrivateLoss(self, self._per_sample(*args, shape=shape, **kwargs))
