"""What noisy sums over teachers guarantee, as checks of any implementation (privacy_checks.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from privacy_checks import (
    BF16,
    F16,
    F32,
    F64,
    assert_normal,
    chacha20,
    correlated,
    mu_lower_bound,
    norm,
    philox,
)
from torch import Tensor

from fastdistill.privacy import mechanism, reference, source
from fastdistill.privacy.source import Source

SUMS = ("softmax", "gradient")
REACH = {"softmax": math.sqrt(2), "gradient": 2.0}  # sensitivity of a row, in clip norms


class Teachers(NamedTuple):
    """A way to make both sums of given random bits, and the modules it is made of."""

    run_softmax: Callable[..., Tensor]
    run_gradient: Callable[..., Tensor]
    run_clipped: Callable[..., list[Tensor]]
    mechanism: ModuleType = mechanism

    def sum(
        self,
        kind: str,
        teachers: Sequence[Tensor],
        noise: float = 0.0,
        bits: Source | None = None,
        temperature: float = 1.0,
        max_norm: float = 1.0,
    ) -> Tensor:
        """`noisy_softmax_sum` or `noisy_gradient_sum` on the same bits each time."""
        bits = bits or (philox(1) if noise else source.silent())
        teachers, classes = list(teachers), teachers[0].shape[-1]
        if kind == "softmax":
            planned = self.mechanism.plan_answers(noise, classes)
            return self.run_softmax(teachers, temperature, planned, bits)
        single = teachers[0].dtype is not F64
        planned = self.mechanism.plan(max_norm, noise, 1.0, classes, single)
        return self.run_gradient(teachers, planned, bits)


def of_backend(name: str) -> Teachers:
    """The reference, or the ops under a compiled backend."""
    if name == "reference":
        return of_module(reference)
    ops = torch.ops.fastdistill
    return Teachers(
        lambda x, t, planned, bits: ops.noisy_softmax_sum(x, t, *planned, *bits, name),
        lambda x, planned, bits: ops.noisy_gradient_sum(x, *planned, *bits, name),
        lambda x, planned, bits: ops.clip_and_noise(x, *planned, *bits, name),
    )


def of_module(module: ModuleType, of: ModuleType = mechanism) -> Teachers:
    """A reference, perhaps a broken one."""
    return Teachers(module.noisy_softmax_sum, module.noisy_gradient_sum, module.clip_and_noise, of)


def formula(kind: str, teachers: Sequence[Tensor], temperature: float, max_norm: float) -> Tensor:
    """In float64, without noise."""
    if kind == "softmax":
        return sum(torch.softmax(x.double() / temperature, 1) for x in teachers)
    rows = [x.double() for x in teachers]
    return sum(x * (max_norm / (x.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1) for x in rows)


def check_values(of: Teachers) -> None:
    """Without noise: the formulas, in every dtype, at odd widths and extreme temperatures."""
    for dtype in (F64, F32, BF16, F16):
        for k, n, c in ((1, 1, 1), (3, 4, 7), (2, 150, 13), (2, 2, 4101)):
            teachers = list((torch.randn(k, n, c) * 4).to(dtype))
            for kind in SUMS:
                got = of.sum(kind, teachers, temperature=2.5, max_norm=0.8)
                want = formula(kind, teachers, 2.5, 0.8)
                assert got.dtype is (F64 if dtype is F64 else F32)
                relative = 1e-12 if dtype is F64 else 2e-7  # C gives up that much
                torch.testing.assert_close(got.double(), want, rtol=relative, atol=1e-15)
    logits = [torch.tensor([[3.0, -1e30, 3.0, 2.0]], dtype=F64)]
    for temperature in (2.0**-64, 1e-3, 1e3, 2.0**64):
        got = of.sum("softmax", logits, temperature=temperature)
        want = formula("softmax", logits, temperature, 1.0)
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-300)


def unlucky_answers(classes: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Other teachers, and two rows of one more: as far apart after rounding as can be.

    The others' sum lies on halves of the grid h, so that the smallest contribution tips it.
    """
    m = mechanism.plan_answers(1.0, classes)
    half = m.grid / 2 / m.clip  # contributes h / 2
    rest = 1 - (classes - 2) * half
    others = torch.tensor([[rest / 2] * 2 + [half] * (classes - 2)], dtype=F64)
    one = torch.tensor([[1.0, 0] + [0] * (classes - 2)], dtype=F64)
    two = torch.tensor([[0, 1.0] + [m.fine] * (classes - 2)], dtype=F64)
    return [others.log()], *(x.log().clamp(min=-1e3) for x in (one, two))


def rows_of_teacher(kind: str, dtype: torch.dtype) -> list[Tensor]:
    """Rows [1, 6] that are as far apart as rounding lets them; some are not finite."""
    eps = torch.finfo(dtype).eps
    eye = torch.eye(6, dtype=F64)
    far = torch.finfo(dtype).max / 8
    rows = [eye[:1] * far, eye[1:2] * far, eye[:1] * 30, eye[2:3] * 9, torch.zeros(1, 6)]
    rows += [torch.randn(1, 6, dtype=F64) * s for s in (0.1, 1, 20)]
    rows += [torch.full((1, 6), math.nan), torch.tensor([[1.0, math.inf, 0, 0, 0, 0]])]
    if kind == "gradient":
        rows += [-rows[0], -rows[3], eye[:1] * (1 + eps), -eye[:1] * (1 + eps)]
        rows += [torch.full((1, 6), s, dtype=F64) for s in (1e-3, 1.0, -1.0, 1e3)]
    return [x.to(dtype) for x in rows]


