"""clip_and_noise at the edges: not finite, empty, one, extreme sizes, zero gradients."""

import math

import privacy_checks as checks
import pytest
import torch
from privacy_checks import BF16, F16, F32, F64, call, norm, of_backend

import fastdistill as fd


def test_privacy_not_finite(backend):
    checks.check_not_finite(of_backend(backend))


def test_privacy_all_records_spoilt(backend):
    x = torch.full((3, 5), math.nan)
    assert torch.equal(call(backend, [x], 1.0, 0.0, expected_batch_size=3)[0], torch.zeros(5))
    noisy = call(backend, [x], 1.0, 1.0, expected_batch_size=3)[0]
    assert noisy.isfinite().all() and (noisy != 0).all()


def test_privacy_empty_batch_is_noise_alone(backend):
    shapes = [(0, 4), (0, 2, 3), (0,)]
    got = call(backend, [torch.zeros(s) for s in shapes], 2.0, 1.0, expected_batch_size=4)
    assert [y.shape for y in got] == [s[1:] for s in shapes]
    assert all((y != 0).all() and y.isfinite().all() for y in got)
    got = call(backend, [torch.zeros(s) for s in shapes], 2.0, 0.0, expected_batch_size=4)
    assert all((y == 0).all() for y in got)


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_privacy_tensors_without_elements(backend, sigma):
    samples = [torch.ones(3, 0), torch.ones(3, 2), torch.ones(3, 4, 0, 2)]
    got = call(backend, samples, 1.0, sigma, expected_batch_size=3)
    assert [tuple(y.shape) for y in got] == [(0,), (2,), (4, 0, 2)]
    assert got[1].isfinite().all()
    assert call(backend, [torch.ones(3, 0)], 1.0, sigma, expected_batch_size=3)[0].shape == (0,)


def test_privacy_zero_gradients(backend):
    assert (call(backend, [torch.zeros(4, 9)], 1.0, 0.0, expected_batch_size=4)[0] == 0).all()


@pytest.mark.parametrize("c", [1e-15, 1e-6, 1.0, 1e6, 1e15])
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_privacy_extreme_sizes(backend, dtype, c):
    """Finite records are clipped, whatever their size: squares neither overflow nor vanish."""
    top = 1e37 if dtype is not F64 else 1e130
    for size in (1e-37, 1e-20, 1e-3, 1.0, 1e20, top):
        x = torch.tensor([[3.0, -4.0]], dtype=F64).mul(size).to(dtype)
        got = call(backend, [x], c, 0.0, expected_batch_size=1)[0].double()
        n = norm(x)
        want = x[0].double() * min(1.0, c / (n + 1e-6))
        # C may give up 1e-7 of itself; results below float32's normal range are coarser.
        assert norm(got - want) <= 2e-7 * norm(want) + (1e-44 if dtype is not F64 else 0)
        assert norm(got) <= c


def test_privacy_float16_overflows_nowhere(backend):
    x = torch.full((2, 1000), 6e4, dtype=F16)
    got = call(backend, [x], 1.0, 0.0, expected_batch_size=1)[0]
    assert math.isclose(norm(got), 2.0, rel_tol=1e-6)


def test_privacy_more_samples_than_a_pass_takes_at_once(backend):
    for batch in (1, 2, 3, 4, 5, 8, 9):
        x = torch.randn(batch, 21, dtype=F64) * 0.01
        got = call(backend, [x], 100.0, 0.0, expected_batch_size=2)[0]
        torch.testing.assert_close(got, x.sum(0) / 2, rtol=1e-12, atol=1e-15)


def test_privacy_many_tensors(backend):
    samples = [torch.randn(3, 1 + i % 7) for i in range(300)]
    got = call(backend, samples, 1.0, 0.0, expected_batch_size=3)
    for y, want in zip(got, checks.formula(samples, 1.0, 3.0), strict=True):
        torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-9)


def test_privacy_under_inference_mode_and_flushed_denormals(backend):
    with torch.inference_mode():
        x = torch.randn(4, 300)
        g = torch.Generator().manual_seed(3)
        first = call(backend, [x], 1.0, 1.0, expected_batch_size=4, generator=g)[0]
    flushed = torch.set_flush_denormal(True)
    try:
        g = torch.Generator().manual_seed(3)
        second = call(backend, [x.clone()], 1.0, 1.0, expected_batch_size=4, generator=g)[0]
    finally:
        torch.set_flush_denormal(False)
    assert not flushed or torch.equal(first, second)


def test_privacy_auto_takes_the_compiled_backend():
    from fastdistill import _backend

    case = _backend.Case("cpu", (F32,), False)
    expected = "cpu" if fd._native.cpu().module else "reference"
    assert _backend.choose("clip_and_noise", case) == expected
