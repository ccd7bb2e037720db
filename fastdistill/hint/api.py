"""`hint_loss`: validate, choose a backend, run the fused op as an autograd function."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdistill import _backend, _refusals, _second_order, _torch_private, _validate
from fastdistill.hint import native_cuda, reference

REDUCTIONS = ("mean", "sum", "none")
FEATURE_NORMS = ("layer_norm", "l2")
OP = "hint_loss"
ROWS_OF = "student_features without the channel dimension"


class _Settings(NamedTuple):
    """The Python values of an op call, in its order."""

    distance: str
    student_norm: str
    teacher_norm: str


class _HintLoss(torch.autograd.Function):
    """The fused route: the gradients are made in the forward pass, backward only scales them.

    Those of reduction "none" are made in backward: W's is a sum over rows that are each multiplied
    by their own element of grad_output.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        anchor: Tensor | None,
        teacher: Tensor,
        mask: Tensor | None,
        row_weight: Tensor | None,
        normalizer: Tensor | None,
        settings: _Settings,
        reduction: str,
        divisor: float,
        backend: str,
    ) -> Tensor:
        ctx.backend, ctx.settings, ctx.per_row = backend, settings, reduction == "none"
        ctx.dtypes = tuple(None if x is None else x.dtype for x in (student, weight, bias))
        needs = (False,) * 3 if ctx.per_row else ctx.needs_input_grad[:3]
        loss, *grads, grad_scale = torch.ops.fastdistill.hint_fwd(
            student, teacher, weight, bias, mask, row_weight, normalizer, *settings, reduction,
            divisor, *needs, backend,
        )  # fmt: skip
        if ctx.per_row:
            ctx.save_for_backward(anchor, student, teacher, weight, bias, mask, row_weight)
        else:
            ctx.save_for_backward(anchor, grad_scale, *grads)
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 12
        anchor, *saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        with torch.no_grad():
            if ctx.per_row:
                made = torch.ops.fastdistill.hint_grad(
                    *saved, grad_output, *ctx.settings, *needs, ctx.backend
                )
                grads = [
                    x.to(dtype) if need else None
                    for x, dtype, need in zip(made, ctx.dtypes, needs, strict=True)
                ]
            else:
                grad_scale, *made = saved
                grads = [
                    _times(x, grad_scale, grad_output, dtype, ctx.backend) if need else None
                    for x, dtype, need in zip(made, ctx.dtypes, needs, strict=True)
                ]
        if anchor is not None and torch.is_grad_enabled():  # create_graph=True
            grads = [
                None if x is None else _second_order.refusing(OP, x, anchor, grad_output)
                for x in grads
            ]
        return *grads, *(None,) * 9


def _times(
    grad: Tensor, grad_scale: Tensor, grad_output: Tensor, dtype: torch.dtype, backend: str
) -> Tensor:
    if grad.dtype is dtype and _torch_private.may_overwrite(grad_output):
        torch.ops.fastdistill.hint_bwd_(grad, grad_scale, grad_output, backend)
        return grad
    return torch.ops.fastdistill.hint_bwd(grad, grad_scale, grad_output, dtype, backend)


