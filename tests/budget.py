"""The one error budget of the suite: judged by float64, allowed by the native-precision oracle.

Inputs are rounded to their dtype first and then promoted, so float64 judges the arithmetic alone.
A kernel may err by at most twice the error of the reference at the kernel's own precision, plus a
band for the rounding of the result.
"""

import torch
from torch import Tensor

ROUNDINGS = 2.0
"""Roundings of the result that are free, each eps / 2 of its dtype: one by the gradient in the
forward pass, one by the multiplication with grad_output."""

ACCUMULATED = 8.0
"""What float32 sums may lose beyond that, in eps of float32."""

FLOAT64 = 1e-11
"""Of a float64 result: its oracle has the same precision, so cancellation shows in both."""


def error(got: Tensor, want: Tensor) -> Tensor:
    """Norm of the error of each row (last dimension)."""
    return (got.double() - want.double()).norm(dim=-1)


def assert_within(name: str, got: Tensor, want: Tensor, native: Tensor) -> None:
    """`got` is as near to float64 as the budget allows, and non-finite places agree.

    Args:
        name: for the message.
        got: the kernel's result, in its own dtype.
        want: the oracle's, float64.
        native: the reference's result at the precision of `got`.
    """
    assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
    odd = ~want.isfinite()
    same = (got[odd].double() == want[odd]) | (got[odd].isnan() & want[odd].isnan())
    assert bool(same.all()), f"{name}: non-finite places differ"
    eps = ROUNDINGS / 2 * torch.finfo(got.dtype).eps + ACCUMULATED * torch.finfo(torch.float32).eps
    eps = FLOAT64 if got.dtype == torch.float64 else eps
    finite_got, finite_native = (torch.where(odd, 0.0, x.double()) for x in (got, native))
    want = torch.where(odd, 0.0, want)
    scale = want.norm(dim=-1)
    tiny = torch.finfo(got.dtype).tiny * want.shape[-1]
    # The native error of one row may be small by luck: the worst one counts for all.
    native_error = error(finite_native, want)
    worst = (native_error / scale.clamp_min(tiny)).max() if want.numel() else 0.0
    allowed = 2 * torch.maximum(native_error, worst * scale) + eps * scale + tiny
    excess = error(finite_got, want) / allowed
    assert bool((excess <= 1).all()), f"{name}: {float(excess.max()):.3g} times the error allowed"
