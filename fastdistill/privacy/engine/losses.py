"""Criteria as the losses of single samples."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdistill.hint import hint_loss
from fastdistill.kd import kd_loss
from fastdistill.nn import HintLosses, KDLoss

MODULES = (
    nn.CrossEntropyLoss, nn.NLLLoss, nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss,
    nn.BCELoss, nn.BCEWithLogitsLoss, nn.KLDivLoss, nn.PoissonNLLLoss, nn.GaussianNLLLoss,
    nn.SoftMarginLoss, nn.MultiMarginLoss, nn.MultiLabelMarginLoss, nn.MultiLabelSoftMarginLoss,
    nn.HingeEmbeddingLoss, nn.CosineEmbeddingLoss, nn.MarginRankingLoss, nn.TripletMarginLoss,
)  # fmt: skip
FUNCTIONS: tuple[Callable[..., Any], ...] = (
    F.cross_entropy, F.nll_loss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss,
    F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.kl_div, F.poisson_nll_loss,
    F.gaussian_nll_loss, F.soft_margin_loss, F.multi_margin_loss, F.multilabel_margin_loss,
    F.multilabel_soft_margin_loss, F.hinge_embedding_loss, F.cosine_embedding_loss,
    F.margin_ranking_loss, F.triplet_margin_loss,
)  # fmt: skip
CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss, F.cross_entropy, F.nll_loss)
"""Those with an ignore_index: what it marks is not counted."""
ELEMENTWISE = (
    nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.KLDivLoss, nn.PoissonNLLLoss,
    nn.GaussianNLLLoss, nn.SoftMarginLoss, nn.MultiLabelSoftMarginLoss, nn.HingeEmbeddingLoss,
    F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.kl_div, F.poisson_nll_loss,
    F.gaussian_nll_loss, F.soft_margin_loss, F.multilabel_soft_margin_loss, F.hinge_embedding_loss,
)  # fmt: skip
"""Those that torch broadcasts, of [B, 1] and [B] to all pairs of samples."""


class PerSample:
    """A criterion's losses [B], one for each sample, each of its own sample alone.

    Args:
        criterion: one of torch's losses, as a module or function (`functools.partial` of it for
            settings); `kd_loss`, `hint_loss`, `KDLoss`, `HintLosses` without regressors; or a
            module of your own whose attribute `reduction` is "none" and that returns [B], losses
            that depend each on their own sample alone: nothing can check that.
        reduction: "mean": a sample's loss is the mean over its own elements (tokens with the
            `ignore_index` not counted), and "batchmean" the sum over them; "sum": the sum.

    The mean over the samples is taken by the optimizer, over the expected batch size. So the mean
    over all tokens of a batch becomes the mean of the samples' means, and class weights are factors
    that nothing is divided by: otherwise one sample would change what others contribute.
    """

    def __init__(self, criterion: Any, reduction: str) -> None:
        self.reduction = reduction
        self.within = reduction  # of a sample's own elements
        kind, settings, own = _settings(criterion)
        if kind is None:
            raise TypeError(
                "criterion: expected a loss of torch, kd_loss, hint_loss, KDLoss or HintLosses "
                'without regressors, or a module with reduction="none" that returns one loss for '
                f"each sample; got {_named(criterion)}, whose samples cannot be told apart"
            )
        self.kind, self.settings, self.criterion = kind, settings, criterion
        if own == "batchmean":
            own, self.within = "mean", "sum"
        if own != "none" and own != reduction:
            raise ValueError(
                f"criterion: expected reduction={reduction!r} (loss_reduction of make_private), "
                f"got {own!r}"
            )
        self.own = own

    def __call__(self, *args: Any, shape: Sequence[int] | None = None, **kwargs: Any) -> Tensor:
        """The losses [B]; for torch's: `shape` as in `PrivateCriterion`."""
        for name in ("reduction", "normalizer", "return_parts", "size_average", "reduce"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name}: expected it in make_private's criterion, not in the call"
                )
        if self.kind in (kd_loss, KDLoss):
            return self._distilled(args, kwargs)
        if self.kind in (hint_loss, HintLosses):
            return self._hinted(args, kwargs)
        if self.kind in ELEMENTWISE:
            _alike(*args[:2], kwargs.get("input"), kwargs.get("target"))
        values = self._values(args, kwargs)
        if self.own == "none":
            if values.ndim != 1:
                raise ValueError(
                    f"criterion: expected losses [B], one a sample, got shape {list(values.shape)}"
                )
            return values
        counted = None
        if self.kind in CLASSES:
            target = kwargs["target"] if "target" in kwargs else args[1]
            if not target.is_floating_point():
                counted = target != self.settings.get("ignore_index", -100)
        return self._within(values, counted, shape)

    def _values(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Not reduced."""
        if isinstance(self.criterion, nn.Module):
            plain: Any = copy.copy(self.criterion)  # the caller's keeps its reduction
            plain.reduction = "none"
            values: Tensor = plain(*args, **kwargs)
        else:
            values = self.kind(*args, **{**self.settings, **kwargs, "reduction": "none"})
        return values

    def _within(
        self, values: Tensor, counted: Tensor | None, shape: Sequence[int] | None = None
    ) -> Tensor:
        """Reduced over each sample's own elements."""
        if values.ndim == 0:
            raise ValueError("criterion: expected losses of several samples, got a scalar")
        if shape is not None:
            if values.shape[0] != shape[0] * shape[1]:
                raise ValueError(
                    f"shape: expected (samples, tokens, ...) of {values.shape[0]} losses, got "
                    f"{tuple(shape)}"
                )
            values = values.view(shape[0], -1)
            counted = None if counted is None else counted.view(shape[0], -1)
        if values.ndim == 1:
            return values
        rows = values.flatten(1)
        total = rows.sum(1)
        if self.within == "sum":
            return total
        if counted is not None and counted.shape == values.shape:
            return total / counted.flatten(1).sum(1).clamp(min=1)
        return total / max(rows.shape[1], 1)

    def _distilled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        settings = {**self.settings, **kwargs, "reduction": "none"}
        values = kd_loss(*args, **settings)
        assert isinstance(values, Tensor)
        labels = args[2] if len(args) > 2 else settings.get("labels")
        kept = [settings.get("mask")]
        if labels is not None:
            kept.append(labels != settings.get("ignore_index", -100))
        return self._within(values, _all(kept))

    def _hinted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if self.kind is hint_loss:
            settings = {**self.settings, **kwargs}
            for name in ("proj_weight", "proj_bias"):
                given = settings.get(name)
                if isinstance(given, Tensor) and given.requires_grad:
                    raise ValueError(
                        f"{name}: expected one without gradient, got a trainable one: make the "
                        "regressor a layer of the module, whose samples are then clipped with it"
                    )
            values = hint_loss(*args, **{**settings, "reduction": "none"})
            return self._within(values, _all([settings.get("mask")]))
        losses: HintLosses = self.criterion
        students, teachers = args
        masks = kwargs.get("mask")
        total: Tensor | None = None
        for i, (weight, own) in enumerate(zip(losses.weights, losses.settings, strict=True)):
            mask = masks if masks is None or isinstance(masks, Tensor) else masks[i]
            values = hint_loss(students[i], teachers[i], mask=mask, **{**own, "reduction": "none"})
            part = weight * self._within(values, _all([mask]))
            total = part if total is None else total + part
        assert total is not None
        return total


def _all(masks: Sequence[Tensor | None]) -> Tensor | None:
    present = [m for m in masks if m is not None]
    return functools.reduce(torch.logical_and, present) if present else None


def _alike(*tensors: Any) -> None:
    shapes = [list(t.shape) for t in tensors if isinstance(t, Tensor)]
    one = all(t.numel() == 1 for t in tensors if isinstance(t, Tensor))  # squeezed at B = 1
    if not one and any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            "criterion: expected tensors of one shape, got "
            f"{' and '.join(map(str, shapes))}: broadcast, one sample's loss would depend on others"
        )


