"""noisy_softmax_sum and noisy_gradient_sum: guarantee, noise, threads, layouts, refusals."""

import math

import mutants
import privacy_teacher_checks as checks
import pytest
import torch
from privacy_checks import BF16, F32, F64, chacha20, philox
from privacy_teacher_checks import SUMS, of_backend
from test_privacy_mutations import FILES

import fastdistill as fd
from fastdistill.privacy import mechanism, noisy_gradient_sum, noisy_softmax_sum

CALLS = {"softmax": (noisy_softmax_sum, (2.0, 1.5)), "gradient": (noisy_gradient_sum, (0.5, 1.5))}


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda c: c.__name__)
def test_privacy_teachers(backend, check, one_thread):
    check(of_backend(backend))


@pytest.mark.parametrize("kind", SUMS)
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("bits", [philox, chacha20])
def test_privacy_teachers_all_bits_are_the_reference_s(backend, kind, dtype, bits):
    stream = (1 << 62) + 12345678901234567
    for k, n, c in ((1, 1, 1), (4, 300, 13), (3, 2, 5003), (30, 7, 128)):
        teachers = list((torch.randn(k, n, c) * 3).to(dtype))
        for noise in (1.0, 2.0**10):
            got, want = (
                of_backend(b).sum(kind, teachers, noise, bits(stream), 1.7, 0.3)
                for b in (backend, "reference")
            )
            assert torch.equal(got, want)


@pytest.mark.parametrize("kind", SUMS)
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_privacy_teachers_same_bits_for_any_number_of_threads(cpu, kind, noise):
    teachers = list(torch.randn(5, 700, 33))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(of_backend("cpu").sum(kind, teachers, noise))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], x) for x in results[1:])


@pytest.mark.parametrize("kind", SUMS)
def test_privacy_teachers_layouts(backend, kind):
    """A tensor, a list, strided and expanded teachers: their values alone count."""
    function, numbers = CALLS[kind]
    x = torch.randn(3, 8, 10, requires_grad=True)
    for y in (x, x.transpose(1, 2), x[:, ::2], x[:, :, 1:8], x[:1].expand(4, 8, 10)):
        results = [
            function(z, *numbers, generator=torch.Generator().manual_seed(5))
            for z in (y, list(y), tuple(y.detach().clone().contiguous()))
        ]
        assert all(torch.equal(results[0], z) for z in results)
        assert results[0].is_contiguous() and not results[0].requires_grad
        assert results[0].shape == y.shape[1:]
    assert function(torch.ones(2, 0, 5), *numbers).shape == (0, 5)


