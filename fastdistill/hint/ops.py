"""Schemas, fakes and the table backend -> launcher of this room's ops. Registration only.

The ops are private: `api.py` validates for them. `hint_fwd` computes the gradients in the same
pass, for one number as `grad_output`; `hint_bwd` and `hint_bwd_` multiply by it. The rows of
reduction "none" each get a number of their own, which a finished gradient of W cannot take in:
`hint_grad` makes those gradients when it is known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill._backend import Launchers
from fastdistill.hint.blocks import like_rows

launcher = Launchers(
    {
        "cpu": "fastdistill.hint.native",
        "cuda": "fastdistill.hint.native_cuda",
        "triton": "fastdistill.hint.triton",
    }
)
_INPUTS = (
    "Tensor student, Tensor teacher, Tensor? weight, Tensor? bias, Tensor? mask, Tensor? row_weight"
)
_SETTINGS = "str distance, str student_norm, str teacher_norm"
_NEEDS = "bool need_student, bool need_weight, bool need_bias, str backend"

_library = torch.library.Library("fastdistill", "FRAGMENT")
_library.define(
    f"hint_fwd({_INPUTS}, Tensor? normalizer, {_SETTINGS}, str reduction, float divisor, {_NEEDS})"
    " -> (Tensor loss, Tensor grad_student, Tensor grad_weight, Tensor grad_bias,"
    " Tensor grad_scale)"
)
_library.define(
    f"hint_grad({_INPUTS}, Tensor grad_output, {_SETTINGS}, {_NEEDS})"
    " -> (Tensor grad_student, Tensor grad_weight, Tensor grad_bias)"
)
_library.define(
    "hint_bwd(Tensor grad, Tensor grad_scale, Tensor grad_output, ScalarType dtype, str backend)"
    " -> Tensor"
)
_library.define(
    "hint_bwd_(Tensor(a!) grad, Tensor grad_scale, Tensor grad_output, str backend) -> ()"
)


def arithmetic(student: Tensor, teacher: Tensor) -> torch.dtype:
    """The type of the arithmetic, and of the loss: float32, or float64 if either input is."""
    double = student.dtype is torch.float64 or teacher.dtype is torch.float64
    return torch.float64 if double else torch.float32


def allocate_gradients(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    need_student: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised gradients, [0] without need.

    That of the student in its dtype and layout; those of weight and bias in the type they are
    summed in.
    """
    device, dtype = student.device, arithmetic(student, teacher)
    nothing = (0,)
    features = teacher.shape[-1:]
    return (
        like_rows(student)
        if need_student
        else torch.empty(nothing, dtype=student.dtype, device=device),
        torch.empty(
            weight.shape if need_weight and weight is not None else nothing,
            dtype=dtype,
            device=device,
        ),
        torch.empty(features if need_bias else nothing, dtype=dtype, device=device),
    )


def allocate(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    reduction: str,
    need_student: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised outputs of `hint_fwd`.

    loss: [] or [...] (reduction "none"). grad_scale: float32 [1] where the student is float16,
    whose gradients keep 1 / divisor out, else [0].
    """
    dtype, device = arithmetic(student, teacher), student.device
    shape = student.shape[:-1] if reduction == "none" else ()
    needs = (need_student, need_weight, need_bias)
    scaled = any(needs) and student.dtype is torch.float16
    return (
        torch.empty(shape, dtype=dtype, device=device),
        *allocate_gradients(student, teacher, weight, *needs),
        torch.empty(1 if scaled else 0, dtype=torch.float32, device=device),
    )


def _forward(student: Tensor, *args: object) -> tuple[Tensor, ...]:
    with torch.autocast(student.device.type, enabled=False):
        return launcher(args[-1]).hint_fwd(student, *args[:-1])  # type: ignore[arg-type]


def _gradients(student: Tensor, *args: object) -> tuple[Tensor, ...]:
    with torch.autocast(student.device.type, enabled=False):
        return launcher(args[-1]).hint_grad(student, *args[:-1])  # type: ignore[arg-type]


def _backward(
    grad: Tensor, grad_scale: Tensor, grad_output: Tensor, dtype: torch.dtype, backend: str
) -> Tensor:
    return launcher(backend).hint_bwd(grad, grad_scale, grad_output, dtype)


def _backward_(grad: Tensor, grad_scale: Tensor, grad_output: Tensor, backend: str) -> None:
    launcher(backend).hint_bwd_(grad, grad_scale, grad_output)


for _key in ("CPU", "CUDA"):
    _library.impl("hint_fwd", _forward, _key)
    _library.impl("hint_grad", _gradients, _key)
    _library.impl("hint_bwd", _backward, _key)
    _library.impl("hint_bwd_", _backward_, _key)


@torch.library.register_fake("fastdistill::hint_fwd", lib=_library)
def _forward_fake(
    student: Tensor, teacher: Tensor, weight: Tensor | None, *args: object
) -> tuple[Tensor, ...]:
    reduction, _, *needs, _ = args[7:]
    return allocate(student, teacher, weight, str(reduction), *map(bool, needs))


@torch.library.register_fake("fastdistill::hint_grad", lib=_library)
def _gradients_fake(
    student: Tensor, teacher: Tensor, weight: Tensor | None, *args: object
) -> tuple[Tensor, ...]:
    return allocate_gradients(student, teacher, weight, *map(bool, args[7:10]))


@torch.library.register_fake("fastdistill::hint_bwd", lib=_library)
def _backward_fake(
    grad: Tensor, grad_scale: Tensor, grad_output: Tensor, dtype: torch.dtype, backend: str
) -> Tensor:
    return torch.empty_like(grad, dtype=dtype)


@torch.library.register_fake("fastdistill::hint_bwd_", lib=_library)
def _backward_fake_(grad: Tensor, grad_scale: Tensor, grad_output: Tensor, backend: str) -> None:
    return None
