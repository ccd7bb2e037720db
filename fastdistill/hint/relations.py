"""Where a layer looks, not what it holds: attention transfer of feature maps, KL of attention.

Plain PyTorch, differentiated by autograd: attention is small beside the layers it comes from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill import _torch_private, _validate

# How far the sum of a row of probabilities may be from 1. Rounding alone moves it by 1e-6 (float32)
# and 4e-3 (bfloat16); dropout of p = 0.1 over n keys by about 0.33 / sqrt(n).
_SUM_BAND = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def attention_transfer(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    power: float = 2.0,
    squared: bool = False,
) -> Tensor:
    """Distance between the spatial attention maps of two feature maps (AT).

    Zagoruyko and Komodakis 2017, "Paying More Attention to Attention", equations 1 and 2: with the
    map Q = vec(sum over channels of |A|^power) of each image, the mean over the images of::

        || Q_S / ||Q_S||_2  -  Q_T / ||Q_T||_2 ||_2

    In the paper this is a layer's term in the sum that is weighted by beta / 2.

    Args:
        student_features: [N, C_s, H, W], or [N, C_s, ...] of any number of positions, of float32,
            bfloat16, float16 or float64.
        teacher_features: [N, C_t, H, W]; other channels are no obstacle, other sizes are. Gets no
            gradient.
        power: p >= 1 of the map: 1 is their F_sum, 2 their F_sum^2, which they use.
        squared: the mean over images and positions of the squared difference instead, as in the
            code that the authors published (with beta = 1000 there).

    Returns:
        A scalar, float32 (float64 if either input is); 0 without images or positions. Where a
        student's map equals the teacher's the gradient is 0, not NaN; a map of only zeros stays
        zeros. The size of the features, which the norms take out, does not overflow.

    Raises:
        TypeError, ValueError: the argument's name, what was expected and what came.
    """
    student = _validate.floating("student_features", student_features)
    teacher = _validate.floating("teacher_features", teacher_features).detach()
    if _validate.number("power", power) < 1:
        raise ValueError(f"power: expected a number >= 1, got {power}")
    _validate.boolean("squared", squared)
    if student.ndim < 3:
        raise ValueError(
            f"student_features: expected [N, C, H, W], got shape {list(student.shape)}"
        )
    wanted = (student.shape[0], *student.shape[2:])
    if teacher.ndim != student.ndim or (teacher.shape[0], *teacher.shape[2:]) != wanted:
        raise ValueError(
            f"teacher_features: expected shape {_but_channels(student)} (any number of channels), "
            f"got {list(teacher.shape)}; nothing is resized"
        )
    _validate.same_device("teacher_features", teacher, student.device, "student_features")
    wide = _accumulation(student, teacher)
    difference = _attention_map(student.to(wide), power) - _attention_map(teacher.to(wide), power)
    if squared:
        return difference.square().sum() / max(difference.numel(), 1)
    return torch.linalg.vector_norm(difference, dim=1).sum() / max(len(difference), 1)


def attention_kl(
    student_attention: Tensor, teacher_attention: Tensor, *, mask: Tensor | None = None
) -> Tensor:
    """KL divergence between the attention distributions of two layers.

    Wang et al. 2020, "MiniLM", equation 6: over all heads a and queries t, the mean of::

        KL(A^T[a, t] || A^S[a, t])

    Take the matrices before dropout. After it the rows are no distributions any more, and their
    divergence is large however well the student does (it stayed at 1.9 where 0.14 could be had).
    A row whose sum is not 1 is refused, which is where dropout can be seen. transformers returns
    the matrices after dropout: set attention dropout to 0, or the student to evaluation mode.

    Args:
        student_attention: [..., heads, queries, keys], probabilities over the keys, of float32,
            bfloat16, float16 or float64.
        teacher_attention: the same shape; gets no gradient. A key of probability 0, such as
            padding, adds nothing.
        mask: bool, [..., queries] (no dimension of the heads); True keeps the query.

    Returns:
        A scalar, float32 (float64 if either input is); 0 if no query is kept. A NaN in a row that
        is kept makes it NaN; +inf where the teacher attends to a key that the student gives 0.

    Raises:
        TypeError, ValueError: the argument's name, what was expected and what came. A row that
            does not sum to 1, or has a negative entry, raises for tensors on the CPU; on a GPU,
            where looking would synchronise, it makes the result NaN.
    """
    student = _validate.floating("student_attention", student_attention)
    teacher = _validate.floating("teacher_attention", teacher_attention).detach()
    if student.ndim < 3:
        raise ValueError(
            "student_attention: expected [..., heads, queries, keys], got shape "
            f"{list(student.shape)}"
        )
    if student.shape[-1] == 0:
        raise ValueError("student_attention: expected at least one key, got none")
    _validate.same_shape("teacher_attention", teacher, student.shape, "that of student_attention")
    _validate.same_device("teacher_attention", teacher, student.device, "student_attention")
    kept = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
    if mask is not None:
        _validate.tensor("mask", mask)
        if mask.dtype is not torch.bool:
            raise TypeError(f"mask: expected dtype torch.bool (True keeps), got {mask.dtype}")
        rows = (*student.shape[:-3], student.shape[-2])
        _validate.same_shape("mask", mask, rows, "[..., queries] of student_attention")
        _validate.same_device("mask", mask, student.device, "student_attention")
        kept = mask.unsqueeze(-2).expand(kept.shape)

    wide = _accumulation(student, teacher)
    # Selected before anything is computed: what a dropped row holds must not reach the gradient.
    p = torch.where(kept[..., None], teacher, 0).to(wide)
    q = torch.where(kept[..., None], student, 0).to(wide)
    spoilt = _spoilt("student_attention", q, kept, _SUM_BAND[student.dtype]) | _spoilt(
        "teacher_attention", p, kept, _SUM_BAND[teacher.dtype]
    )
    # 0 log 0 = 0; the quotient is left out where p = 0, else its gradient there would be NaN.
    positive = p != 0
    terms = torch.where(positive, p, 1).log() - torch.where(positive, q, 1).log()
    values = (p * terms).sum(-1).masked_fill(spoilt, float("nan"))
    return values.sum() / kept.sum().clamp(min=1)


def _spoilt(name: str, probabilities: Tensor, kept: Tensor, band: float) -> Tensor:
    """Rows that are kept and do not sum to 1; refused where that costs no synchronisation."""
    off = (probabilities.detach().sum(-1) - 1).abs()
    negative = (probabilities < 0).any(-1)
    spoilt = kept & ((off > band) | negative)  # a NaN compares False: it stays the row's own NaN
    if _torch_private.has_values(spoilt) and bool(spoilt.any()):
        if bool(negative.any()):
            raise ValueError(
                f"{name}: expected probabilities, >= 0; {int(negative.sum())} of {int(kept.sum())} "
                "rows have negative ones. Are they taken before the softmax?"
            )
        worst = float(off[spoilt].max())
        raise ValueError(
            f"{name}: expected probabilities, which sum to 1 over the keys; {int(spoilt.sum())} of "
            f"{int(kept.sum())} rows do not (off by up to {worst:.2g}). Were they taken after "
            "dropout? Set the attention dropout to 0, or the model to evaluation mode"
        )
    return spoilt


def _attention_map(features: Tensor, power: float) -> Tensor:
    """[N, positions], each row of norm 1."""
    x = features.flatten(2).abs()
    if x.numel() == 0:  # no largest element; the sum still leads to the features
        return x.sum(1)
    largest = x.detach().amax((1, 2), keepdim=True)
    x = x / torch.where(largest > 0, largest, 1.0)  # a power of it might overflow, or vanish
    return torch.nn.functional.normalize(x.pow(power).sum(1), dim=1)


def _accumulation(student: Tensor, teacher: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


def _but_channels(x: Tensor) -> str:
    sizes = list(map(str, x.shape))
    return f"[{', '.join([sizes[0], 'C', *sizes[2:]])}]"