@pytest.mark.parametrize("kind", SUMS)
def test_privacy_teachers_generators(backend, kind):
    function, numbers = CALLS[kind]
    x = torch.zeros(2, 5, 6)
    g = torch.Generator().manual_seed(1)
    first, second = (function(x, *numbers, generator=g) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(function(x, *numbers, generator=g.manual_seed(1)), first)
    torch.manual_seed(0)
    one = function(x, *numbers)
    torch.manual_seed(0)
    assert not torch.equal(function(x, *numbers), one)
    quiet = function(x, numbers[0], 0.0)
    assert torch.equal(quiet, function(x, numbers[0], 0.0)) and quiet.isfinite().all()


@pytest.mark.parametrize("c", [1, 2, 10, 1000, 1 << 20])
@pytest.mark.parametrize("sigma", [1e-6, 1.0, 2.0**20])
def test_privacy_teachers_plan_pays_for_every_rounding(c, sigma):
    """The bound of fastdistill.privacy.mechanism, in numbers: and it costs little."""
    m, root = mechanism.plan_answers(sigma, c), math.sqrt(c)
    one = m.clip * (1 + 3 * 2.0**-53) + m.fine * root / 2
    assert math.sqrt(2) * one + m.grid * root <= math.sqrt(2)
    assert m.clip >= 1 - 3e-5 and m.grid >= m.fine and m.scale == sigma
    assert math.frexp(m.grid)[0] == math.frexp(m.fine)[0] == 0.5
    assert mechanism.MOST_TEACHERS <= 2.0**52 * m.fine  # every partial sum is exact
    assert mechanism.MOST_TEACHERS + 9.5 * m.scale <= 2.0**51 * m.grid
    assert mechanism.MOST_CLASSES <= 2.0**53 * mechanism.EXPONENTIALS
    assert mechanism.plan_answers(0.0, c) == (1.0, 1.0, 0.0, 0.0, 0.0, 1.0)


X = torch.ones(3, 4, 6)
ONE = torch.ones(4, 6)
REFUSED_TEACHERS = [
    (None, TypeError, "expected a tensor .teachers, rows, classes. or a list .*got NoneType"),
    (ONE, ValueError, r"expected a shape \[teachers, rows, classes\], got \[4, 6\]"),
    ([], ValueError, "expected 1 to 65536 teachers, got 0"),
    (X[:0], ValueError, "expected 1 to 65536 teachers, got 0"),
    ([ONE, X], ValueError, r"\[1\]: expected a shape \[rows, classes\], got \[3, 4, 6\]"),
    ([ONE, ONE[:3]], ValueError, r"\[1\]: expected shape \[4, 6\] .*got \[3, 6\]"),
    ([ONE, ONE.double()], TypeError, r"\[1\]: expected dtype torch.float32 .*got torch.float64"),
    ([ONE, ONE.to("meta")], ValueError, r"\[1\]: expected device cpu"),
    ([ONE, 1.0], TypeError, r"\[1\]: expected a torch.Tensor, got float"),
    (X.long(), TypeError, "expected dtype float32"),
    (X[:, :, :0], ValueError, "expected 1 to 1048576 classes, got 0"),
    (ONE.expand(3, 4, 6)[:, :, :1].expand(3, 4, (1 << 20) + 1), ValueError, "to 1048576 classes"),
    (ONE[:1, :1].expand(1, 1 << 30, 128), ValueError, "expected at most 68719476736 values"),
    (torch.zeros(1, 1).expand((1 << 16) + 1, 1, 1), ValueError, "65536 teachers, got 65537"),
]
REFUSED_NUMBERS = [
    ("softmax", dict(temperature=0.0), ValueError, "temperature: expected a number > 0, got 0.0"),
    ("softmax", dict(temperature=X), TypeError, "temperature: expected a number, got Tensor"),
    ("softmax", dict(temperature=1e30), ValueError, r"temperature: .*from 2\^-64 to 2\^64"),
    ("softmax", dict(noise_std=-1.0), ValueError, "noise_std: expected a number >= 0, got -1.0"),
    ("softmax", dict(noise_std=math.nan), ValueError, "noise_std: expected a finite number"),
    ("softmax", dict(noise_std=1e12), ValueError, "noise_std: expected at most 4.38.* 6 classes"),
    ("softmax", dict(generator=0), TypeError, "generator: expected a torch.Generator or None"),
    ("gradient", dict(max_norm=0), ValueError, "max_norm: expected a number > 0, got 0"),
    ("gradient", dict(max_norm=1e30), ValueError, r"max_norm: expected a number from 2\^-64"),
    ("gradient", dict(noise_multiplier=-1), ValueError, "noise_multiplier: .*>= 0, got -1"),
    ("gradient", dict(generator="cpu"), TypeError, "generator: .*got str"),
]


@pytest.mark.parametrize("case", REFUSED_TEACHERS, ids=lambda c: c[2][:40])
@pytest.mark.parametrize("kind", SUMS)
def test_privacy_teachers_refuses(kind, case):
    function, numbers = CALLS[kind]
    name = "teacher_logits" if kind == "softmax" else "gradients"
    with pytest.raises(case[1], match=name + ".*" + case[2]):
        function(case[0], *numbers)


@pytest.mark.parametrize("kind, arguments, error, words", REFUSED_NUMBERS, ids=str)
def test_privacy_teachers_refuses_numbers(kind, arguments, error, words):
    good = dict(temperature=1.0, noise_std=1.0)
    if kind == "gradient":
        good = dict(max_norm=1.0, noise_multiplier=1.0)
    with pytest.raises(error, match=words):
        CALLS[kind][0](X, **{**good, **arguments})


@pytest.mark.parametrize("kind", SUMS)
def test_privacy_teachers_backends_and_transforms_that_cannot(kind):
    function, numbers = CALLS[kind]
    for name in ("cuda", "triton"):
        with fd.backend(name), pytest.raises(RuntimeError, match=f"noisy_{kind}_sum"):
            function(X, *numbers)
    with pytest.raises(RuntimeError, match="outside the transform"):
        torch.func.vmap(lambda x: function(x, numbers[0], 0.0))(X[None])


MUTATIONS = {
    "temperature left out": ("reference", "* inverse).clamp", ").clamp", "values"),
    "norm over all rows": (
        "reference", ".square().sum(1, keepdim=True)", ".square().sum()", "values",
    ),
    "the teachers' mean": (
        "reference", "return _release(total, m", "return _release(total / len(teachers), m",
        "values",
    ),
    "no select: 0 times NaN": (
        "reference", "torch.where(kept, p, 0.0)", "p * kept", "not_finite",
    ),
    "no select of gradients": (
        "reference", "torch.where(norm.isfinite(), on_grid(x * factor, m.fine), 0.0)",
        "on_grid(x * factor, m.fine) * norm.isfinite()", "not_finite",
    ),
    "a bad row drops its teacher": (
        "reference", "z.isfinite().all(1, keepdim=True)", "z.isfinite().all()", "not_finite",
    ),
    "not clipped": ("reference", ".clamp(max=1)", ".clamp(min=1)", "sensitivity"),
    "not normalised": ("reference", "m.clip) / s)", "m.clip) / s.clamp(max=1))", "sensitivity"),
    "grid not paid for": ("mechanism", "lost *= 1 + 2.0**-10", "lost = 0.0", "sensitivity"),
    "no grids: sums are not exact": (
        "reference", "return x + magic - magic if grid else x", "return x", "order",
    ),
    "noise of 0.9": (
        "mechanism", "fine, grid, noise_std, 1.0", "fine, grid, 0.9 * noise_std, 1.0", "noise",
    ),
    "noise of 0.9, by the audit": (
        "mechanism", "fine, grid, noise_std, 1.0", "fine, grid, 0.9 * noise_std, 1.0", "audit",
    ),
    "noise for half the sensitivity": (
        "mechanism", "scale=noise_multiplier * max_norm", "scale=noise_multiplier * max_norm / 2",
        "audit",
    ),
    "noise without the clip norm": (
        "mechanism", "scale=noise_multiplier * max_norm", "scale=noise_multiplier", "noise",
    ),
    "one noise for all rows": (
        "reference", "total.numel(), total.device)",
        "total.shape[-1], total.device).expand(total.shape)", "noise",
    ),
    "two ops with one purpose": (
        "reference", "source, ANSWER_NOISE", "source, GRADIENT_NOISE", "purposes",
    ),
    "the purpose is not in the counter": ("source", "purpose << 24", "1 << 24", "purposes"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_privacy_teachers_a_broken_sum_is_caught(name, one_thread):
    mutation = mutants.Mutation(*MUTATIONS[name])
    with mutants.made(FILES, mutation) as parts, pytest.raises(AssertionError):
        broken = checks.of_module(parts["reference"], parts["mechanism"])
        getattr(checks, f"check_{mutation.check}")(broken)


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda c: c.__name__)
def test_privacy_teachers_the_machinery_passes_what_is_not_broken(check, one_thread):
    with mutants.made(FILES) as parts:
        check(checks.of_module(parts["reference"], parts["mechanism"]))
