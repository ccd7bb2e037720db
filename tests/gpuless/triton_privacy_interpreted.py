"""The generators in Triton on the vectors of their authors, and several tensors at once.

triton_checked.py has the values. Runs in a process of its own, with TRITON_INTERPRET=1 from the
start; test_triton_interpreter.py does.
"""

from __future__ import annotations

import os
from typing import Any

import privacy_checks as checks
import pytest
import torch
import triton
import triton.language as tl
import triton_shim
from test_privacy_noise import CHACHA20, PHILOX
from triton.language.random import philox_impl

from fastdistill.privacy import mechanism, reference, source
from fastdistill.privacy import triton as privacy_triton

assert os.environ.get("TRITON_INTERPRET") == "1", __doc__
triton_shim.install()
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on sums that wrap


@triton.jit
def _words(in_ptr, out_ptr, BLOCK: tl.constexpr, KIND: tl.constexpr):
    """Words of the block whose key (8) and counter (4) are at in_ptr: 4 or 16."""
    zero = tl.zeros((BLOCK,), tl.uint32)
    c0, c1, c2, c3 = (
        zero + tl.load(in_ptr + 8).to(tl.uint32), zero + tl.load(in_ptr + 9).to(tl.uint32),
        zero + tl.load(in_ptr + 10).to(tl.uint32), zero + tl.load(in_ptr + 11).to(tl.uint32),
    )  # fmt: skip
    k0, k1 = tl.load(in_ptr).to(tl.uint32), tl.load(in_ptr + 1).to(tl.uint32)
    at = out_ptr + tl.arange(0, BLOCK)
    if KIND == 1:
        w = philox_impl(c0, c1, c2, c3, k0, k1)
        for i in tl.static_range(4):
            tl.store(at + i * BLOCK, w[i].to(tl.int64))
    else:
        k2, k3 = tl.load(in_ptr + 2).to(tl.uint32), tl.load(in_ptr + 3).to(tl.uint32)
        k4, k5 = tl.load(in_ptr + 4).to(tl.uint32), tl.load(in_ptr + 5).to(tl.uint32)
        k6, k7 = tl.load(in_ptr + 6).to(tl.uint32), tl.load(in_ptr + 7).to(tl.uint32)
        w = privacy_triton.chacha20(k0, k1, k2, k3, k4, k5, k6, k7, c0, c1, c2, c3)
        for i in tl.static_range(16):
            tl.store(at + i * BLOCK, w[i].to(tl.int64))


def words(kind: int, key: list[int], counter: Any) -> list[int]:
    given = torch.tensor([*key, *[0] * (8 - len(key)), *counter])
    out = torch.full((4 if kind == source.PHILOX else 16, 2), -1)
    _words[(1,)](given, out, BLOCK=2, KIND=kind)
    assert torch.equal(out[:, 0], out[:, 1])
    return out[:, 0].tolist()


@pytest.mark.parametrize("counter, key, want", PHILOX)
def test_philox_is_random123_s(counter: Any, key: Any, want: Any) -> None:
    assert tuple(words(source.PHILOX, list(key), counter)) == want


@pytest.mark.parametrize("key, counter, want", CHACHA20)
def test_chacha20_is_rfc_8439_s(key: bytes, counter: Any, want: str) -> None:
    found = words(source.CHACHA20, source._words(key).tolist(), counter)
    assert found == [int(w, 16) for w in want.split()]


@pytest.mark.parametrize("bits", [checks.philox, checks.chacha20])
@pytest.mark.parametrize("batch", [0, 5])
def test_several_tensors_share_norms_not_noise(bits: Any, batch: int) -> None:
    shapes = [(batch, 3, 7), (batch, 0), (batch,), (batch, 8, 140)]
    samples = checks.gradients(*shapes) if batch else [torch.zeros(s) for s in shapes]
    samples = [samples[0].float(), samples[1], samples[2].bfloat16(), samples[3].transpose(1, 2)]
    planned = mechanism.plan(1.0, 3.0, 7.0, 1142, True)
    got = privacy_triton.clip_and_noise(samples, planned, bits(9))
    want = reference.clip_and_noise(samples, planned, bits(9))
    for a, b in zip(got, want, strict=True):
        assert a.dtype is b.dtype and torch.equal(a, b) and a.is_contiguous()
    assert batch or not checks.correlated(got[0].flatten()[:21], got[3].flatten()[:21])


@pytest.mark.parametrize("bits", [checks.philox(3), source.silent()])
def test_sums_get_their_noise_in_place(bits: source.Source) -> None:
    planned = mechanism.plan(0.7, 1.5 if bits.kind else 0.0, 16.0, 5000, True)
    given = [torch.randn(3, 5), torch.randn(40, 30).t(), torch.zeros(0), torch.randn(()).double()]
    got, want = ([x.clone() for x in given] for _ in range(2))
    privacy_triton.add_noise_(got, planned, bits)
    reference.add_noise_(want, planned, bits)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_many_tensors_in_one_launch() -> None:
    """Some empty, some beside a boundary of 16 bytes."""
    samples = [torch.randn(3, i % 5 * 40) for i in range(30)]
    samples[2] = torch.randn(3, 41)[:, 1:]
    planned = mechanism.plan(5.0, 1.0, 3.0, sum(x[0].numel() for x in samples), True)
    got = privacy_triton.clip_and_noise(samples, planned, checks.philox(9))
    want = reference.clip_and_noise(samples, planned, checks.philox(9))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@triton.jit
def _far(
    out_ptr, first, k0, k1, k2, k3, k4, k5, k6, k7, c1, c2, c3,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    z = privacy_triton._normals(
        first, k0.to(tl.uint32), k1.to(tl.uint32), k2.to(tl.uint32), k3.to(tl.uint32),
        k4.to(tl.uint32), k5.to(tl.uint32), k6.to(tl.uint32), k7.to(tl.uint32),
        c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32), KIND, BLOCK,
    )  # fmt: skip
    tl.store(out_ptr + tl.arange(0, BLOCK), z)


@pytest.mark.parametrize("bits", [checks.philox(2), checks.chacha20(2)], ids=["philox", "chacha20"])
def test_noise_goes_on_in_blocks_beyond_32_bits(bits: source.Source) -> None:
    """The block's number goes on in the counter's second word."""
    philox, first = bits.kind == source.PHILOX, 1 << 32
    size = 32 if philox else 128
    out = torch.empty(size, dtype=torch.float64)
    low = source.counter(bits, source.GRADIENT_NOISE)
    _far[(1,)](out, first, *bits.key.tolist(), *low, KIND=bits.kind, BLOCK=size)
    block = first + torch.arange(16)
    counters = [block & 0xFFFFFFFF, low[0] + (block >> 32)]
    counters += [torch.full_like(block, w) for w in low[1:]]
    key = bits.key.tolist()
    random = reference.philox(key[:2], counters) if philox else reference.chacha20(key, counters)
    pairs = [reference.box_muller(*random[i : i + 4]) for i in range(0, len(random), 4)]
    assert torch.equal(out, torch.cat([x for pair in pairs for x in pair]))
