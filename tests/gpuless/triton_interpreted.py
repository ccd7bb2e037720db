"""The Triton kernels of kd_loss under Triton's interpreter, against the reference in float64.

Runs in a process of its own, with TRITON_INTERPRET=1 from the start:
`TRITON_INTERPRET=1 pytest tests/gpuless/triton_interpreted.py`; test_triton_interpreter.py does.

Every torch.empty is NaN with a guard zone around it, so an element that is not written shows, and
so does a write beside a tensor. Inputs lie in NaN, so a read beside a row shows in its results.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
import triton_shim
from budget import assert_within
from torch import Tensor

from fastdistill import _rows
from fastdistill.kd import api, ops, reference
from fastdistill.kd import triton as kd_triton

assert os.environ.get("TRITON_INTERPRET") == "1", __doc__
triton_shim.install()
torch.set_num_threads(1)  # small tensors: threads would only wait for one another

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
PAIRS = [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (BF16, F32), (F16, F32), (F64, F32)]
PAIRS += [(BF16, F16), (F16, F64)]
DIVERGENCES = ["forward_kl", "reverse_kl", "cross_entropy"]
TEMPERATURES = [1e-3, 0.5, 1.0, 2.0, 3.0, 1e3]
WIDTHS = [1, 2, 10, 33, 65, 100, 519, 1000]
KERNELS = ["rows", "blocks"]

UNIT = {F32: 2.0**-24, BF16: 2.0**-8, F16: 2.0**-11, F64: 2.0**-53}  # half a step at 1
LEAST = {F32: 2.0**-149, BF16: 2.0**-133, F16: 2.0**-25, F64: 2.0**-1074}  # half the least step
GUARD = 64
INF, NAN = float("inf"), float("nan")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on inf and NaN


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Allocations are NaN inside guard zones, which must be untouched at the end of the test."""
    torch.manual_seed(0)
    real = torch.empty
    made: list[tuple[Tensor, int]] = []

    def empty(*shape: Any, **options: Any) -> Tensor:
        if len(shape) == 1 and not isinstance(shape[0], int):
            shape = tuple(shape[0])
        n = math.prod(shape)
        whole = real(n + 2 * GUARD, **options).fill_(float("nan"))
        made.append((whole, n))
        return whole[GUARD : GUARD + n].view(shape)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(
        torch, "empty_like", lambda x: empty(x.shape, dtype=x.dtype, device=x.device)
    )
    yield
    for whole, n in made:
        assert whole[:GUARD].isnan().all() and whole[GUARD + n :].isnan().all(), "wrote beside"


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forward kernels, one after the other; from 65 classes a row takes several blocks."""
    force(monkeypatch, request.param)
    return str(request.param)


def force(monkeypatch: pytest.MonkeyPatch, name: str, block: int | None = None) -> None:
    def config(device: torch.device, double: bool, cols: int, reverse: bool) -> kd_triton.Config:
        size = block or (64 if cols <= 128 else 512)
        return kd_triton.Config(cols, name == "rows", size, 4, None)

    monkeypatch.setattr(kd_triton, "_config", config)


class Call(NamedTuple):
    """The arguments of a loss, apart from the logits."""

    labels: Tensor | None = None
    mask: Tensor | None = None
    row_weight: Tensor | None = None
    normalizer: Tensor | None = None
    temperature: float = 2.0
    hard_weight: float = 0.0
    soft_weight: float = 1.0
    divergence: str = "forward_kl"
    scale_t2: bool = True
    ignore_index: int = -100
    label_smoothing: float = 0.0
    reduction: str = "mean"
    divisor: float = 1.0


class Result(NamedTuple):
    """What a backend makes of a call; the gradient is that of (loss * upstream).sum()."""

    loss: Tensor
    hard: Tensor
    soft: Tensor
    grad: Tensor


def oracle(
    s: Tensor, t: Tensor, call: Call, upstream: Tensor | float = 1.0, dtype: torch.dtype = F64
) -> Result:
    """The reference in float64 on the same values (or in `dtype`)."""
    leaf = s.detach().to(dtype).requires_grad_()
    loss, hard, soft = reference.kd_loss(leaf, t.to(dtype), *call)
    (grad,) = torch.autograd.grad((loss * upstream).sum(), leaf)
    return Result(loss.detach(), hard, soft, grad)


def fused(s: Tensor, t: Tensor, call: Call, upstream: Tensor | float = 1.0) -> Result:
    """The kernels, forward and backward; also that they leave their inputs alone."""
    tensors = [x for x in (s, t, *call) if isinstance(x, Tensor)]
    before = [x.clone() for x in tensors]
    loss, hard, soft, grad, grad_scale = kd_triton.kd_fwd(s, t, *call, True)
    assert grad.dtype is s.dtype and grad.shape == s.shape and grad.is_contiguous()
    if not isinstance(upstream, Tensor):
        upstream = torch.full((), upstream, dtype=loss.dtype)
    grad = kd_triton.kd_bwd(grad, grad_scale, upstream)
    for x, old in zip(tensors, before, strict=True):
        assert torch.equal(x.nan_to_num(), old.nan_to_num()), "wrote into an input"
    return Result(loss, hard, soft, grad)


def close(name: str, got: Tensor, want: Tensor, allowed: Tensor) -> None:
    """Within `allowed`, and NaN and infinite where `want` is."""
    got, odd = got.to(F64), ~want.isfinite()
    assert torch.equal(got[odd].nan_to_num(7.0), want[odd].nan_to_num(7.0)), f"{name}: NaN or inf"
    excess = torch.where(odd, 0.0, (got - want).abs() - allowed)
    assert (excess <= 0).all(), f"{name}: {excess.max():.3e} above {allowed.min():.3e} and more"


def check(s: Tensor, t: Tensor, call: Call, upstream: Tensor | float = 1.0) -> Result:
    """Compare values and gradient with the oracle."""
    got = fused(s, t, call, upstream)
    want = oracle(s, t, call, upstream)
    arithmetic = F64 if F64 in (s.dtype, t.dtype) else F32
    native = oracle(s, t, call, upstream, arithmetic)
    unit = UNIT[arithmetic]

    def own_error(name: str) -> Tensor:
        error = getattr(native, name).to(F64) - getattr(want, name)
        return error.abs().nan_to_num(0.0, 0.0)

    # (q - p) - p u cancels up to 20-fold, at |u| = 0.1: a term may miss that many roundings.
    parts = [x.abs().nan_to_num(0.0, 0.0) for x in (want.hard, want.soft)]
    parts += [abs(call.hard_weight) * parts[0] + abs(call.soft_weight) * parts[1]]
    for name, size in zip(("hard", "soft", "loss"), parts, strict=True):
        exact = getattr(want, name).to(arithmetic).to(F64)  # it may overflow
        close(name, getattr(got, name), exact, 2 * own_error(name) + 64 * unit * size)

    # The gradient is a difference of probabilities: it may miss roundings of the largest.
    largest = torch.zeros(s.shape[:-1], dtype=F64)
    if call.hard_weight:
        largest += abs(call.hard_weight)
    if call.soft_weight:
        T = call.temperature
        p, q = (torch.softmax(x.to(F64) / T, -1).amax(-1) for x in (t, s))
        if call.divergence == "reverse_kl":  # q (u - R), and u is a difference of logits
            difference = (s.to(F64) - t.to(F64)).nan_to_num(0.0, 0.0, 0.0).abs().amax(-1)
            q = q * torch.clamp(difference / T, 1.0)
        largest += torch.maximum(p, q) * abs(call.soft_weight) * (T if call.scale_t2 else 1 / T)
    scale = _rows.row_scale(s, *call[:4], *call[9:10], *call[11:], F64)
    largest = (largest * scale * upstream).abs().nan_to_num(0.0, 0.0)
    rounding = UNIT[s.dtype] * want.grad.abs() + 2 * LEAST[s.dtype] * max(1.0, biggest(upstream))
    if want.grad.numel():
        size = want.grad.abs().nan_to_num(0.0, 0.0).amax(-1)
        band = (4 if arithmetic is F32 else 16) * unit * largest + 16 * unit * size
        band = band + 2 * own_error("grad").amax(-1)
        rounding = 2 * rounding + band.unsqueeze(-1)
    close("grad", got.grad, want.grad, rounding)
    return got


def biggest(upstream: Tensor | float) -> float:
    return float(torch.as_tensor(upstream).abs().max())


def logits(*shape: int, dtype: torch.dtype = F32, scale: float = 3.0) -> Tensor:
    """Rows that lie in NaN, as in a padded vocabulary, and begin at odd offsets."""
    *leading, cols = shape
    whole = torch.full((*leading, cols + 11), float("nan"), dtype=dtype)
    view = whole[..., 5 : 5 + cols]
    view.copy_(torch.randn(shape, dtype=F64) * scale)
    return view


def pair(count: int, cols: int, types: tuple[torch.dtype, torch.dtype]) -> tuple[Tensor, Tensor]:
    return logits(count, cols, dtype=types[0]), logits(count, cols, dtype=types[1])


def some_labels(count: int, cols: int) -> Tensor:
    """The first and the last class among them: chance seldom draws them."""
    labels = torch.randint(0, cols, (count,))
    labels[:1], labels[1:2] = 0, cols - 1
    return labels


# ----------------------------------------------------------------------------------------------
# Values and gradients.


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("types", PAIRS, ids=str)
def test_values_and_gradients(
    kernel: str, types: tuple[torch.dtype, torch.dtype], divergence: str
) -> None:
    # Each pair of types meets half of the lengths; temperatures, terms, reductions take turns.
    terms = itertools.cycle([(0.0, 1.0), (0.3, 0.7), (1.0, 0.0), (-0.5, 2.0), (0.7, 0.3)])
    turn = itertools.count()
    first = (PAIRS.index(types) + DIVERGENCES.index(divergence)) % 2
    for cols in WIDTHS[first::2]:
        hard_weight, soft_weight = next(terms)
        i = next(turn) + first + PAIRS.index(types)
        call = Call(
            some_labels(3, cols),
            temperature=TEMPERATURES[i % 6],
            hard_weight=hard_weight,
            soft_weight=soft_weight,
            divergence=divergence,
            scale_t2=i % 2 == 0,
            label_smoothing=(0.0, 0.1, 1.0)[i % 3],
            reduction=("mean", "none", "sum")[i % 3],
            divisor=5.0 if i % 3 == 2 else 1.0,
        )
        upstream: Tensor | float = 1.0 if i % 2 else -3.0
        if call.reduction == "none":
            upstream = torch.randn(3, dtype=F64)
        check(*pair(3, cols, types), call, upstream)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_temperatures(kernel: str, divergence: str, temperature: float) -> None:
    call = Call(
        some_labels(4, 300), temperature=temperature, hard_weight=0.5, divergence=divergence
    )
    check(*pair(4, 300, (F32, F32)), call)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_hot(kernel: str, divergence: str) -> None:
    """Log(q / p) is then 1e-3, so that a difference of sums would be wrong in all classes alike."""
    s, t = pair(4, 1500, (F32, F32))
    call = Call(temperature=1000.0, divergence=divergence, reduction="sum")
    want, native = oracle(s, t, call), oracle(s, t, call, dtype=F32)
    assert_within("gradient", fused(s, t, call).grad, want.grad, native.grad)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_committed_configurations(divergence: str) -> None:
    """As they are, on one row length of each, and on an odd one that takes blocks."""
    for cols in (7, 300, 1001, 2000, 4090, 8191, 9001):
        call = Call(some_labels(2, cols), hard_weight=0.5, divergence=divergence)
        check(*pair(2, cols, (BF16, BF16)), call)


def test_gpt2_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """V = 50257: each row begins at another offset from a vector's boundary."""
    force(monkeypatch, "blocks", 16384)
    s, t = (torch.randn(3, 50257).mul(3).to(BF16) for _ in range(2))
    check(s, t, Call(some_labels(3, 50257), hard_weight=0.5))


