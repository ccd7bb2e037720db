"""`kd_loss`: validate, choose a backend, run the fused op as an autograd function."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdistill import _backend, _refusals, _second_order, _torch_private, _validate
from fastdistill.kd import native_cuda, reference

REDUCTIONS = ("mean", "sum", "none", "batchmean")
OP = "kd_loss"
ROWS_OF = "student_logits without the class dimension"


class KDLossParts(NamedTuple):
    """The loss with its two parts: loss = hard_weight hard + soft_weight soft.

    `hard` and `soft` are detached, reduced as the loss is, unweighted, T^2 included.
    """

    loss: Tensor
    hard: Tensor
    soft: Tensor


class _KDLoss(torch.autograd.Function):
    """The fused route: the gradient is made in the forward pass, backward only scales it."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, anchor: Tensor | None, *args: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, hard, soft, grad, grad_scale = torch.ops.fastdistill.kd_fwd(student, *args)
        ctx.backend = args[-1]
        ctx.save_for_backward(grad, grad_scale, anchor)
        ctx.mark_non_differentiable(hard, soft)
        ctx.set_materialize_grads(False)
        return loss, hard, soft

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 18
        grad, grad_scale, anchor = ctx.saved_tensors
        with torch.no_grad():
            args = (grad, grad_scale, grad_output, ctx.backend)
            if _torch_private.may_overwrite(grad_output):
                torch.ops.fastdistill.kd_bwd_(*args)
            else:
                grad = torch.ops.fastdistill.kd_bwd(*args)
        if anchor is not None and torch.is_grad_enabled():  # create_graph=True
            grad = _second_order.refusing(OP, grad, anchor, grad_output)
        return grad, *(None,) * 17


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    hard_weight: float = 0.0,
    soft_weight: float = 1.0,
    divergence: str = "forward_kl",
    scale_t2: bool = True,
    mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    dim: int = -1,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    return_parts: bool = False,
) -> Tensor | KDLossParts:
    """Knowledge-distillation loss, with its gradient computed in the same pass.

    Per row, with student logits z_s and teacher logits z_t::

        hard_weight CE(labels, softmax(z_s))
        + soft_weight T^2 D(softmax(z_t / T), softmax(z_s / T))

    (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2; its alpha and
    beta are `hard_weight` and `soft_weight` here.)

    Args:
        student_logits: [..., V], classes on `dim`; float32, bfloat16, float16 or float64.
        teacher_logits: the same shape, any of those dtypes; detached. Log-probabilities are
            valid logits, so a black-box teacher's log-probabilities do as well.
        labels: int64 [...] (the logits' shape without `dim`). Needed for the hard term. A row
            whose label is `ignore_index` contributes to neither term, also at `hard_weight` 0: a
            batch that is labelled only in part takes two calls (soft on all rows without labels;
            hard on the labelled rows with `soft_weight=0`).
        temperature: T > 0: a number (from 1e-18 to 1e18; from 1e-36 to 1e36 without `scale_t2`),
            or a floating tensor with one temperature for each row, [...], which gets a gradient
            where it requires one, that of T^2 included (learned and adaptive temperatures).
            Nothing is broadcast: one learned scalar for all rows is `scalar.expand(...)`. Of a
            dropped row it is not looked at. A tensor is computed by the reference backend; the
            compiled ones refuse it so far.
        hard_weight: weight of the cross-entropy with the labels (at temperature 1): 0, or of a
            size from 1e-36 to 1e36, as `soft_weight` and `normalizer`.
        soft_weight: weight of the divergence between teacher and student. A term of weight 0 is
            not computed.
        divergence: "forward_kl" KL(p_t || p_s), "reverse_kl" KL(p_s || p_t), or "cross_entropy"
            H(p_t, p_s).
        scale_t2: multiply the divergence by T^2 (DistilBERT, ModelOpt and torchvision-style code
            do; TRL, Liger and NeMo-RL do not).
        mask: bool [...]; True keeps the row.
        row_weight: floating [...], >= 0; gets no gradient; 0 drops the row.
        ignore_index: the label that drops a row.
        label_smoothing: of the hard term, in [0, 1], as in `torch.nn.functional.cross_entropy`.
        dim: the dimension of the classes. Rows may be strided; where the classes themselves are
            not dense in memory, the logits are copied.
        reduction: "mean": sum w l / sum w over the rows kept (w = `row_weight` or 1), or the sum
            over `normalizer`; "sum"; "none": weighted rows [...], 0 where dropped; "batchmean":
            the sum over logits.size(0), ignored rows counted (torch's meaning; at least 2
            dimensions, the classes not first).
        normalizer: a number or a scalar tensor > 0 that replaces the divisor of "mean", such as
            the number of tokens in all the micro-batches of a step.
        return_parts: return `KDLossParts` (loss, hard, soft).

    Returns:
        The loss, float32 (float64 if either input is); its gradient has the student's dtype. If
        all rows are dropped it is 0 and differentiable. Exactly 0 divergence for identical
        logits, and never a negative one. A NaN, a +inf or only -inf in a row gives NaN for that
        row alone; -inf masks a class. Where the teacher has mass on a class that the student
        masks, forward KL is +inf with gradient q - p; an infinite reverse KL has a NaN gradient.

    Raises:
        TypeError, ValueError: the argument's name, what was expected and what came. Values in
            tensors (an out-of-range label, a negative weight) raise for tensors on the CPU; on a
            GPU, under torch.compile with the reference, and under functorch transforms they give
            NaN for that row instead, without synchronising.
        RuntimeError: an explicitly requested backend cannot run the call; or a second derivative
            of the fused loss is asked for (use `fastdistill.backend("reference")`; `torch.func`
            transforms take it by themselves).
    """
    student = _validate.floating("student_logits", student_logits)
    teacher = _validate.floating("teacher_logits", teacher_logits)
    shape = student.shape
    if teacher.shape != shape:
        _validate.same_shape("teacher_logits", teacher, shape, "that of student_logits")
    if student.ndim == 0:
        raise ValueError("student_logits: expected at least 1 dimension (classes), got a scalar")
    device = student.device
    if teacher.device != device:
        _validate.same_device("teacher_logits", teacher, device, "student_logits")
    if dim != -1 or type(dim) is not int:
        axis = _validate.axis("dim", dim, student.ndim)
        if axis != student.ndim - 1:
            student, teacher = student.movedim(axis, -1), teacher.movedim(axis, -1)
    if student.shape[-1] == 0:
        raise ValueError(f"student_logits: expected at least one class, got shape {list(shape)}")
    rows = student.shape[:-1]

    row_temperature = None
    if isinstance(temperature, Tensor):
        row_temperature = _validate.floating("temperature", temperature)
        _validate.per_row("temperature", row_temperature, rows, device, ROWS_OF)
        temperature = 1.0
    temperature, hard_weight, soft_weight, label_smoothing = check_settings(
        temperature, hard_weight, soft_weight, divergence, scale_t2, ignore_index,
        label_smoothing, reduction,
    )  # fmt: skip

    if labels is not None:
        _check_labels(labels, rows, device)
    elif hard_weight != 0:
        raise ValueError(f"labels: expected a tensor with hard_weight={hard_weight}, got None")
    if mask is not None:
        _validate.mask(mask, rows, device, ROWS_OF)
    if row_weight is not None:
        _validate.row_weight(row_weight, rows, device, ROWS_OF)

    # None of these gets a gradient; the ops are not to be asked for one.
    teacher, row_weight, normalizer = map(_detached, (teacher, row_weight, normalizer))
    divisor, scalar = _divisor(reduction, normalizer, shape, student.ndim, dim)
    if reduction == "batchmean" or normalizer is not None:
        reduction = "sum"

    case = _backend.Case(
        device.type,
        (student.dtype, teacher.dtype),
        _torch_private.transforms_active(),
        row_temperature is not None,
    )
    backend = _backend.choose(OP, case)
    args = (
        teacher, labels, mask, row_weight, scalar, temperature, hard_weight, soft_weight,
        divergence, scale_t2, ignore_index, label_smoothing, reduction, divisor,
    )  # fmt: skip
    if backend == "reference":
        loss, hard, soft = reference.kd_loss(student, *args, row_temperature)
    elif student.requires_grad and torch.is_grad_enabled():
        anchor = None if torch.compiler.is_compiling() else _second_order.anchor(student)
        loss, hard, soft = _KDLoss.apply(student, anchor, *args, True, backend)
    else:
        loss, hard, soft = torch.ops.fastdistill.kd_fwd(student, *args, False, backend)[:3]
    return KDLossParts(loss, hard, soft) if return_parts else loss


