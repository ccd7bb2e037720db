"""The temperature softmaxes: validate, choose a backend, run the fused op as a function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill import _backend, _refusals, _torch_private, _validate
from fastdistill.softmax import native_cuda, reference

OPS = ("temperature_softmax", "temperature_log_softmax")  # by `log`
ROWS_OF = "x without dimension dim"


class _Softmax(torch.autograd.Function):
    """The fused route."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, temperature: Tensor | None, scalar: float, log: bool, backend: str
    ) -> Tensor:
        y, stats = torch.ops.fastdistill.softmax_fwd(x, temperature, scalar, log, backend)
        ctx.save_for_backward(x, temperature, stats)
        ctx.settings = (scalar, log, backend)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, temperature, stats = ctx.saved_tensors
        need_x, need_temperature = ctx.needs_input_grad[:2]
        args = (grad, x, temperature, stats, need_temperature, *ctx.settings)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            grad_x, grad_temperature = _SoftmaxGradient.apply(*args)
        else:
            grad_x, grad_temperature = _gradients(*args)
        return (
            grad_x if need_x else None,
            grad_temperature if need_temperature else None,
            *(None,) * 3,
        )


def _gradients(
    grad: Tensor,
    x: Tensor,
    temperature: Tensor | None,
    stats: Tensor,
    need_temperature: bool,
    scalar: float,
    log: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and, in its dtype, of the temperature (empty where it is not needed)."""
    grad_x, grad_temperature = torch.ops.fastdistill.softmax_bwd(
        grad, x, stats, temperature, scalar, log, need_temperature, backend
    )
    if temperature is not None:
        grad_temperature = grad_temperature.to(temperature.dtype)
    return grad_x, grad_temperature


class _SoftmaxGradient(torch.autograd.Function):
    """The fused gradient as a node of its own. Its derivative is that of the reference's gradient,
    which can itself be differentiated: a softmax inside a gradient penalty trains.
    """

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, temperature: Tensor | None, stats: Tensor, *settings: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(grad, x, temperature)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return _gradients(grad, x, temperature, stats, *settings)

    @staticmethod
    def backward(
        ctx: Any, of_grad_x: Tensor | None, of_grad_temperature: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        need_temperature, scalar, log, _ = ctx.settings
        kept = torch.is_grad_enabled()
        with torch.enable_grad():
            grad, x, temperature = map(_seen_alone, ctx.saved_tensors)
            y = reference.softmax(x, temperature, scalar, log)
            inputs = [x, temperature] if need_temperature else [x]
            first = torch.autograd.grad(y, inputs, grad, create_graph=True)
            upstream = [of_grad_x, of_grad_temperature][: len(first)]
            pairs = [(g, u) for g, u in zip(first, upstream, strict=True) if u is not None]
            wanted = [v for v in (grad, x, temperature) if v is not None]
            second = torch.autograd.grad(
                [g for g, _ in pairs],
                wanted,
                [u for _, u in pairs],
                create_graph=kept,
                allow_unused=True,
            )
        of_temperature = second[2] if temperature is not None else None
        return second[0], second[1], of_temperature, *(None,) * 5


def _seen_alone(v: Any) -> Any:
    """A saved tensor through a view, so that what leads from one to another is not differentiated
    twice; one that needs no gradient as a leaf that does.
    """
    if v is None:
        return None
    return v.view_as(v) if v.requires_grad else v.detach().requires_grad_()


def temperature_softmax(x: Tensor, temperature: float | Tensor = 1.0, dim: int = -1) -> Tensor:
    """softmax(x / T) along `dim`: a distribution over classes, softer the larger T.

    (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", equation 1.)

    Args:
        x: logits [..., V], classes on `dim`; float32, bfloat16, float16 or float64. Rows may be
            strided; where the classes are not dense in memory, x is copied.
        temperature: T > 0, from 1e-36 to 1e36: a number, or a floating tensor with one temperature
            for each row, [...] (x's shape without `dim`), which gets a gradient where it requires
            one: temperatures that are learned, or adapted to each sample. Nothing is broadcast: one
            learned scalar for all rows is `scalar.expand(...)`.
        dim: the dimension of the classes.

    Returns:
        Probabilities in x's shape and dtype, also under autocast; sums are taken in float32
        (float64 for float64). A NaN, a +inf or only -inf in a row gives NaN for that row alone;
        -inf masks a class. The backward pass reads x again, not the output, whose rounding would
        spoil the gradient in half precision: x is kept, and must not be changed in place.

    Raises:
        TypeError, ValueError: the argument's name, what was expected and what came. A temperature
            in a tensor that is not finite and > 0 raises for tensors on the CPU; on a GPU, under
            torch.compile with the reference, and under functorch transforms it gives NaN for its
            row instead, without synchronising.
        RuntimeError: an explicitly requested backend cannot run the call.
    """
    return _tempered(x, temperature, dim, False)


def temperature_log_softmax(x: Tensor, temperature: float | Tensor = 1.0, dim: int = -1) -> Tensor:
    """log(softmax(x / T)) along `dim`, without the underflow of taking the logarithm afterwards.

    Arguments, dtypes and errors as in `temperature_softmax`. A class that -inf masks is -inf.
    """
    return _tempered(x, temperature, dim, True)


def _tempered(x: Tensor, temperature: float | Tensor, dim: int, log: bool) -> Tensor:
    x = _validate.floating("x", x)
    if x.ndim == 0:
        raise ValueError("x: expected at least 1 dimension (classes), got a scalar")
    axis = _validate.axis("dim", dim, x.ndim)
    last = axis == x.ndim - 1
    if not last:
        x = x.movedim(axis, -1)
    if x.shape[-1] == 0:
        raise ValueError(
            f"x: expected at least one class in dimension {dim}, got shape "
            f"{list(x.movedim(-1, axis).shape)}"
        )
    scalar, rows_of_t = 1.0, None
    if isinstance(temperature, Tensor):
        rows_of_t = _validate.floating("temperature", temperature)
        _validate.per_row("temperature", rows_of_t, x.shape[:-1], x.device, ROWS_OF)
    else:
        scalar = _validate.temperature(temperature)

    case = _backend.Case(x.device.type, (x.dtype,), _torch_private.transforms_active())
    backend = _backend.choose(OPS[log], case)
    if backend == "reference":
        y = reference.softmax(x, rows_of_t, scalar, log)
    elif torch.is_grad_enabled() and (
        x.requires_grad or (rows_of_t is not None and rows_of_t.requires_grad)
    ):
        y = _Softmax.apply(x, rows_of_t, scalar, log, backend)
    else:
        y, _ = torch.ops.fastdistill.softmax_fwd(x, rows_of_t, scalar, log, backend)
    return y if last else y.movedim(-1, axis).contiguous()  # dense, as torch.softmax gives it


def _refuse_cuda(case: _backend.Case) -> str | None:
    unknown = [d for d in case.dtypes if not native_cuda.supports(d)]
    problem = f"it takes float32, bfloat16 or float16, not {unknown[0]}" if unknown else None
    return _refusals.cuda(case, problem)


for _op in OPS:
    _backend.register(
        _op,
        {
            "triton": _refusals.triton,
            "cuda": _refuse_cuda,
            "cpu": _refusals.cpu,
            "reference": _refusals.nothing,
        },
    )
