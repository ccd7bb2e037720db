"""The oracle of this room: plain differentiable PyTorch, no hand-written backward.

It is also the fallback on devices without a kernel and under functorch transforms. Autograd
differentiates it, so it checks the formulas of every kernel. Never edit it to match a kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill import _rows, _torch_private

L2_EPS = 1e-12
"""Of `F.normalize`."""

COSINE_EPS = 1e-8
"""Of `F.cosine_similarity`."""


def hint_loss(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    row_weight: Tensor | None,
    normalizer: Tensor | None,
    distance: str,
    student_norm: str,
    teacher_norm: str,
    reduction: str,
    divisor: float,
) -> Tensor:
    """The loss of features [..., D_s] and [..., D_t]; the arguments of `fastdistill::hint_fwd`."""
    double = torch.float64 in (student.dtype, teacher.dtype)
    dtype = torch.float64 if double else torch.float32
    if _torch_private.has_values(student):
        _rows.check_values(None, mask, row_weight, normalizer, 0, 0, dtype)
    scale = _rows.row_scale(
        student, None, mask, row_weight, normalizer, 0, reduction, divisor, dtype
    )
    # Dropped rows leave by select, on the inputs: a NaN there must not reach a gradient.
    keep = scale != 0
    s = torch.where(keep.unsqueeze(-1), student.to(dtype), 0.0)
    t = torch.where(keep.unsqueeze(-1), teacher.detach().to(dtype), 0.0)
    if weight is not None:
        s = F.linear(s, weight.to(dtype), None if bias is None else bias.to(dtype))
    row = DISTANCES[distance](NORMS[student_norm](s), NORMS[teacher_norm](t))
    row = torch.where(keep, row * scale, 0.0)
    return row if reduction == "none" else row.sum()


def _unit(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x / max(|x|, eps), whether |x| < eps). There eps is a constant, and 0 has a gradient."""
    square = (x * x).sum(-1, keepdim=True)
    short = square < eps * eps
    norm = torch.where(short, eps, torch.where(short, 1.0, square).sqrt())
    return x / norm, short


def _layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _l2(x: Tensor) -> Tensor:
    return _unit(x, L2_EPS)[0]


NORMS = {"none": lambda x: x, "layer_norm": _layer_norm, "l2": _l2}
"""name -> the transformation of features [..., D]."""


def _mse(s: Tensor, t: Tensor) -> Tensor:
    """FitNets' L2 hint, as a mean over the features (Romero et al. 2015, equation 3)."""
    return (s - t).square().mean(-1)


def _l1(s: Tensor, t: Tensor) -> Tensor:
    return ((s - t).abs() + _nan(s - t)).mean(-1)


def _smooth_l1(s: Tensor, t: Tensor) -> Tensor:
    return (F.smooth_l1_loss(s, t, reduction="none") + _nan(s - t)).mean(-1)


def _nan(d: Tensor) -> Tensor:
    """0, and at a NaN a NaN that has a gradient of NaN: torch's sign(NaN) is 0."""
    return torch.where(d.isnan(), d, 0.0).square()


def _cosine(s: Tensor, t: Tensor) -> Tensor:
    """1 - cos = |a - b|^2 / 2 for unit vectors a, b: as a difference it would cancel.

    A vector shorter than eps is no unit vector; it adds half of what its square is short of 1.
    """
    (a, s_short), (b, t_short) = _unit(s, COSINE_EPS), _unit(t, COSINE_EPS)
    row = (a - b).square().sum(-1)
    for x, short in ((a, s_short), (b, t_short)):
        row = row + torch.where(short.squeeze(-1), 1.0 - x.square().sum(-1), 0.0)
    return row / 2


DISTANCES = {"mse": _mse, "l1": _l1, "smooth_l1": _smooth_l1, "cosine": _cosine}
"""name -> D(s, t) of features [..., D]; [...]"""