def test_bfloat16_gradient_is_rounded_once(kernel: str) -> None:
    s, t = pair(8, 1000, (BF16, BF16))
    call = Call(temperature=1.0, reduction="sum")
    want, got = oracle(s, t, call).grad, fused(s, t, call).grad.to(F64)
    cancelled = 2.0**-21 * torch.softmax(s.to(F64), -1)
    assert (got - want).abs().le(2.0**-8 * want.abs() + cancelled).all()
    assert (got - want).norm() <= 3e-3 * want.norm()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_values_without_gradient_are_the_same(kernel: str, divergence: str) -> None:
    for weights in ((0.5, 0.7), (1.0, 0.0), (0.0, 1.0)):
        s, t = pair(3, 65, (BF16, F32))
        call = Call(some_labels(3, 65), None, None, None, 2.0, *weights, divergence)
        with_gradient, without = (kd_triton.kd_fwd(s, t, *call, need) for need in (True, False))
        assert without[3].numel() == without[4].numel() == 0
        for a, b in zip(with_gradient[:3], without[:3], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=0)


# ----------------------------------------------------------------------------------------------
# Near the teacher.


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_near_teacher(monkeypatch: pytest.MonkeyPatch, divergence: str) -> None:
    """The divergence keeps its digits where it is small, also across rescaled blocks."""
    for name, noise in itertools.product(KERNELS, (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)):
        force(monkeypatch, name, 8192)
        s = torch.randn(2, 32000) * 3
        t = s + noise * torch.randn(2, 32000)
        for temperature in (1.0, 2.0, 3.0):
            call = Call(temperature=temperature, divergence=divergence, reduction="none")
            got, want = kd_triton.kd_fwd(s, t, *call, False)[2], oracle(s, t, call).soft
            assert got.sub(want).abs().le(1e-2 * want).all(), (name, noise, temperature)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("types", PAIRS, ids=str)
