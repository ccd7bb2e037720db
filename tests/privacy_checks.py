"""What a private release guarantees, as checks of any implementation.

The suites of values, noise and edges run them on every backend; test_privacy_mutations.py runs
them on broken implementations, each of which has to fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

import fastdistill as fd
from fastdistill.privacy import mechanism, reference, source
from fastdistill.privacy.source import Source

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
NORMAL = NormalDist()
Z = 5.2  # two-sided p = 2e-7


class Implementation(NamedTuple):
    """A way to make a release of given random bits, and the modules it is made of."""

    name: str
    run: Callable[[Sequence[Tensor], mechanism.Mechanism, Source], list[Tensor]]
    mechanism: ModuleType = mechanism
    source: ModuleType = source
    reference: ModuleType = reference

    def release(
        self,
        samples: Sequence[Tensor],
        max_norm: float = 1.0,
        sigma: float = 0.0,
        expected: float = 1.0,
        bits: Source | None = None,
    ) -> list[Tensor]:
        """`clip_and_noise` on the same bits each time."""
        planned = self.mechanism.plan(
            max_norm,
            sigma,
            expected,
            sum(x.shape[1:].numel() for x in samples),
            any(x.dtype is not F64 for x in samples),
        )
        return self.run(samples, planned, bits or (philox(1) if sigma else source.silent()))


def of_backend(name: str) -> Implementation:
    """The reference, or the op under a compiled backend."""

    def run(samples: Sequence[Tensor], planned: mechanism.Mechanism, bits: Source) -> list[Tensor]:
        return torch.ops.fastdistill.clip_and_noise(list(samples), *planned, *bits, name)

    return Implementation(name, reference.clip_and_noise if name == "reference" else run)


def philox(stream: int, seed: int = 7) -> Source:
    """A stream of Philox for tests."""
    return Source(source.PHILOX, torch.tensor([seed, 1, 0, 0, 0, 0, 0, 0]), stream)


def chacha20(stream: int, seed: int = 7) -> Source:
    """A stream of ChaCha20 whose key is known."""
    return Source(source.CHACHA20, torch.arange(8) * 0x01010101 + seed, stream)


def gradients(*shapes: tuple[int, ...], dtype: torch.dtype = F64, scale: float = 1.0):
    """Per-sample gradients whose norms lie on both sides of 1."""
    batch = shapes[0][0]
    size = torch.logspace(-2, 2, max(batch, 1), dtype=F64)[:batch]
    coordinates = sum(math.prod(s[1:]) for s in shapes)
    size = size * scale / math.sqrt(max(coordinates, 1))
    return [
        (torch.randn(s, dtype=F64) * size.view(-1, *(1,) * (len(s) - 1))).to(dtype) for s in shapes
    ]


def formula(samples: Sequence[Tensor], max_norm: float, expected: float) -> list[Tensor]:
    """Micro-batches of one, in float64, as Opacus defines them."""
    total = [torch.zeros(x.shape[1:], dtype=F64) for x in samples]
    for i in range(samples[0].shape[0]):
        one = [x[i].double() for x in samples]
        norm = torch.cat([g.flatten() for g in one]).norm()
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for t, g in zip(total, one, strict=True):
            t += factor * g
    return [t / expected for t in total]


def norm(*tensors: Tensor) -> float:
    """Joint norm, in float64 and never below the exact one by more than 1e-15 of it."""
    return math.sqrt(math.fsum(v * v for x in tensors for v in x.double().flatten().tolist()))


def check_formula(of: Implementation) -> None:
    """Without noise: Opacus's formula."""
    samples = gradients((9, 3, 5), (9, 257), (9,))
    for got, want in zip(
        of.release(samples, 0.7, 0.0, 16.0), formula(samples, 0.7, 16.0), strict=True
    ):
        assert norm(got - want) <= 1e-10 * norm(want)


def single_records(dtype: torch.dtype) -> list[tuple[float, list[Tensor]]]:
    """(C, one record over three tensors) made to reach as far beyond C as rounding lets them."""
    eps = torch.finfo(dtype).eps
    out = []
    for size in (1.0, 1 + eps, 1e3, torch.finfo(dtype).max / 8):
        for shape in ((1,), (50,)):
            joint = [torch.full((1, *shape), size, dtype=F64) for _ in range(3)]
            out.append((1.0, joint))
            out.append((0.3, [-joint[0], joint[1] * 0.9, joint[2] * 0.1]))
    lonely = [torch.full((1, 1), 1e4), torch.zeros(1, 2), torch.zeros(1, 0)]
    out.append((1 + 2.0**-24 + 2.0**-30, lonely))  # rounds up to 1 + 2^-23 in float32
    out += [(float(c), [torch.randn(1, 40) * 9 for _ in range(3)]) for c in torch.rand(20) + 0.5]
    out.append((1e-12, [torch.full((1, 7), 1e-4), torch.full((1, 1), 2e-4), torch.ones(1, 1)]))
    # On a grid of 1, just above a half in each of four coordinates.
    out.append((3001.2, [torch.full((1, 4), 1500.51), torch.zeros(1, 0), torch.zeros(1, 0)]))
    return [(c, [x.to(dtype) for x in record]) for c, record in out]