def check_settings(
    temperature: float = 1.0,
    hard_weight: float = 0.0,
    soft_weight: float = 1.0,
    divergence: str = "forward_kl",
    scale_t2: bool = True,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[float, float, float, float]:
    """Refuse what no call could use; the numbers among them, as floats."""
    _validate.choice("divergence", divergence, reference.DIVERGENCES)
    _validate.boolean("scale_t2", scale_t2)
    _validate.integer("ignore_index", ignore_index)
    _validate.choice("reduction", reduction, REDUCTIONS)
    return (
        _validate.temperature(temperature, squared=scale_t2),
        _validate.factor("hard_weight", hard_weight),
        _validate.factor("soft_weight", soft_weight),
        _validate.fraction("label_smoothing", label_smoothing),
    )


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) and x.requires_grad else x


def _check_labels(labels: object, rows: torch.Size, device: torch.device) -> None:
    x = _validate.tensor("labels", labels)
    if x.dtype is not torch.int64:
        if x.dtype.is_floating_point:
            raise TypeError(
                f"labels: expected class indices of dtype int64, got {x.dtype}; for class "
                "probabilities pass their logarithm as teacher_logits, with "
                'divergence="cross_entropy"'
            )
        raise TypeError(f"labels: expected class indices of dtype int64, got {x.dtype}")
    _validate.per_row("labels", x, rows, device, ROWS_OF)