def check_sensitivity(of: Teachers) -> None:
    """One teacher's row, changed in any way, moves the sum by no more than is said."""
    for kind in SUMS:
        bound = REACH[kind]
        for dtype in (F64, F32, BF16, F16):
            others = [torch.randn(1, 6).to(dtype) for _ in range(3)]
            rows = rows_of_teacher(kind, dtype)
            for noise in (0.5, 3.0):
                sums = [of.sum(kind, [*others, x], noise) for x in rows]
                rounded = 0 if dtype is F64 else 2.0**-23 * 2 * max(norm(s) for s in sums)
                apart = [norm(a - b) for i, a in enumerate(sums) for b in sums[:i]]
                assert max(apart) <= bound + rounded, (kind, dtype, noise)
                assert max(apart) >= 0.998 * bound, "the search has not found its worst rows"
    for classes in (16, 64):
        others, one, two = unlucky_answers(classes)
        a, b = (of.sum("softmax", [*others, x], 1.0) for x in (one, two))
        assert norm(a - b) <= math.sqrt(2), classes


def check_order(of: Teachers) -> None:
    """Sums are exact: the order of the teachers does not show in any bit."""
    for dtype in (F64, F32):
        teachers = [(torch.randn(20, 50) * 3).to(dtype) for _ in range(9)]
        for kind in SUMS:
            want = of.sum(kind, teachers, 1.0)
            assert torch.equal(of.sum(kind, teachers[::-1], 1.0), want), kind


def check_not_finite(of: Teachers) -> None:
    """A row with a NaN or an infinity contributes zero; the rows beside it stay."""
    for bad in (math.nan, math.inf, -math.inf):
        for dtype in (F64, F32, BF16, F16):
            teachers = [torch.randn(5, 9).to(dtype) for _ in range(3)]
            spoilt = [x.clone() for x in teachers]
            spoilt[1][2, 8] = bad
            for kind in SUMS:
                for noise in (0.0, 1.0):
                    got, all_of_them = of.sum(kind, spoilt, noise), of.sum(kind, teachers, noise)
                    without = of.sum(kind, [teachers[0], teachers[2]], noise)
                    assert torch.equal(got[2], without[2]), (kind, bad)
                    kept = [0, 1, 3, 4]
                    assert torch.equal(got[kept], all_of_them[kept]), (kind, bad)


def check_noise(of: Teachers) -> None:
    """Its law, whatever the teachers say; rows and classes are independent."""
    for kind in SUMS:
        for bits in (philox(3), chacha20(3)):
            teachers = [torch.zeros(4000, 25)] * 2
            quiet = of.sum(kind, teachers)
            z = (of.sum(kind, teachers, 1.5, bits, max_norm=0.5) - quiet) / 1.5
            z = z * 2 if kind == "gradient" else z
            assert_normal(z)
            for lag in (1, 16, 25, 32, 128):
                assert not correlated(z.flatten()[lag:], z.flatten()[:-lag]), lag


def check_purposes(of: Teachers) -> None:
    """Three ops with equal random bits share no noise."""
    for bits in (philox(4), chacha20(4)):
        draws = [of.sum(kind, [torch.zeros(50, 100)], 1e3, bits) for kind in SUMS]
        planned = of.mechanism.plan(1.0, 1e3, 1.0, 5000, True)
        draws += of.run_clipped([torch.zeros(0, 50, 100)], planned, bits)
        for i, a in enumerate(draws):
            assert not any(correlated(a, b) for b in draws[:i])


def check_audit(of: Teachers) -> None:
    """White-box audit in Gaussian DP: what one teacher's rows show is near mu, never beyond."""
    rows, sigma = 60_000, 1.2
    one, two = torch.tensor([[40.0, 0.0]]), torch.tensor([[0.0, 40.0]])
    for kind in SUMS:
        if kind == "gradient":
            two = -one
        other = torch.randn(1, 2)
        scores = []
        for stream, mine in enumerate((one, two)):
            teachers = [x.expand(rows, 2).contiguous() for x in (other, mine)]
            got = of.sum(kind, teachers, sigma, philox(stream + 9)).double()
            scores.append(got[:, 0] - got[:, 1] if kind == "softmax" else got[:, 0])
        middle = float(torch.cat(scores).mean())
        mu = REACH[kind] / sigma
        width = sigma * (math.sqrt(2) if kind == "softmax" else 1.0)
        present, absent = ((s - middle) / width + mu / 2 for s in scores)
        assert_audit(present, absent, mu)


def assert_audit(present: Tensor, absent: Tensor, mu: float) -> None:
    """What the scores refute is near mu, not beyond."""
    found = mu_lower_bound(present, absent)
    assert 0.85 * mu <= found <= mu, (found, mu)


CHECKS = [
    check_values, check_sensitivity, check_order, check_not_finite, check_noise, check_purposes,
    check_audit,
]  # fmt: skip