def check_sensitivity(of: Implementation) -> None:
    """No record adds more than C, in any dtype, with noise and its grid or without."""
    for dtype in (F64, F32, BF16, F16):
        for c, record in single_records(dtype):
            assert norm(*of.release(record, c)) <= c, (dtype, c)
            # The other records of the batch; with them, and without this one.
            others = [torch.randn(3, *x.shape[1:]).to(dtype) * c for x in record]
            for sigma in (0.5, 3.0):
                alone = of.release(others, c, sigma)
                joined = [torch.cat([o, x]) for o, x in zip(others, record, strict=True)]
                both = of.release(joined, c, sigma)
                # Differences of float64 results are exact; float32 ones were rounded afterwards.
                rounded = 0 if dtype is F64 else 2.0**-23 * max(norm(*alone), norm(*both))
                apart = norm(*(a - b for a, b in zip(alone, both, strict=True)))
                assert apart <= c + rounded, (dtype, c, sigma)


def check_order(of: Implementation) -> None:
    """The sum is exact: neither the order of the samples nor what cancels shows in it."""
    grid = of.mechanism.plan(1.0, 1.0, 1.0, 4, False).grid
    parts = torch.tensor([0.9, 2.0**-56, -0.9, grid / 2], dtype=F64)
    samples = torch.cat([parts.view(4, 1), torch.zeros(4, 3, dtype=F64)], 1)
    want = of.release([samples], 1.0, 1.0)[0]
    for order in ([0, 2, 1, 3], [3, 2, 1, 0], [1, 3, 0, 2]):
        assert torch.equal(of.release([samples[order]], 1.0, 1.0)[0], want)
    samples = gradients((11, 300), dtype=F32)[0]
    want = of.release([samples], 1.0, 1.0)[0]
    assert torch.equal(of.release([samples.flip(0)], 1.0, 1.0)[0], want)


def check_replay(of: Implementation) -> None:
    """Neighbours under the same noise differ by the record alone: the batch's size is no input."""
    samples = gradients((8, 33), (8, 4, 4))
    for sigma in (0.0, 1.0):
        with_it = of.release(samples, 1.0, sigma, 50.0)
        padded = [torch.cat([x, torch.zeros(9, *x.shape[1:], dtype=F64)]) for x in samples]
        for a, b in zip(with_it, of.release(padded, 1.0, sigma, 50.0), strict=True):
            assert torch.equal(a, b), "records of zeros changed the result"
        without = of.release([x[:-1] for x in samples], 1.0, sigma, 50.0)
        only = formula([x[-1:] for x in samples], 1.0, 50.0)
        for a, b, w in zip(with_it, without, only, strict=True):
            assert norm(a - b - w) <= 2e-3 * norm(w) + 2e-3 * (sigma > 0) / 50
    empty = [x[:0] for x in samples]
    for noise, a, total in zip(
        of.release(empty, 1.0, 1.0, 50.0),
        of.release(samples, 1.0, 1.0, 50.0),
        formula(samples, 1.0, 50.0),
        strict=True,
    ):
        assert norm(a - noise - total) <= 1e-2 * norm(total)


def check_not_finite(of: Implementation) -> None:
    """A record with a NaN or an infinity anywhere contributes exactly zero."""
    for bad in (math.nan, math.inf, -math.inf):
        for dtype in (F64, F32, BF16, F16):
            samples = gradients((6, 40), (6, 3), dtype=dtype)
            clean = [torch.cat([x[:2], x[3:]]) for x in samples]
            for where in (0, 1):
                spoilt = [x.clone() for x in samples]
                spoilt[where][2, 1] = bad
                for sigma in (0.0, 1.0):
                    got, want = of.release(spoilt, 1.0, sigma), of.release(clean, 1.0, sigma)
                    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def assert_normal(x: Tensor) -> None:
    """Standard normal: mean, variance, Kolmogorov-Smirnov, fourth moment; at p below 1e-6."""
    x = x.double().flatten()
    n = x.numel()
    assert abs(float(x.mean())) * math.sqrt(n) < Z
    assert abs(float(x.square().sum()) - n) < Z * math.sqrt(2 * n), "variance"
    assert abs(float(x.pow(4).mean()) - 3) < Z * math.sqrt(96 / n)
    cdf = torch.special.ndtr(x.sort().values)
    steps = torch.arange(n + 1, dtype=F64) / n
    distance = torch.maximum(cdf - steps[:-1], steps[1:] - cdf).max()
    assert float(distance) * math.sqrt(n) < math.sqrt(-math.log(0.5e-6) / 2), "distribution"