def hint_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    distance: str = "mse",
    mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    feature_norm: str | tuple[str | None, str | None] | None = None,
    channel_dim: int = -1,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """The distance of a student's layer, projected, to a teacher's, with all gradients.

    Per row, with student features F_S, teacher features F_T and the regressor (W, b)::

        D(norm_t(F_T), norm_s(F_S W' + b))

    (Romero et al. 2015, "FitNets: Hints for thin deep nets", equation 3, whose half of a sum of
    squares is a mean over features here.) The projection is made in blocks of rows that go
    straight into the distance and the gradients' products: it is never stored at full size.

    Args:
        student_features: [..., D_s], features on `channel_dim`; float32, bfloat16, float16 or
            float64.
        teacher_features: [..., D_t], the same rows, any of those dtypes; detached.
        proj_weight: W [D_t, D_s] as in `nn.Linear`, or [D_t, D_s, 1, ...] as in a convolution of
            kernel size 1; the student's dtype. Without it D_s = D_t, and the loss is the fused
            distance alone. Under autocast, features, weight and bias are cast as
            `nn.functional.linear` has them cast.
        proj_bias: b [D_t].
        distance: "mse", "l1", "smooth_l1" (beta 1): the mean over the features; "cosine": 1 - cos
            (eps 1e-8, as in `nn.functional.cosine_similarity`; so a row of zeros, which has no
            direction, has cosine 0 and a gradient of the size 1 / eps, more than float16 can
            hold: such rows are for the mask).
        mask: bool [...]; True keeps the row.
        row_weight: floating [...], >= 0; gets no gradient; 0 drops the row.
        feature_norm: "layer_norm" (no affine, eps 1e-5) or "l2" (eps 1e-12, as in
            `nn.functional.normalize`) of both sides, after the projection; or a pair for
            (student, teacher), with None for a side as it is.
        channel_dim: the dimension of the features: 1 for feature maps [N, C, H, W], of which each
            position is a row (`mask` is [N, H, W]).
        reduction: "mean": sum w l / sum w over the rows kept (w = `row_weight` or 1), or the sum
            over `normalizer`; "sum": the sum of the rows; "none": weighted rows [...], 0 where
            dropped.
        normalizer: a number or a scalar tensor > 0 that replaces the divisor of "mean".

    Returns:
        The loss, float32 (float64 if either of the features is). "mean" with "mse" equals
        `F.mse_loss(F.linear(student_features, W, b), teacher_features)`. Gradients are made for
        what requires one: a frozen regressor costs none. Identical features give exactly 0, and
        the loss is never negative. A NaN gives NaN for its row alone; a dropped row is not looked
        at, and what it holds reaches no gradient. If all rows are dropped the loss is 0 and
        differentiable. float16 gradients keep 1 / divisor out until backward multiplies them.
        The same call gives the same bits.

    Raises:
        TypeError, ValueError: the argument's name, what was expected and what came. Values in
            tensors (a negative weight) raise for tensors on the CPU; on a GPU, under torch.compile
            with the reference, and under functorch transforms they give NaN for that row instead,
            without synchronising.
        RuntimeError: an explicitly requested backend cannot run the call; or a second derivative
            of the fused loss is asked for (use `fastdistill.backend("reference")`; `torch.func`
            transforms take it by themselves).
    """
    student = _validate.floating("student_features", student_features)
    teacher = _validate.floating("teacher_features", teacher_features)
    settings = check_settings(distance, feature_norm, reduction)
    student, teacher = _features_last(student, teacher, channel_dim)
    weight, bias = _regressor(student, teacher, proj_weight, proj_bias)
    rows, device = student.shape[:-1], student.device
    if mask is not None:
        _validate.mask(mask, rows, device, ROWS_OF)
    if row_weight is not None:
        _validate.row_weight(row_weight, rows, device, ROWS_OF)
    divisor, scalar = 1.0, None
    if normalizer is not None:
        divisor, scalar = _validate.normalizer(normalizer, reduction)
        reduction = "sum"

    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        if weight is not None:
            dtype = torch.get_autocast_dtype(device.type)
            student = _cast(student, dtype)
            weight = _cast(weight, dtype)
            bias = None if bias is None else _cast(bias, dtype)
        with torch.autocast(device.type, enabled=False):
            return _loss(
                student, weight, bias, teacher, mask, row_weight, scalar, settings, reduction,
                divisor,
            )  # fmt: skip
    return _loss(
        student, weight, bias, teacher, mask, row_weight, scalar, settings, reduction, divisor
    )


def _loss(
    student: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    teacher: Tensor,
    mask: Tensor | None,
    row_weight: Tensor | None,
    normalizer: Tensor | None,
    settings: _Settings,
    reduction: str,
    divisor: float,
) -> Tensor:
    for name, x in (("proj_weight", weight), ("proj_bias", bias)):
        if x is not None and x.dtype is not student.dtype:
            raise TypeError(
                f"{name}: expected dtype {student.dtype} (that of student_features), got {x.dtype}"
            )
    # None of these gets a gradient; the ops are not to be asked for one.
    teacher, row_weight, normalizer = map(_detached, (teacher, row_weight, normalizer))
    case = _backend.Case(
        student.device.type, (student.dtype, teacher.dtype), _torch_private.transforms_active()
    )
    backend = _backend.choose(OP, case)
    args = (teacher, mask, row_weight, normalizer)
    if backend == "reference":
        return reference.hint_loss(
            student, teacher, weight, bias, mask, row_weight, normalizer, *settings, reduction,
            divisor,
        )  # fmt: skip
    leaves = [x for x in (student, weight, bias) if x is not None and x.requires_grad]
    if leaves and torch.is_grad_enabled():
        anchor = None if torch.compiler.is_compiling() else _second_order.anchor(*leaves)
        return _HintLoss.apply(
            student, weight, bias, anchor, *args, settings, reduction, divisor, backend
        )
    return torch.ops.fastdistill.hint_fwd(
        student, teacher, weight, bias, mask, row_weight, normalizer, *settings, reduction,
        divisor, False, False, False, backend,
    )[0]  # fmt: skip


