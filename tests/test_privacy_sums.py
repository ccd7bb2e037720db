"""add_noise_: what clip_and_noise does after its sum, on sums that are given."""

import privacy_checks as checks
import pytest
import torch

import fastdistill as fd
from fastdistill.privacy import mechanism, source, sums

SHAPES = [(3, 5), (4097,), (0,), (), (2, 128, 33)]


def release(backend, given, planned, bits):
    out = [x.clone() for x in given]
    with fd.backend(backend):
        sums.add_noise_(out, planned, bits)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [checks.philox(3), checks.chacha20(3), source.silent()])
def test_privacy_sums_have_the_bits_of_the_reference(dtype, bits):
    given = [torch.randn(shape).to(dtype) for shape in SHAPES]
    sigma = 0.0 if bits.kind == source.NONE else 1.5
    planned = mechanism.plan(0.7, sigma, 16.0, sum(x.numel() for x in given), True)
    want, got = (release(name, given, planned, bits) for name in ("reference", "cpu"))
    for a, b, x in zip(want, got, given, strict=True):
        assert a.dtype is b.dtype is dtype and torch.equal(a, b)
        assert sigma or torch.allclose(a, x / 16)


@pytest.mark.parametrize("bits", [checks.philox(4), checks.chacha20(4)])
def test_privacy_sums_get_the_noise_of_clip_and_noise(backend, bits):
    planned = mechanism.plan(1.0, 2.0, 8.0, 1000, True)
    nothing = [torch.zeros(0, 600), torch.zeros(0, 20, 20)]
    want = checks.of_backend(backend).run(nothing, planned, bits)
    got = release(backend, [torch.zeros(600), torch.zeros(20, 20)], planned, bits)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_privacy_sums_are_written_where_they_are_not_dense(backend):
    planned = mechanism.plan(1.0, 1.0, 1.0, 12, True)
    dense, strided = torch.ones(3, 4), torch.ones(4, 3).t()
    with fd.backend(backend):
        for x in (dense, strided):
            sums.add_noise_([x], planned, checks.philox(1))
    assert torch.equal(dense, strided) and not torch.equal(dense, torch.ones(3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_privacy_square_norms(backend, dtype):
    for shape in ((3, 5, 7), (2, 9000), (0, 4), (4, 0), (5,)):
        x = torch.randn(shape).to(dtype)
        with fd.backend(backend):
            got = sums.square_norms(x)
        want = x.double().flatten(1).square().sum(1) if x.ndim > 1 else x.double().square()
        torch.testing.assert_close(got, want, rtol=1e-14, atol=0)
    with fd.backend(backend):
        assert torch.equal(
            sums.square_norms(torch.ones(4, 6).t()), torch.full((6,), 4.0, dtype=torch.float64)
        )
        assert not sums.square_norms(torch.tensor([[torch.inf], [torch.nan]])).isfinite().any()