def _named(criterion: Any) -> str:
    return getattr(criterion, "__name__", type(criterion).__name__)


def _settings(criterion: Any) -> tuple[Any, dict[str, Any], str]:
    """(kind, settings, reduction); None for what is not known."""
    if isinstance(criterion, KDLoss):
        settings = dict(criterion.settings)
        return KDLoss, _allowed(settings), settings.get("reduction", "mean")
    if isinstance(criterion, HintLosses):
        if any(True for _ in criterion.regressors.parameters()):
            return None, {}, ""
        found = {s.get("reduction", "mean") for s in criterion.settings}
        if len(found) > 1:
            raise ValueError(
                f"criterion: expected one reduction for all pairs, got {sorted(found)}"
            )
        return HintLosses, {}, found.pop()
    if isinstance(criterion, nn.Module):
        reduction = getattr(criterion, "reduction", None)
        if type(criterion) in MODULES and reduction != "none":
            named = {"ignore_index": getattr(criterion, "ignore_index", -100)}
            return type(criterion), named, str(reduction)
        return (type(criterion), {}, "none") if reduction == "none" else (None, {}, "")
    function, settings = criterion, {}
    while isinstance(function, functools.partial):
        if function.args:
            return None, {}, ""
        settings = {**function.keywords, **settings}
        function = function.func
    if function in (kd_loss, hint_loss) or any(function is f for f in FUNCTIONS):
        default = inspect.signature(function).parameters["reduction"].default
        return function, _allowed(settings), settings.get("reduction", default)
    return None, {}, ""


def _allowed(settings: dict[str, Any]) -> dict[str, Any]:
    if settings.get("normalizer") is not None:
        raise ValueError(
            "normalizer: expected None: dividing by a number of the batch lets one sample change "
            'what others contribute; use reduction="sum"'
        )
    if settings.get("return_parts"):
        raise ValueError("return_parts: expected False: a private loss has one value for a sample")
    return {k: v for k, v in settings.items() if k not in ("reduction", "normalizer")}
