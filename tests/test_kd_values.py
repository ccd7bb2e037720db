"""kd_loss: values and gradients of every backend against the oracle in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within

import fastdistill as fd

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DIVERGENCES = ("forward_kl", "reverse_kl", "cross_entropy")


def run(backend, student, teacher, grad_output=None, **settings):
    """(loss, hard, soft, gradient) through the public function."""
    student = student.detach().clone().requires_grad_()
    with fd.backend(backend):
        parts = fd.kd_loss(student, teacher, return_parts=True, **settings)
        out = parts.loss
        out.backward(torch.ones_like(out) if grad_output is None else grad_output.to(out.dtype))
    return *(p.detach() for p in parts), student.grad


def check(backend, student, teacher, grad_output=None, **settings):
    """The backend within the budget of float64 on the same (rounded) inputs."""
    got = run(backend, student, teacher, grad_output, **settings)
    exact = {k: v.double() if k == "row_weight" else v for k, v in settings.items()}
    want = run("reference", student.double(), teacher.double(), grad_output, **exact)
    native = run("reference", student, teacher, grad_output, **settings)
    single = F64 if F64 in (student.dtype, teacher.dtype) else F32
    for name, g, w, n in zip(("loss", "hard", "soft"), got, want, native, strict=False):
        assert g.dtype == single
        # Row by row: a reduction over rows would hide the worst.
        assert_within(name, g.unsqueeze(-1), w.unsqueeze(-1), n.unsqueeze(-1))
    assert got[3].dtype == student.dtype
    assert_within("gradient", got[3], want[3], native[3])


def logits(shape, dtype=F32, spread=3.0):
    return (torch.randn(shape) * spread).to(dtype)


MIXES = [
    (F32, F32), (F64, F64), (BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16), (F16, F32),
    (F32, F64), (F64, F32), (F16, BF16),
]  # fmt: skip


@pytest.mark.parametrize("dtypes", MIXES, ids=lambda d: "-".join(str(x)[6:] for x in d))
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_kd_values_and_grads(backend, divergence, dtypes):
    for rows, classes in ((1, 1), (3, 2), (5, 33), (70, 10), (2, 100), (3, 2049), (2, 6000)):
        student, teacher = logits((rows, classes), dtypes[0]), logits((rows, classes), dtypes[1])
        labels = torch.randint(classes, (rows,))
        for temperature in (1.0, 2.0, 2.5):
            check(
                backend, student, teacher, torch.tensor(0.5), labels=labels, hard_weight=0.3,
                soft_weight=0.7, temperature=temperature, divergence=divergence,
            )  # fmt: skip


@pytest.mark.parametrize("temperature", [1e-3, 0.5, 1.0, 2.0, 3.0, 4.0, 7.0, 1e3])
@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 0.0), (0.4, 2.0)])
def test_kd_temperatures_and_weights(backend, temperature, weights):
    student, teacher, labels = logits((4, 300)), logits((4, 300)), torch.randint(300, (4,))
    for divergence, scale_t2 in itertools.product(DIVERGENCES, (True, False)):
        check(
            backend, student, teacher, torch.tensor(-1.7), labels=labels,
            temperature=temperature, hard_weight=weights[0], soft_weight=weights[1],
            divergence=divergence, scale_t2=scale_t2,
        )  # fmt: skip


@pytest.mark.parametrize("classes", [32000, 50257, 128256])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_kd_vocabularies(backend, classes, dtype):
    student, teacher = logits((3, classes), dtype), logits((3, classes), dtype)
    check(
        backend, student, teacher, labels=torch.randint(classes, (3,)), temperature=2.0,
        hard_weight=0.5, soft_weight=0.5,
    )  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "batchmean"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_kd_reductions_masks_and_weights(backend, reduction, dtype):
    shape = (4, 6)
    student, teacher = logits((*shape, 50), dtype), logits((*shape, 50), dtype)
    labels = torch.randint(50, shape)
    labels[0, 1] = labels[3, 5] = -100
    mask = torch.rand(shape) > 0.3
    row_weight = torch.rand(shape)
    row_weight[2, 2] = 0
    grad_output = torch.randn(shape) if reduction == "none" else torch.tensor(3.0)
    for kept in (
        {},
        {"mask": mask},
        {"row_weight": row_weight},
        {"mask": mask, "row_weight": row_weight},
    ):
        for smoothing in (0.0, 0.1):
            check(
                backend, student, teacher, grad_output, labels=labels, hard_weight=0.3,
                temperature=3.0, reduction=reduction, label_smoothing=smoothing, **kept,
            )  # fmt: skip


def test_kd_formula(backend):
    """The textbook, written out: torch's own losses, and the definitions of the reductions."""
    s, t, y = logits((8, 40)), logits((8, 40)), torch.randint(40, (8,))
    y[2] = -100
    keep = y != -100
    w = torch.rand(8) + 0.1
    log_q, p = F.log_softmax(s / 3, -1), F.softmax(t / 3, -1)
    q, log_p = log_q.exp(), p.log()
    soft = {
        "forward_kl": (p * (log_p - log_q)).sum(-1),
        "reverse_kl": (q * (log_q - log_p)).sum(-1),
        "cross_entropy": -(p * log_q).sum(-1),
    }
    hard = F.cross_entropy(s, y, reduction="none", label_smoothing=0.2)
    for name, divergence in soft.items():
        for t2, factor in ((True, 9.0), (False, 1.0)):
            row = torch.where(keep, 0.6 * hard + 1.5 * factor * divergence, 0.0) * w
            want = {
                "none": row,
                "sum": row.sum(),
                "mean": row.sum() / w[keep].sum(),
                "batchmean": row.sum() / 8,
            }
            for reduction, value in want.items():
                parts = fd.kd_loss(
                    s, t, y, temperature=3.0, hard_weight=0.6, soft_weight=1.5, divergence=name,
                    scale_t2=t2, label_smoothing=0.2, row_weight=w, reduction=reduction,
                    return_parts=True,
                )  # fmt: skip
                torch.testing.assert_close(parts.loss, value, rtol=2e-6, atol=1e-6)
                torch.testing.assert_close(
                    parts.loss, 0.6 * parts.hard + 1.5 * parts.soft, rtol=1e-6, atol=1e-6
                )


