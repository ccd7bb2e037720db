"""`hint_loss` of many pairs of layers, with their regressors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastdistill import _validate
from fastdistill.hint import hint_loss
from fastdistill.hint.api import check_settings


class HintLossesParts(NamedTuple):
    """The weighted sum with the loss of each pair: loss = sum of weight x part."""

    loss: Tensor
    parts: tuple[Tensor, ...]  # detached, unweighted


class HintLosses(nn.Module):
    """`fastdistill.hint_loss` of many pairs of layers in one call.

    Args:
        pairs: one mapping for each pair of layers, with the keys

            - `student_width`, `teacher_width`: build a regressor `nn.Linear(student_width,
              teacher_width, bias)`; `bias` is True unless given.
            - `regressor`: or take this module: an `nn.Linear`, an `nn.Conv1d` to `nn.Conv3d` of
              kernel size 1, or None (the default) to compare the features as they are.
            - `weight`: of this pair in the sum; 1 unless given.
            - `distance`, `feature_norm`, `channel_dim`, `reduction` ("mean" or "sum"): as in
              `hint_loss`. A convolution's `channel_dim` is 1 unless given.

    The regressors are parameters of the module (in `regressors`): give them to the optimizer, and
    leave them out of what is deployed.

    Raises:
        TypeError, ValueError: a key or a value that does not exist, and the number of its pair.
    """

    _KEYS = (
        "student_width", "teacher_width", "bias", "regressor", "weight", "distance",
        "feature_norm", "channel_dim", "reduction",
    )  # fmt: skip

    def __init__(self, pairs: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        if isinstance(pairs, Mapping) or not isinstance(pairs, Sequence):
            raise TypeError(f"pairs: expected a sequence of mappings, got {type(pairs).__name__}")
        if not pairs:
            raise ValueError("pairs: expected at least one pair of layers, got none")
        self.weights: list[float] = []
        self.settings: list[dict[str, Any]] = []
        regressors = []
        for i, pair in enumerate(pairs):
            name = f"pairs[{i}]"
            if not isinstance(pair, Mapping):
                raise TypeError(f"{name}: expected a mapping, got {type(pair).__name__}")
            for key in pair:
                if key not in self._KEYS:
                    raise TypeError(f"{name}: expected one of {', '.join(self._KEYS)}; got {key!r}")
            regressor = _regressor(name, pair)
            settings = {
                key: pair[key]
                for key in ("distance", "feature_norm", "channel_dim", "reduction")
                if key in pair
            }
            check_settings(**{k: v for k, v in settings.items() if k != "channel_dim"})
            if settings.get("reduction") == "none":
                raise ValueError(f'{name}: reduction: expected "mean" or "sum", got "none"')
            if not isinstance(regressor, nn.Linear | nn.Identity):
                settings.setdefault("channel_dim", 1)
            regressors.append(regressor)
            self.weights.append(_validate.number(f"{name}: weight", pair.get("weight", 1.0)))
            self.settings.append(settings)
        self.regressors = nn.ModuleList(regressors)

    def forward(
        self,
        student_features: Sequence[Tensor],
        teacher_features: Sequence[Tensor],
        *,
        mask: Tensor | Sequence[Tensor | None] | None = None,
        row_weight: Tensor | Sequence[Tensor | None] | None = None,
        return_parts: bool = False,
    ) -> Tensor | HintLossesParts:
        """The weighted sum of the pairs' losses, a scalar; `HintLossesParts` on request.

        `student_features` and `teacher_features` have one tensor for each pair; `mask` and
        `row_weight` one for all pairs, or one (or None) for each.
        """
        count = len(self.weights)
        students = _one_each("student_features", student_features, count)
        teachers = _one_each("teacher_features", teacher_features, count)
        masks, row_weights = (
            [x] * count if x is None or isinstance(x, Tensor) else _one_each(name, x, count)
            for name, x in (("mask", mask), ("row_weight", row_weight))
        )
        total: Tensor | None = None
        parts = []
        for i, (weight, settings) in enumerate(zip(self.weights, self.settings, strict=True)):
            regressor = self.regressors[i]
            identity = isinstance(regressor, nn.Identity)
            projection: Any = regressor
            part = hint_loss(
                students[i],
                teachers[i],
                proj_weight=None if identity else projection.weight,
                proj_bias=None if identity else projection.bias,
                mask=masks[i],
                row_weight=row_weights[i],
                **settings,
            )
            parts.append(part.detach())
            total = weight * part if total is None else total + weight * part
        assert total is not None  # there is at least one pair
        return HintLossesParts(total, tuple(parts)) if return_parts else total

    def extra_repr(self) -> str:
        """The weight and the settings of each pair."""
        return "\n".join(
            f"({i}): weight={weight}" + "".join(f", {k}={v!r}" for k, v in settings.items())
            for i, (weight, settings) in enumerate(zip(self.weights, self.settings, strict=True))
        )


def _one_each(name: str, values: Any, count: int) -> Sequence[Any]:
    if isinstance(values, Tensor) or not isinstance(values, Sequence):
        raise TypeError(
            f"{name}: expected a sequence of {count} tensors, got {type(values).__name__}"
        )
    if len(values) != count:
        raise ValueError(f"{name}: expected {count} tensors, one a pair, got {len(values)}")
    return values


def _regressor(name: str, pair: Mapping[str, Any]) -> nn.Module:
    """The regressor of a pair; nn.Identity for none."""
    widths = [key for key in ("student_width", "teacher_width") if key in pair]
    given = pair.get("regressor")
    if given is None:
        if not widths:
            if "bias" in pair:
                raise ValueError(f"{name}: bias: expected student_width and teacher_width with it")
            return nn.Identity()
        if len(widths) != 2:
            raise ValueError(f"{name}: expected student_width and teacher_width, got {widths[0]}")
        narrow, wide = (
            int(
                _validate.positive(f"{name}: {key}", _validate.integer(f"{name}: {key}", pair[key]))
            )
            for key in ("student_width", "teacher_width")
        )
        bias = _validate.boolean(f"{name}: bias", pair.get("bias", True))
        return nn.Linear(narrow, wide, bias)
    if widths or "bias" in pair:
        raise ValueError(f"{name}: expected a regressor or widths and bias, got both")
    convolution = isinstance(given, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if not (convolution or isinstance(given, nn.Linear)):
        raise TypeError(
            f"{name}: regressor: expected nn.Linear, a convolution of kernel size 1 or None, got "
            f"{type(given).__name__}"
        )
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    known = type(given).forward in [kind.forward for kind in kinds]
    # Its weight alone is used: what else its call would do, nobody would miss.
    if not known or given._forward_hooks or given._forward_pre_hooks:
        raise TypeError(
            f"{name}: regressor: expected a layer without hooks or a forward of its own, got "
            f"{type(given).__name__}; its weight and bias alone are used"
        )
    if convolution:
        plain = all(
            value == (wanted,) * len(given.kernel_size)
            for value, wanted in (
                (given.kernel_size, 1), (given.stride, 1), (given.padding, 0),
            )
        )  # fmt: skip
        if not plain or given.groups != 1:
            raise ValueError(
                f"{name}: regressor: expected kernel size 1, stride 1, no padding and one group, "
                f"got {given}"
            )
    return given
