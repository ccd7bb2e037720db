"""The oracle of this room: plain differentiable PyTorch, no hand-written backward.

It is also the fallback on devices without a kernel and under functorch transforms. Autograd
differentiates it, so it checks the formulas of every kernel. Never edit it to match a kernel.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill import _rows, _torch_private
from fastdistill.kd import rows

NEAR = 0.1
"""|u| below which p (exp(u) - 1 - u) is summed as a series: as a difference it would cancel."""

_SERIES = [1 / math.factorial(n) for n in range(2, 13)]
"""exp(v) - 1 - v over v^2: enough for float64 and two derivatives at |v| < NEAR."""


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    row_weight: Tensor | None,
    normalizer: Tensor | None,
    temperature: float,
    hard_weight: float,
    soft_weight: float,
    divergence: str,
    scale_t2: bool,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    divisor: float,
    row_temperature: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, hard, soft) of logits [..., V]; the arguments of the op `fastdistill::kd_fwd`, and
    `row_temperature` [...], which takes the place of the number.
    """
    double = torch.float64 in (student.dtype, teacher.dtype)
    dtype = torch.float64 if double else torch.float32
    readable = _torch_private.has_values(student)
    if readable:
        _rows.check_values(
            labels, mask, row_weight, normalizer, student.shape[-1], ignore_index, dtype
        )
    scale = _rows.row_scale(
        student, labels, mask, row_weight, normalizer, ignore_index, reduction, divisor, dtype
    )
    # Dropped rows leave by select, on the inputs: a NaN there must not reach the gradient.
    keep = (scale != 0).unsqueeze(-1)
    s = torch.where(keep, student.to(dtype), 0.0)
    t = torch.where(keep, teacher.detach().to(dtype), 0.0)

    of_class: float | Tensor = temperature  # T as it meets [..., V], and as it meets [...]
    of_row: float | Tensor = temperature
    if row_temperature is not None:
        kept = torch.where(keep.squeeze(-1), row_temperature, 1.0)
        if readable:
            _rows.check_temperature(kept)
        of_row = _rows.valid_temperature(kept).to(dtype)
        of_class = of_row.unsqueeze(-1)

    hard = soft = torch.zeros_like(scale)
    if hard_weight != 0:
        assert labels is not None  # api.py has refused the call otherwise
        hard = _hard(s, labels, label_smoothing)
    if soft_weight != 0:
        soft = DIVERGENCES[divergence](s, t, of_class)
        if scale_t2:
            soft = soft * of_row**2
    if hard_weight == 0 and soft_weight == 0:  # a loss of nothing is 0, and differentiable
        soft = (s * 0).nan_to_num().sum(-1)
    loss, hard, soft = rows.reduce_rows(hard, soft, scale, hard_weight, soft_weight, reduction)
    return loss, hard.detach(), soft.detach()


def _hard(s: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """CE(labels, softmax(s)) of each row. A label that is no class counts as 0: its row is out."""
    classes = s.shape[-1]
    valid = (labels >= 0) & (labels < classes)
    safe = torch.where(valid, labels, 0).reshape(-1)
    row = F.cross_entropy(
        s.reshape(-1, classes), safe, reduction="none", label_smoothing=label_smoothing
    )
    return row.reshape(labels.shape)


def _over(x: Tensor, temperature: float | Tensor) -> Tensor:
    """X / T. What is infinite stays so at every T, and has no part in the gradient of a tensor T:
    0 times infinity would make it NaN.
    """
    if not isinstance(temperature, Tensor):
        return x / temperature
    odd = ~x.isfinite()
    return torch.where(odd, x / temperature.detach(), torch.where(odd, 0.0, x) / temperature)


def _ratio(s: Tensor, t: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q = softmax(s/T), p = softmax(t/T) and u = log q - log p, each [..., V].

    u is formed by differencing the logits first: as the difference of two log-softmaxes it loses
    8 % of the divergence at teacher = student + 1e-5.
    """
    m_s, m_t = s.detach().amax(-1, keepdim=True), t.amax(-1, keepdim=True)
    e_s = _over(s - m_s, temperature).exp()
    e_t = _over(t - m_t, temperature).exp()
    z_s, z_t = e_s.sum(-1, keepdim=True), e_t.sum(-1, keepdim=True)
    u = _over((s - t) - (m_s - m_t), temperature) - torch.log1p((z_s - z_t) / z_t)
    return e_s / z_s, e_t / z_t, u


def _bregman(p: Tensor, q: Tensor, u: Tensor) -> Tensor:
    """P (exp(u) - 1 - u) = q - p - p u of each class, u = log(q / p): never negative, 0 at u = 0.

    p = 0 leaves q, which makes the sum over the classes a divergence of unnormalised measures:
    equal to KL(p || q) when both sum to 1, and a sum of terms >= 0.
    """
    near = u.abs() < NEAR
    v = torch.where(near, u, 0.0)
    series = torch.zeros_like(v)
    for coefficient in reversed(_SERIES):
        series = series * v + coefficient
    out = p == 0
    far = torch.where(near | out, 0.0, u)
    return torch.where(out, q, torch.where(near, p * v * v * series, (q - p) - p * far))


def _forward_kl(s: Tensor, t: Tensor, temperature: float | Tensor) -> Tensor:
    """KL(p || q) = sum p log(p / q), p the teacher's and q the student's distribution."""
    q, p, u = _ratio(s, t, temperature)
    return _bregman(p, q, u).sum(-1)


def _reverse_kl(s: Tensor, t: Tensor, temperature: float | Tensor) -> Tensor:
    """KL(q || p) = sum q log(q / p). Where it is infinite its gradient is NaN for the whole row."""
    q, p, u = _ratio(s, t, temperature)
    row = _bregman(q, p, -u).sum(-1)
    infinite = row.isinf()
    zero = (torch.where(s.isfinite(), s, 0.0) * 0).sum(-1)
    nan_gradient = (zero + ~infinite).sqrt()  # sqrt'(0) 0 is NaN
    return torch.where(infinite, row + nan_gradient, row)


def _cross_entropy(s: Tensor, t: Tensor, temperature: float | Tensor) -> Tensor:
    """H(p, q) = - sum p log q: the soft-target term of the textbook."""
    m = s.detach().amax(-1, keepdim=True)
    x = _over(s - m, temperature)
    surprise = x.exp().sum(-1, keepdim=True).log() - x
    p = torch.softmax(_over(t, temperature), -1)
    out = p == 0
    return torch.where(out, 0.0, p * torch.where(out, 0.0, surprise)).sum(-1)


DIVERGENCES = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "cross_entropy": _cross_entropy,
}
"""name -> D(s, t, temperature) for student and teacher logits [..., V]; [...]"""