def _divisor(
    reduction: str, normalizer: object, shape: torch.Size, ndim: int, dim: int
) -> tuple[float, Tensor | None]:
    """What the sum over rows is divided by: a number, or a scalar tensor that replaces it."""
    if normalizer is not None:
        return _validate.normalizer(normalizer, reduction)
    if reduction == "batchmean":
        if ndim < 2 or dim % ndim == 0:
            raise ValueError(
                'reduction: expected at least 2 dimensions, classes not first, for "batchmean"; '
                f"got shape {list(shape)} with dim={dim}"
            )
        return float(max(shape[0], 1)), None  # no rows: 0, not 0 / 0
    return 1.0, None


def _refuse_row_temperature(case: _backend.Case) -> str | None:
    if case.row_temperature:
        return 'its temperature is one number for all rows; backend("reference") takes a tensor'
    return None


def _refuse_triton(case: _backend.Case) -> str | None:
    return _refusals.triton(case) or _refuse_row_temperature(case)


def _refuse_cpu(case: _backend.Case) -> str | None:
    return _refusals.cpu(case) or _refuse_row_temperature(case)


def _refuse_cuda(case: _backend.Case) -> str | None:
    student, teacher = case.dtypes
    problem = None
    if not native_cuda.supports(student, teacher):
        problem = (
            "it takes logits of one type (float32, bfloat16 or float16), or one of the 16-bit "
            f"types together with float32; not {student} with {teacher}"
        )
    return _refusals.cuda(case, problem) or _refuse_row_temperature(case)


_backend.register(
    OP,
    {
        "triton": _refuse_triton,
        "cuda": _refuse_cuda,
        "cpu": _refuse_cpu,
        "reference": _refusals.nothing,
    },
)
