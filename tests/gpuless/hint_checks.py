"""hint_loss on a GPU backend that runs on the CPU, against the reference: for the tests of the
interpreter and of the emulator.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

import fastdistill

F32, F64 = torch.float32, torch.float64


def features(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def run(
    backend: str, s: Any, t: Any, w: Any = None, b: Any = None, go: Any = None, **kw: Any
) -> Any:
    leaves = [None if x is None else x.detach().requires_grad_() for x in (s, w, b)]
    with fastdistill.backend(backend):
        loss = fastdistill.hint_loss(leaves[0], t, proj_weight=leaves[1], proj_bias=leaves[2], **kw)
    loss.backward(torch.full_like(loss, 512.0) if go is None else go.to(loss.dtype))
    return [loss.detach(), *(x.grad for x in leaves if x is not None)]


def check(
    backend: str, s: Any, t: Any, w: Any = None, b: Any = None, go: Any = None, **kw: Any
) -> list[Any]:
    got = run(backend, s, t, w, b, go, **kw)
    wide = [None if x is None else x.double() for x in (s, t, w, b)]
    want = run("reference", *wide, go, **kw)
    native = run("reference", s, t, w, b, go, **kw)
    eps = 0.0 if s.dtype in (F32, F64) else 1.1 * torch.finfo(s.dtype).eps
    for i, (g, x, n) in enumerate(zip(got, want, native, strict=True)):
        assert torch.equal(g.isnan(), x.isnan())
        g, x, n = (y.double().nan_to_num() for y in (g, x, n))
        band = (eps if i else 0.0) + 32 * 2.0 ** (-52 if s.dtype is F64 else -23)
        assert (g - x).norm() <= 2 * (n - x).norm() + band * x.norm() + 1e-30, (i, kw)
    return got


def check_projected_in_blocks(
    backend: str, dtype: torch.dtype, distance: str, narrow: int, wide: int
) -> None:
    """Rows that are dropped, and not finite, reach no gradient; blocks end inside a sentence."""
    for norm, reduction in itertools.product((None, "layer_norm"), ("mean", "none")):
        s, t = features(5, 20, narrow, dtype=dtype), features(5, 20, wide, dtype=dtype)
        w, b = features(wide, narrow, dtype=dtype) / narrow**0.5, features(wide, dtype=dtype)
        mask = torch.rand(5, 20) > 0.4
        s[~mask], t[~mask] = float("nan"), float("inf")
        go = torch.randn(5, 20) * 64 if reduction == "none" else None
        settings = {"distance": distance, "feature_norm": norm, "reduction": reduction}
        got = check(backend, s, t, w, b, go, mask=mask, **settings)
        assert (got[1][~mask] == 0).all() and all(x.isfinite().all() for x in got)
