"""clip_and_noise: its values, the bound on what a sample adds, layouts, threads."""

import math

import privacy_checks as checks
import pytest
import torch
from privacy_checks import BF16, F16, F32, F64, call, formula, gradients, norm, of_backend
from test_backend import python

from fastdistill.privacy import mechanism

U = {F32: 2.0**-24, BF16: 2.0**-24, F16: 2.0**-24, F64: 2.0**-53}


@pytest.mark.parametrize(
    "check",
    [checks.check_formula, checks.check_sensitivity, checks.check_order, checks.check_replay],
    ids=lambda c: c.__name__,
)
def test_privacy_guarantee(backend, check):
    check(of_backend(backend))


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize(
    "shapes",
    [
        [(1, 1)],
        [(4,)],
        [(7, 33), (7, 2, 3, 5), (7,)],
        [(64, 4096), (64, 129)],
        [(3, 4097), (3, 8191), (3, 1)],
        [(70, 300)],
    ],
)
def test_privacy_values(backend, shapes, dtype):
    """Without noise, against float64 on the same inputs: C and the result are rounded once."""
    samples = gradients(*shapes, dtype=dtype)
    got = call(backend, samples, 0.8, 0.0, expected_batch_size=10)
    single = [formula([x[i : i + 1] for x in samples], 0.8, 10.0) for i in range(len(samples[0]))]
    for k, want in enumerate(formula(samples, 0.8, 10.0)):
        x, y = samples[k], got[k]
        assert y.shape == x.shape[1:] and y.is_contiguous() and not y.requires_grad
        assert y.dtype is (F64 if dtype is F64 else F32)
        terms = sum(norm(one[k]) for one in single)  # what C gives up shows in each of them
        assert norm(y - want) <= 4 * U[dtype] * terms + 1e-11 * terms


def test_privacy_bf16_gradients_are_read_exactly(backend):
    samples = gradients((16, 500), dtype=BF16)
    got = call(backend, samples, 1.0, 0.0, expected_batch_size=16)[0]
    want = call(backend, [samples[0].float()], 1.0, 0.0, expected_batch_size=16)[0]
    assert torch.equal(got, want)


def test_privacy_dtypes_may_differ(backend):
    samples = gradients((5, 40), (5, 30), (5, 20))
    samples = [samples[0], samples[1].float(), samples[2].to(BF16)]
    got = call(backend, samples, 1.0, 0.0, expected_batch_size=5)
    assert [y.dtype for y in got] == [F64, F32, F32]
    for y, want in zip(got, formula(samples, 1.0, 5.0), strict=True):
        assert norm(y - want) <= 1e-6 * norm(want)


def test_privacy_layouts(backend):
    """Transposed, strided, expanded and offset samples are those of their values."""
    x = torch.randn(6, 9, 10)
    for y in (x.transpose(1, 2), x[:, ::2], x[::2], x[1:2].expand(6, 9, 10), x[:, 3:]):
        for sigma in (0.0, 1.0):
            options = dict(expected_batch_size=4)
            got = call(backend, [y], 1.0, sigma, generator=seeded(), **options)[0]
            want = call(
                backend, [y.clone().contiguous()], 1.0, sigma, generator=seeded(), **options
            )
            assert torch.equal(got, want[0])


def seeded(seed: int = 11) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_privacy_inputs_are_left_alone(backend):
    x = torch.randn(5, 7, requires_grad=True)
    before = x.detach().clone()
    (y,) = call(backend, (x,), 0.1, 1.0, expected_batch_size=5)
    assert torch.equal(x, before) and not y.requires_grad and x.grad is None


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_privacy_same_bits_for_any_number_of_threads(cpu, sigma):
    samples = gradients((33, 20_000), (33, 5), dtype=F32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(of_backend("cpu").release(samples, 1.0, sigma, 33.0))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_privacy_backends_agree(backend, dtype):
    """To the bit with noise, unless a sum lies within 1e-15 of a half on the grid."""
    samples = gradients((20, 3000), (20, 77), dtype=dtype)
    one = of_backend(backend).release(samples, 1.0, 1.0, 20.0)
    two = of_backend("reference").release(samples, 1.0, 1.0, 20.0)
    assert sum(int((a != b).sum()) for a, b in zip(one, two, strict=True)) <= 1


def test_privacy_results_lie_on_the_grid(backend):
    samples = gradients((20, 3000))
    (y,) = call(backend, samples, 1.0, 1.0, expected_batch_size=1)
    grid = mechanism.plan(1.0, 1.0, 1.0, 3000, False).grid
    assert torch.equal((y / grid).round() * grid, y) and not torch.equal(y.round(), y)
    (y,) = call(backend, samples, 1.0, 0.0, expected_batch_size=1)
    assert not torch.equal((y / grid).round() * grid, y)  # without noise there is no grid


@pytest.mark.parametrize("c", [2.0**-64, 3e-7, 0.1, 1.0, 1.7, 4.0, 2.0**64])
@pytest.mark.parametrize("p", [0, 1, 5, 10_000, 10**9, 1 << 36])
def test_privacy_plan_pays_for_every_rounding(c, p):
    """The bound of fastdistill.privacy.mechanism, in numbers: and it costs little."""
    e = 2.0**-53
    for sigma in (0.0, 1e-3, 1.0, 50.0):
        m = mechanism.plan(c, sigma, 64.0, p, True)
        root = math.sqrt(p)
        reach = m.clip * (1 + (p + 8) * e) + m.fine * root / 2 + m.grid * root
        last = 0.0 if sigma else 2.0**-24 * c
        assert reach + last <= c
        assert m.clip >= c * (1 - 0.0012 if sigma else 1 - 1e-7 - 2 * p * e)
        for x in (m.unit, m.fine, m.grid):
            assert x == 0 or math.frexp(x)[0] == 0.5
        assert (m.grid > 0) == (m.fine > 0) == (sigma > 0)
        if sigma:
            assert m.grid >= m.fine and m.grid * root <= 2.0**-10 * c * 1.001
            # Every partial sum of 2^20 samples, and the widest noise, is exact.
            assert mechanism.MOST_SAMPLES * c <= 2.0**52 * m.fine
            assert mechanism.MOST_SAMPLES * c + 9.5 * m.scale <= 2.0**51 * m.grid


def test_privacy_in_a_fresh_process():
    """Nothing of the suite's has to be imported first, and Opacus is not."""
    code = (
        "import sys, torch, fastdistill as fd\n"
        "print(fd.privacy.clip_and_noise([torch.eye(2)], 1.0, 0.0, expected_batch_size=2))\n"
        "assert not any('opacus' in m for m in sys.modules)"
    )
    status, text = python(code)
    assert status == 0 and "0.5000, 0.5000" in text, text