def test_kd_normalizer(backend):
    """A number or a scalar tensor; micro-batches add up to the whole batch."""
    s, t, y = logits((8, 20)), logits((8, 20)), torch.randint(20, (8,))
    y[:3] = -100
    whole = run(backend, s, t, labels=y, hard_weight=1.0)
    for count in (5, 5.0, torch.tensor(5), torch.tensor(5.0, dtype=F64)):
        parts = [
            run(backend, s[i], t[i], labels=y[i], hard_weight=1.0, normalizer=count)
            for i in (slice(0, 4), slice(4, 8))
        ]
        torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
        torch.testing.assert_close(torch.cat([parts[0][3], parts[1][3]]), whole[3])


def test_kd_layouts(backend):
    """Strided rows, a shifted view, classes first, one dimension: as the dense copy."""
    base = logits((3, 9, 40))
    other = logits((3, 9, 40))
    views = [
        lambda x: x[:, :-1],
        lambda x: x[:, ::2],
        lambda x: x[::2],
        lambda x: x.transpose(0, 1),
        lambda x: x[:, :, :30],
        lambda x: x[:, :, ::2],
        lambda x: x[1, 2],
        lambda x: x[1:2, 2:3].expand(4, 5, 40),
        lambda x: x[:, None, :, :].expand(3, 2, 9, 40)[:, :, :-1],
    ]
    for view in views:
        s, t = view(base), view(other)
        y = torch.randint(s.shape[-1], s.shape[:-1])
        settings = {"labels": y, "hard_weight": 0.5, "temperature": 2.0, "reduction": "none"}
        got = run(backend, s, t, torch.rand(y.shape), **settings)
        torch.manual_seed(0)
        grads = torch.rand(y.shape)
        got = run(backend, s, t, grads, **settings)
        want = run(backend, s.contiguous(), t.contiguous(), grads, **settings)
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g, w)
    x, z = base[:, :, :6].permute(0, 2, 1), other[:, :, :6].permute(0, 2, 1)
    for dim in (1, -2):
        got = run(backend, x, z, dim=dim, temperature=2.0)
        want = run(backend, x.movedim(1, -1), z.movedim(1, -1), temperature=2.0)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[3], want[3].movedim(-1, 1))


def test_kd_strided_leaf_gradient_reaches_the_base(backend):
    base = logits((2, 5, 8)).requires_grad_()
    fd.kd_loss(base[:, :-1], logits((2, 4, 8))).backward()
    assert (base.grad[:, -1] == 0).all() and (base.grad[:, :-1] != 0).all()