def correlated(x: Tensor, y: Tensor) -> bool:
    """Whether the correlation of two samples of equal length is significant."""
    x, y = x.double().flatten(), y.double().flatten()
    return abs(float((x * y).sum() / x.norm() / y.norm())) * math.sqrt(x.numel()) > Z


def check_noise(of: Implementation) -> None:
    """Its law is N(0, (sigma C / expected)^2) whatever the batch; tensors are independent."""
    c, sigma, expected = 0.5, 1.5, 20.0
    for bits in (philox(3), chacha20(3)):
        for batch in (0, 40):
            samples = [torch.zeros(batch, 100_000), torch.zeros(batch, 250, 400, dtype=F64)]
            first, second = of.release(samples, c, sigma, expected, bits)
            unit = sigma * c / expected
            assert_normal(first / unit)
            assert_normal(second / unit)
            assert not correlated(first, second), "two tensors share noise"
            for lag in (1, 16, 32, 128):
                assert not correlated(first[lag:], first[:-lag]), lag


def check_streams(of: Implementation) -> None:
    """One draw for one release: calls, generators and processes never share a stream."""
    x = [torch.zeros(0, 5000)]
    draws = [of.release(x, 1.0, 1.0, 1.0, of.source.secure())[0] for _ in range(3)]
    other = of.source._Secure()
    draws.append(of.release(x, 1.0, 1.0, 1.0, other.next())[0])
    of.source._after_fork()
    draws.append(of.release(x, 1.0, 1.0, 1.0, of.source.secure())[0])
    generator = torch.Generator().manual_seed(5)
    draws += [of.release(x, 1.0, 1.0, 1.0, of.source.seeded(generator))[0] for _ in range(3)]
    another = torch.Generator().manual_seed(6)
    draws.append(of.release(x, 1.0, 1.0, 1.0, of.source.seeded(another))[0])
    assert not torch.equal(of.source.seeded(generator).key, of.source.seeded(another).key)
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert not correlated(a, b)


def check_tail(of: Implementation) -> None:
    """The radius goes as far as 64 bits do."""
    for words, want in (
        ((0, 0, 0, 0), math.sqrt(130 * math.log(2))),
        ((0xFFFFFFFF, 0xFFFFFFFF, 0, 0), 0.0),
    ):
        a, b = of.reference.box_muller(*(torch.tensor([w]) for w in words))
        assert math.isclose(math.hypot(float(a), float(b)), want, rel_tol=1e-14, abs_tol=1e-7)


def mu_lower_bound(present: Tensor, absent: Tensor) -> float:
    """The largest mu of Gaussian DP that the scores refute, at p = 1e-7 a threshold."""
    best = 0.0
    for threshold in torch.linspace(-1, 4, 11).tolist():
        rates = []
        for scores, sign in ((present, -1), (absent, 1)):
            n, rate = scores.numel(), float((scores > threshold).double().mean())
            bound = rate + sign * Z * math.sqrt(max(rate * (1 - rate), 1 / n) / n)
            rates.append(min(max(bound, 1e-9), 1 - 1e-9))
        best = max(best, NORMAL.inv_cdf(rates[0]) - NORMAL.inv_cdf(rates[1]))
    return best


def check_audit(of: Implementation) -> None:
    """White-box audit in Gaussian DP: what canaries show is near 1 / sigma and never beyond.

    Each canary is a record of norm C: alone on a coordinate, or on one in each of two tensors,
    whose difference is free of noise if the tensors share a counter.
    """
    sigma, rounds, present, coordinates = 1.0, 160, 128, 1024
    in_one = torch.eye(coordinates)[:present] * 10
    nothing = torch.zeros_like(in_one)
    alone, across = [], []
    for k in range(rounds):
        alone.append(of.release([in_one, nothing], 1.0, sigma, 1.0, philox(2 * k))[0])
        a, b = of.release([in_one, -in_one], 1.0, sigma, 1.0, philox(2 * k + 1))
        across.append((a - b) / math.sqrt(2))
    for scores in (torch.stack(alone), torch.stack(across)):
        mu = mu_lower_bound(scores[:, :present].flatten(), scores[:, present:].flatten())
        assert 0.85 / sigma <= mu <= 1 / sigma, mu


CHECKS = [
    check_formula, check_sensitivity, check_order, check_replay, check_not_finite, check_noise,
    check_streams, check_tail, check_audit,
]  # fmt: skip


def call(backend: str, samples: Sequence[Tensor], *args: float, **options: object) -> list[Tensor]:
    """The public function under a backend."""
    with fd.backend(backend):
        return fd.privacy.clip_and_noise(samples, *args, **options)