def check_settings(
    distance: str = "mse", feature_norm: object = None, reduction: str = "mean"
) -> _Settings:
    """Refuse what no call could use; the rest as the ops take it."""
    _validate.choice("distance", distance, reference.DISTANCES)
    _validate.choice("reduction", reduction, REDUCTIONS)
    pair = (feature_norm, feature_norm)
    if isinstance(feature_norm, tuple | list):
        if len(feature_norm) != 2:
            raise ValueError(
                "feature_norm: expected one value or a pair (student, teacher), got "
                f"{len(feature_norm)} values"
            )
        pair = (feature_norm[0], feature_norm[1])
    for norm in pair:
        if norm is not None:
            _validate.choice("feature_norm", norm, FEATURE_NORMS)
    student_norm, teacher_norm = ("none" if norm is None else str(norm) for norm in pair)
    return _Settings(distance, student_norm, teacher_norm)


def _features_last(student: Tensor, teacher: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """Views [..., D_s] and [..., D_t] of the same rows."""
    for name, x in (("student_features", student), ("teacher_features", teacher)):
        if x.ndim == 0:
            raise ValueError(f"{name}: expected at least 1 dimension (features), got a scalar")
    if teacher.ndim != student.ndim:
        raise ValueError(
            f"teacher_features: expected {student.ndim} dimensions as student_features has, got "
            f"shape {list(teacher.shape)}"
        )
    _validate.same_device("teacher_features", teacher, student.device, "student_features")
    axis = _validate.axis("channel_dim", channel_dim, student.ndim)
    if axis != student.ndim - 1:
        student, teacher = student.movedim(axis, -1), teacher.movedim(axis, -1)
    if teacher.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"teacher_features: expected the rows {list(student.shape[:-1])} of student_features "
            f"around channel_dim={channel_dim}, got {list(teacher.shape[:-1])}; nothing is "
            "broadcast"
        )
    for name, x in (("student_features", student), ("teacher_features", teacher)):
        if x.shape[-1] == 0:
            raise ValueError(f"{name}: expected at least one feature, got none")
    return student, teacher


def _regressor(
    student: Tensor, teacher: Tensor, weight: object, bias: object
) -> tuple[Tensor | None, Tensor | None]:
    """(W [D_t, D_s], b [D_t]) as far as they are given, checked against the features."""
    wide, narrow = teacher.shape[-1], student.shape[-1]
    if weight is None:
        if bias is not None:
            raise ValueError("proj_bias: expected None without proj_weight")
        if wide != narrow:
            raise ValueError(
                f"proj_weight: expected a regressor [{wide}, {narrow}] between features of "
                f"different width (student {narrow}, teacher {wide}), got None"
            )
        return None, None
    w = _validate.floating("proj_weight", weight)
    if w.ndim < 2 or tuple(w.shape) != (wide, narrow, *(1,) * (w.ndim - 2)):
        raise ValueError(
            f"proj_weight: expected shape [{wide}, {narrow}] (teacher's features, student's; "
            f"a convolution's may end in ones), got {list(w.shape)}"
        )
    _validate.same_device("proj_weight", w, student.device, "student_features")
    if w.ndim > 2:
        w = w.flatten(1)
    if bias is None:
        return w, None
    b = _validate.floating("proj_bias", bias)
    _validate.same_shape("proj_bias", b, (wide,), "the teacher's features")
    _validate.same_device("proj_bias", b, student.device, "student_features")
    return w, b


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast casts an operand: float64 stays."""
    return x if x.dtype is torch.float64 else x.to(dtype)


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) and x.requires_grad else x


def _refuse_cuda(case: _backend.Case) -> str | None:
    problem = None
    if not native_cuda.supports(*case.dtypes):
        problem = (
            "it takes features of float32, bfloat16 or float16; not "
            f"{case.dtypes[0]} with {case.dtypes[1]}"
        )
    return _refusals.cuda(case, problem)


_backend.register(
    OP,
    {
        "triton": _refusals.triton,
        "cuda": _refuse_cuda,
        "cpu": _refusals.cpu,
        "reference": _refusals.nothing,
    },
)