@pytest.mark.parametrize("noise", [1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_kd_near_the_teacher(backend, divergence, noise):
    """Where two log-softmaxes subtracted lose 8 %, and go negative."""
    student = logits((4, 32000))
    teacher = student + noise * torch.randn_like(student)
    for temperature in (1.0, 2.0, 3.0):
        settings = {"temperature": temperature, "divergence": divergence}
        got = run(backend, student, teacher, **settings)
        want = run("reference", student.double(), teacher.double(), **settings)
        assert abs(got[0].double() - want[0]) <= 1e-2 * want[0]
        assert (got[3] - want[3]).norm() <= 2e-2 * want[3].norm()
        rows = run(backend, student, teacher, torch.ones(4), reduction="none", **settings)[0]
        assert (rows >= 0).all()


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_kd_identical_logits_are_exactly_zero(backend, divergence, dtype):
    for classes in (1, 2, 10, 100, 5000, 50257):
        for temperature in (0.3, 1.0, 2.0, 3.0):
            x = logits((3, classes), dtype, 8.0)
            x[0, 0] = float("-inf") if classes > 1 else 0.0
            wider = x.to(F64 if dtype is F64 else F32)
            for student, teacher in ((x, x.clone()), (x, wider), (wider, x)):
                out = run(backend, student, teacher, temperature=temperature, divergence=divergence)
                assert out[0] == 0
                assert (out[3] == 0).all()


def test_kd_never_negative(backend):
    for scale in (1e-7, 1e-6, 1e-5, 1e-4, 1e-2, 1.0, 30.0):
        s = logits((64, 257))
        t = s + scale * torch.randn_like(s)
        for divergence in ("forward_kl", "reverse_kl"):
            rows = fd.kd_loss(s, t, divergence=divergence, reduction="none", temperature=2.0)
            assert (rows >= 0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_kd_bfloat16_gradient_within_a_third_of_a_percent(backend, divergence):
    s, t = logits((64, 4000), BF16), logits((64, 4000), BF16)
    y = torch.randint(4000, (64,))
    settings = {"labels": y, "hard_weight": 0.5, "temperature": 2.0, "divergence": divergence}
    got = run(backend, s, t, **settings)[3].double()
    want = run("reference", s.double(), t.double(), **settings)[3]
    assert (got - want).norm() <= 3e-3 * want.norm()


def test_kd_float16_survives_a_large_batch_and_a_loss_scale(backend):
    """1 / N inside a float16 gradient would make it 98.6 % zeros before the scaler multiplies."""
    s, t = logits((4096, 1000), F16), logits((4096, 1000), F16)
    y = torch.randint(1000, (4096,))
    settings = {"labels": y, "hard_weight": 0.5, "temperature": 2.0}
    for divergence in DIVERGENCES:
        got = run(backend, s, t, torch.tensor(65536.0), divergence=divergence, **settings)[3]
        want = run(
            "reference", s.double(), t.double(), torch.tensor(65536.0), divergence=divergence,
            **settings,
        )[3]  # fmt: skip
        assert (got.double() - want).norm() <= 1e-3 * want.norm()
        assert ((got == 0) & (want.abs() > 1e-6)).sum() == 0


def test_kd_float16_large_reverse_kl_does_not_overflow_before_its_divisor(backend):
    s, t = logits((512, 100), F16, 200.0), logits((512, 100), F16, 200.0)
    got = run(backend, s, t, divergence="reverse_kl", temperature=4.0)[3]
    want = run("reference", s.double(), t.double(), divergence="reverse_kl", temperature=4.0)[3]
    assert got.isfinite().all()
    assert (got.double() - want).norm() <= 2e-3 * want.norm()


@pytest.mark.parametrize("classes", [10, 100, 1024, 5000])
def test_kd_bf16_gradients_are_rounded_to_nearest(backend, classes):
    """Not cut off, which a budget of one rounding would let pass."""
    s, t = logits((20, classes), BF16), logits((20, classes), BF16)
    y = torch.randint(classes, (20,))
    settings = {"labels": y, "hard_weight": 0.5, "temperature": 2.0}
    got = run(backend, s, t, **settings)[3]
    want = run(backend, s.float(), t.float(), **settings)[3]
    assert got.dtype is BF16
    assert torch.equal(got, want.to(BF16))