def test_identical_logits_give_zero(
    kernel: str, types: tuple[torch.dtype, torch.dtype], divergence: str
) -> None:
    for cols in (1, 10, 65, 1001):
        values = logits(3, cols, dtype=F64).to(BF16).to(F16)  # exact in every type
        values[0, 0] = -float("inf") if cols > 1 else 0.0
        s, t = values.to(types[0]), values.to(types[1])
        got = fused(s, t, Call(divergence=divergence, reduction="none"))
        assert (got.soft == 0).all()
        if divergence == "forward_kl":
            assert (got.grad == 0).all()
        else:
            assert got.grad.abs().max() < 1e-6


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_never_negative(kernel: str, divergence: str) -> None:
    s = logits(3, 1000)
    for noise in (1e-7, 1e-5, 0.03):
        call = Call(divergence=divergence, reduction="none")
        assert (kd_triton.kd_fwd(s, s + noise * torch.randn_like(s), *call, False)[2] >= 0).all()


# ----------------------------------------------------------------------------------------------
# Rows that count for nothing, and values that are not numbers.


def odd_rows(dtype: torch.dtype, cols: int, divergence: str) -> tuple[Tensor, Tensor]:
    """One kind of trouble to a row; the first row has none."""
    s, t = pair(17, cols, (dtype, dtype))
    low = torch.finfo(dtype).min
    s[1, cols // 2] = NAN
    t[2, cols // 3] = NAN
    s[3, 0] = INF
    t[4, cols - 1] = INF
    s[5] = -INF
    t[6] = -INF
    s[7, ::3] = t[7, ::3] = -INF
    s[8, 1] = -INF
    t[9, 1] = -INF
    s[10, : cols // 2] = t[10, : cols // 2] = -INF
    s[11, cols // 2 :] = t[11, cols // 2 :] = low
    if divergence != "reverse_kl":  # it would be about 1e38, and its gradient garbage
        t[12, cols // 4 :] = low
    s[13, cols // 4 :] = low
    s[14] = INF
    s[15] = t[15] = NAN
    s[16, : cols // 2] = -1e4
    t[16, : cols // 4] = -INF
    return s, t


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_infinities_and_nans(kernel: str, dtype: torch.dtype, divergence: str) -> None:
    for cols, hard in ((10, 0.0), (65, 0.5), (519, 0.0)):
        s, t = odd_rows(dtype, cols, divergence)
        labels = torch.full((len(s),), cols // 2 + 1)
        call = Call(
            labels, temperature=2.0, hard_weight=hard, divergence=divergence, reduction="none"
        )
        check(s, t, call)


def test_infinities_and_nans_of_the_hard_term(kernel: str) -> None:
    for smoothing in (0.0, 0.1):
        s, t = odd_rows(F32, 65, "forward_kl")
        labels = torch.full((len(s),), 33)
        call = Call(
            labels, hard_weight=1.0, soft_weight=0.0, label_smoothing=smoothing, reduction="none"
        )
        check(s, t, call)


def test_dropped_rows_are_zero_and_not_read(kernel: str) -> None:
    s, t = pair(6, 65, (F32, BF16))
    s[0] = t[0] = s[1] = t[2] = NAN
    s[2, 3] = INF
    call = Call(
        torch.tensor([0, -100, 5, 7, 64, 1]),
        mask=torch.tensor([False, True, True, True, True, False]),
        row_weight=torch.tensor([1.0, 2.0, 0.0, 0.5, 3.0, 0.7]),
        hard_weight=0.5,
    )
    for reduction in ("mean", "sum", "none"):
        with loads() as read:
            got = check(s, t, call._replace(reduction=reduction))
        assert (got.grad[[0, 1, 2, 5]] == 0).all() and (got.grad[[3, 4]] != 0).any(-1).all()
        for x in (s, t):
            begin = x.data_ptr() + x.stride(0) * x.element_size() * torch.arange(6)
            for row in (0, 1, 2, 5):
                first, end = int(begin[row]), int(begin[row]) + 65 * x.element_size()
                assert not any(first <= address < end for address in read), f"row {row} was read"


def test_all_rows_dropped(kernel: str) -> None:
    s, t = pair(3, 65, (F16, F16))
    got = check(s, t, Call(mask=torch.zeros(3, dtype=torch.bool)))
    assert got.loss == 0 and (got.grad == 0).all()


def test_bad_labels_and_weights_spoil_their_rows_only(kernel: str) -> None:
    s, t = pair(6, 65, (F32, F32))
    labels = torch.tensor([3, -1, 65, 2**40, 4, 5])
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, 1.0])
    bad, good = [1, 2, 3, 4], [0, 5]
    call = Call(labels, row_weight=weight, hard_weight=0.5, reduction="none")
    with loads() as read:
        got = fused(s, t, call)
    row = s.stride(0) * s.element_size()
    beside = {s.data_ptr() + i * row + at * s.element_size() for i in range(6) for at in (-1, 65)}
    assert not read & beside, "a label that is no class was looked up"
    assert got.loss[bad].isnan().all() and got.grad[bad].isnan().all()
    kept = call._replace(labels=labels[good], row_weight=weight[good])
    want = oracle(s[good], t[good], kept)
    torch.testing.assert_close(got.loss[good], want.loss.float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(got.grad[good], want.grad.float(), rtol=1e-5, atol=1e-8)
    assert fused(s, t, call._replace(reduction="mean")).loss.isnan()


def test_no_rows_and_no_terms(kernel: str) -> None:
    empty = torch.zeros(0, 5)
    for reduction in ("mean", "sum", "none"):
        got = fused(empty, empty, Call(reduction=reduction))
        assert got.loss.sum() == 0 and got.grad.shape == (0, 5)
    s, t = pair(3, 65, (F32, F32))
    s[1] = NAN
    got = check(s, t, Call(soft_weight=0.0))
    assert got.loss == 0 and (got.grad == 0).all()


def test_normalizer(kernel: str) -> None:
    s, t = pair(3, 65, (F32, F32))
    call = Call(some_labels(3, 65), hard_weight=0.5, reduction="sum")
    for value in (torch.tensor(7.0), torch.tensor(7)):
        check(s, t, call._replace(normalizer=value))
    assert fused(s, t, call._replace(normalizer=torch.tensor(0.0))).loss.isnan()


# ----------------------------------------------------------------------------------------------
# Where the rows lie.


@pytest.mark.parametrize("types", [(F32, F32), (BF16, BF16), (BF16, F32)], ids=str)
def test_layouts(kernel: str, types: tuple[torch.dtype, torch.dtype]) -> None:
    for cols in (65, 520):
        padded = [logits(2, 4, cols, dtype=d) for d in types]
        dense = [torch.randn(2, 4, cols).to(d) for d in types]
        shifted = [x[:, :-1] for x in dense]  # next-token prediction: two row strides
        across = [torch.randn(4, 2, cols).to(d).transpose(0, 1) for d in types]
        expanded = [torch.randn(4, cols).to(d).expand(2, 4, cols) for d in types]
        offset = [torch.randn(2 * 4 * cols + 1).to(d)[1:].view(2, 4, cols) for d in types]
        scattered = [torch.randn(2, cols, 4).to(d).transpose(1, 2) for d in types]
        views = [padded, dense, across, expanded, offset, scattered]
        for i, view in enumerate(views):
            other = views[(i + 1) % len(views)]
            check(view[0], other[1], Call())
        check(*shifted, Call(torch.randint(0, cols, (2, 3)), hard_weight=0.5))
        check(shifted[0], dense[1][:, 1:], Call(reduction="none"), torch.randn(2, 3))
        check(dense[0][0, 0], dense[1][0, 0], Call())
        check(offset[0][0, 0], dense[1][0, 0], Call())  # a single row off the others' beat
        odd = [x[0, :3].reshape(3 * cols).repeat(2) for x in dense]
        odd = [x.as_strided((2, 1, 3, cols), (3 * cols, 5, cols, 1)) for x in odd]
        check(*odd, Call())
        labels = torch.randint(0, cols, (4, 2)).t()
        mask = torch.tensor([[True, False]] * 4).t()
        weight = torch.rand(4, 2).t()
        check(*padded, Call(labels, mask, weight, hard_weight=0.5))


@triton.jit
def _row_start_kernel(out_ptr, step, inner, ROWS: tl.constexpr, NESTED: tl.constexpr):
    row = kd_triton._program_rows(ROWS)
    start = kd_triton._row_start(row, inner, step, step, NESTED)
    tl.store(out_ptr + row, start)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("nested", [False, True])
def test_rows_beyond_2_to_the_31(rows: int, nested: bool) -> None:
    out = torch.zeros(8, dtype=torch.int64)
    _row_start_kernel[(8 // rows,)](out, 1 << 30, 1, ROWS=rows, NESTED=nested)
    assert out.tolist() == [(1 << 30) * row for row in range(8)]


# ----------------------------------------------------------------------------------------------
# float16 and the backward.


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float16_gradient_neither_overflows_nor_vanishes(kernel: str, divergence: str) -> None:
    """Under a loss scale of 65536 and a mean over many rows; also far from the teacher."""
    for spread, weight, temperature in ((1.0, 1.0, 4.0), (30.0, 100.0, 1.0), (1.0, 1e-3, 0.1)):
        s, t = logits(4, 519, dtype=F16, scale=spread), logits(4, 519, dtype=F16, scale=spread)
        call = Call(
            some_labels(4, 519),
            hard_weight=weight,
            soft_weight=weight,
            temperature=temperature,
            divergence=divergence,
            reduction="sum",
            divisor=65536.0,
        )
        saved, grad_scale = kd_triton.kd_fwd(s, t, *call, True)[3:]
        assert saved.isfinite().all() and saved.abs().amax(-1).ge(64).all()
        mantissa, _ = torch.frexp(grad_scale * call.divisor)
        assert (mantissa == 0.5).all(), "the factor but for 1 / divisor is a power of two"
        check(s, t, call, 65536.0)


class loads:  # noqa: N801 - used as a function
    """The addresses that kernels read in a `with` block."""

    def __enter__(self) -> set[int]:
        builder = triton_shim.InterpreterBuilder
        self.real = builder.create_masked_load
        seen: set[int] = set()

        def load(this: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            chosen = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
            seen.update(pointers.data[chosen].ravel().tolist())
            return self.real(this, pointers, mask, *rest)

        builder.create_masked_load = load
        return seen

    def __exit__(self, *_: object) -> None:
        triton_shim.InterpreterBuilder.create_masked_load = self.real


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_backward(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(kd_triton, "_UNIFORM_COLS", 64)
    wide = F64 if dtype is F64 else F32
    for shape in ((3, 10), (5, 65), (2, 3, 72), (1, 1), (70, 3)):
        grad = torch.randn(shape).to(dtype)
        leading = grad.shape[:-1]
        scale = torch.rand(leading.numel()) if dtype is F16 else torch.zeros(0)
        for upstream in (
            torch.tensor(2.5),
            torch.tensor(0.3, dtype=F64),
            torch.tensor(0.7).expand(leading),
            torch.randn(leading),
            torch.randn(*leading, 2)[..., 0],
        ):
            factor = upstream.to(wide)
            if dtype is F16:
                factor = factor * scale.view(leading)
            factor = factor.expand(leading).unsqueeze(-1)
            want = (grad.to(wide) * factor).to(dtype)
            in_place = grad.clone()
            kd_triton.kd_bwd_(in_place, scale, upstream)
            assert torch.equal(kd_triton.kd_bwd(grad, scale, upstream), want)
            assert torch.equal(in_place, want)


@pytest.mark.parametrize("upstream", [torch.tensor(1.0), torch.ones(5), torch.ones(()).expand(5)])
def test_backward_by_one_touches_nothing(upstream: Tensor) -> None:
    grad = torch.randn(5, 65)
    begin, end = grad.data_ptr(), grad.data_ptr() + grad.numel() * 4
    with loads() as read:
        kd_triton.kd_bwd_(grad, torch.zeros(0), upstream)
    assert read and not any(begin <= address < end for address in read)
    assert torch.equal(kd_triton.kd_bwd(grad, torch.zeros(0), upstream), grad)


def test_through_the_op_and_autograd() -> None:
    """The route of `kd_loss` itself, in place and not."""
    s, t = pair(4, 65, (F32, F32))
    call = Call(some_labels(4, 65), hard_weight=0.5)
    want = oracle(s, t, call, 3.0).grad.float()
    for retain in (False, True):
        leaf = s.clone().requires_grad_()
        loss, _, _ = api._KDLoss.apply(leaf, None, t, *call, True, "triton")
        (loss * 3).backward(retain_graph=retain)
        torch.testing.assert_close(leaf.grad, want, rtol=1e-5, atol=1e-8)
        if retain:
            leaf.grad = None
            (loss * 3).backward()
            torch.testing.assert_close(leaf.grad, want, rtol=1e-5, atol=1e-8)


def test_outputs_are_those_that_the_fake_promises(kernel: str) -> None:
    for types, reduction in itertools.product(PAIRS, ("mean", "none")):
        s, t = pair(3, 10, types)
        made = kd_triton.kd_fwd(s, t, *Call(reduction=reduction), True)
        for real, fake in zip(made, ops.allocate(s, t, reduction, True), strict=True):
            assert real.dtype is fake.dtype and real.shape == fake.shape


# ----------------------------------------------------------------------------------------------
# The interpreter itself: what the shim repairs.


def test_shim_rounds_bfloat16_to_nearest_even() -> None:
    x = torch.cat([torch.randn(4096), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, INF, -0.0, 3.4e38])])
    ours = torch.from_numpy(triton_shim.narrow(x.numpy()).view(np.int16)).view(BF16)
    assert torch.equal(ours, x.to(BF16))
    assert np.isnan(triton_shim.widen(triton_shim.narrow(np.array([NAN], np.float32)))).all()
    widened = triton_shim.widen(ours.view(torch.int16).numpy().view(np.uint16))
    assert torch.equal(torch.from_numpy(widened), ours.float())


@triton.jit
def _add_kernel(x_ptr):
    x = tl.load(x_ptr + tl.arange(0, 4))
    tl.store(x_ptr + tl.arange(0, 4), x + x)


@triton.jit
def _maximum_kernel(x_ptr, out_ptr):
    x = tl.load(x_ptr + tl.arange(0, 4))
    tl.store(out_ptr + tl.arange(0, 4), tl.maximum(x, 0.0))


def test_shim_refuses_bfloat16_arithmetic() -> None:
    with pytest.raises(triton.runtime.errors.InterpreterError, match="raw bits"):
        _add_kernel[(1,)](torch.ones(4, dtype=BF16))


def test_shim_drops_nan_in_maxima() -> None:
    out = torch.zeros(4)
    _maximum_kernel[(1,)](torch.tensor([NAN, 1.0, -1.0, NAN]), out)
    assert out.tolist() == [0.0, 1.0, 0.0, 0.0]
