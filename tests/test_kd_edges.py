"""kd_loss at the edges: infinities, NaN, dropped rows, empty batches, extreme logits."""

import itertools

import pytest
import torch
from test_kd_values import BF16, DIVERGENCES, F16, F32, F64, check, logits, run

import fastdistill as fd

INF, NAN = float("inf"), float("nan")
WEIGHTS = ((0.0, 1.0), (1.0, 0.0), (0.5, 0.5))


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("classes", [40, 5000])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_kd_a_bad_row_stays_alone(backend, divergence, classes, dtype):
    """NaN, +inf and rows of only -inf give NaN for that row, loss and whole gradient."""
    spoil = [
        lambda s, t: s.__setitem__(3, NAN),
        lambda s, t: t.__setitem__(classes - 1, NAN),
        lambda s, t: s.__setitem__(7, INF),
        lambda s, t: t.__setitem__(7, INF),
        lambda s, t: s.fill_(-INF),
        lambda s, t: t.fill_(-INF),
        lambda s, t: s.fill_(NAN),
    ]
    s, t = logits((len(spoil) + 2, classes), dtype), logits((len(spoil) + 2, classes), dtype)
    clean = run(backend, s, t, torch.ones(len(s)), divergence=divergence, reduction="none")
    for i, change in enumerate(spoil):
        change(s[i + 1], t[i + 1])
    loss, _, soft, grad = run(
        backend, s, t, torch.ones(len(s)), divergence=divergence, reduction="none", temperature=1.0
    )
    assert loss[1:-1].isnan().all() and soft[1:-1].isnan().all()
    assert grad[1:-1].isnan().all()
    for i in (0, -1):
        assert torch.equal(loss[i], clean[0][i]) and torch.equal(grad[i], clean[3][i])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_kd_a_bad_row_and_the_mean(backend, weights):
    s, t, y = logits((4, 20)), logits((4, 20)), torch.randint(20, (4,))
    s[2, 5] = NAN
    settings = {"labels": y, "hard_weight": weights[0], "soft_weight": weights[1]}
    loss, _, _, grad = run(backend, s, t, **settings)
    assert loss.isnan()
    assert grad[2].isnan().all() and grad[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("classes", [30, 4500])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_kd_masked_classes(backend, divergence, classes):
    """-inf on both sides: as if the class were not there."""
    s, t, y = logits((6, classes)), logits((6, classes)), torch.randint(5, (6,))
    masked = torch.rand(6, classes) < 0.3
    masked[:, :5] = False
    masked[0, 5:] = torch.arange(5, classes) >= 4096  # all that a kernel reads at once, and more
    settings = {"labels": y, "hard_weight": 0.4, "temperature": 2.0, "divergence": divergence}
    got = run(
        backend, s.masked_fill(masked, -INF), t.masked_fill(masked, -INF), torch.ones(6),
        reduction="none", **settings,
    )  # fmt: skip
    for i in range(6):
        keep = ~masked[i]
        want = run(
            "reference", s[i, keep].double(), t[i, keep].double(), reduction="none",
            **{**settings, "labels": y[i]},
        )  # fmt: skip
        torch.testing.assert_close(got[0][i].double(), want[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got[3][i, keep].double(), want[3], rtol=1e-5, atol=1e-7)
        assert (got[3][i, masked[i]] == 0).all()


def test_kd_student_masks_what_the_teacher_wants(backend):
    s, t = logits((2, 12)), logits((2, 12))
    s[0, 4] = -INF
    loss, _, _, grad = run(backend, s, t, torch.ones(2), reduction="none", temperature=2.0)
    assert loss[0] == INF and loss[1].isfinite()
    want = 2.0 * (torch.softmax(s / 2, -1) - torch.softmax(t / 2, -1))
    torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-7)
    loss, _, _, grad = run(
        backend, s, t, torch.ones(2), reduction="none", divergence="cross_entropy"
    )
    assert loss[0] == INF and grad.isfinite().all()


def test_kd_infinite_reverse_kl_has_a_nan_gradient(backend):
    s, t = logits((3, 12)), logits((3, 12))
    t[1, 4] = -INF
    s[2, 4] = -INF  # finite: 0 log 0
    loss, _, _, grad = run(backend, s, t, torch.ones(3), reduction="none", divergence="reverse_kl")
    assert loss[1] == INF and loss[[0, 2]].isfinite().all()
    assert grad[1].isnan().all() and grad[[0, 2]].isfinite().all()
    want = run("reference", s[[2]].double(), t[[2]].double(), divergence="reverse_kl")
    torch.testing.assert_close(grad[[2]].double(), want[3], rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1e-3, 1.0, 2.0, 1e3])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_kd_extreme_logits(backend, dtype, temperature, divergence):
    s, t = logits((8, 500), dtype), logits((8, 500), dtype)
    s[0, 0], s[1, 3], t[2, 9], t[3, 400] = 1e4, -1e4, 1e4, -1e4
    s[4], t[4] = s[4] * 1e3, t[4] * 1e3
    s[5, 7] = t[5, 7] = 1e4
    s[6], t[6] = 1e4, -1e4
    check(
        backend, s, t, torch.ones(8), temperature=temperature, divergence=divergence,
        reduction="none", labels=torch.randint(500, (8,)), hard_weight=0.3,
    )  # fmt: skip


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("classes", [5, 33, 100])
def test_kd_any_class_may_be_the_largest(backend, classes, divergence):
    """Of either, by so much that the exponentials overflow where a row's maximum is not seen."""
    s = logits((classes, classes)).fill_diagonal_(1e4)
    t = logits((classes, classes)).fill_diagonal_(1e4).roll(3, 1)
    check(
        backend, s, t, torch.ones(classes), divergence=divergence, reduction="none",
        labels=torch.arange(classes), hard_weight=0.3,
    )  # fmt: skip


@pytest.mark.parametrize("temperature", [1e-35, 1e-31, 1e31, 1e35])
def test_kd_temperatures_beyond_the_range_of_float(backend, temperature):
    s, t = logits((3, 40)), logits((3, 40))
    s[1, 2] = t[1, 2] = -INF
    loss, _, _, grad = run(backend, s, t, temperature=temperature, scale_t2=False)
    assert loss >= 0 and not grad.isnan().any()
    if temperature > 1:
        assert loss < 1e-6


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("how", ["mask", "ignore_index", "row_weight"])
@pytest.mark.parametrize("poison", [NAN, INF])
def test_kd_dropped_rows_are_not_looked_at(backend, weights, how, poison):
    s, t, y = logits((5, 30)), logits((5, 30)), torch.randint(30, (5,))
    keep = torch.tensor([True, False, True, True, False])
    settings = {"hard_weight": weights[0], "soft_weight": weights[1], "temperature": 2.0}
    want = run(backend, s[keep], t[keep], labels=y[keep], **settings)
    s[~keep], t[~keep] = poison, poison
    if how == "mask":
        y[~keep] = 10**9  # a label under a False mask is not looked at either
        settings["mask"] = keep
    elif how == "ignore_index":
        y = torch.where(keep, y, 7777)
        settings["ignore_index"] = 7777
    else:
        settings["row_weight"] = keep.to(F32)
    got = run(backend, s, t, labels=y, **settings)
    for g, w in zip(got[:3], want[:3], strict=True):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=0)
    torch.testing.assert_close(got[3][keep], want[3], rtol=2e-6, atol=0)
    assert (got[3][~keep] == 0).all()


def test_kd_ignored_labels_drop_the_soft_term_too(backend):
    s, t, y = logits((4, 9)), logits((4, 9)), torch.tensor([1, -100, 3, -100])
    got = run(backend, s, t, labels=y, hard_weight=0.0)
    want = run(backend, s[[0, 2]], t[[0, 2]])
    torch.testing.assert_close(got[0], want[0])
    assert (got[3][[1, 3]] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "batchmean"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_kd_nothing_kept_is_a_differentiable_zero(backend, reduction, dtype):
    everything = {"labels": torch.full((3, 2), -100)}
    for s, t, settings in (
        (torch.full((3, 2, 9), NAN), torch.full((3, 2, 9), NAN), everything),
        (logits((0, 2, 9)), logits((0, 2, 9)), {"labels": torch.zeros((0, 2), dtype=torch.int64)}),
        (logits((2, 0, 9)), logits((2, 0, 9)), {}),
    ):
        student = s.to(dtype).requires_grad_()
        for weight in (0.0, 0.5) if "labels" in settings else (0.0,):
            loss = fd.kd_loss(
                student, t.to(dtype), reduction=reduction, hard_weight=weight, **settings
            )
            assert (loss == 0).all()
            student.grad = None
            loss.sum().backward()
            assert student.grad.shape == student.shape and (student.grad == 0).all()


@pytest.mark.parametrize("dtype", [F32, F16])
def test_kd_both_weights_zero(backend, dtype):
    s = logits((3, 9), dtype)
    s[0, 0] = NAN
    loss, hard, soft, grad = run(backend, s, logits((3, 9), dtype), soft_weight=0.0)
    assert loss == 0 and hard == 0 and soft == 0 and (grad == 0).all()


def test_kd_a_term_of_weight_zero_is_not_computed(backend):
    s, t, y = logits((3, 9)), torch.full((3, 9), NAN), torch.randint(9, (3,))
    loss, hard, soft, grad = run(backend, s, t, labels=y, hard_weight=1.0, soft_weight=0.0)
    assert loss.isfinite() and soft == 0 and torch.equal(loss, hard) and grad.isfinite().all()
    loss, hard, soft, _ = run(backend, s, logits((3, 9)), labels=y)
    assert hard == 0 and torch.equal(loss, soft)


def test_kd_one_class_and_one_dimension(backend):
    loss, _, _, grad = run(
        backend, logits((3, 1)), logits((3, 1)), labels=torch.zeros(3, dtype=torch.int64),
        hard_weight=0.5,
    )  # fmt: skip
    assert loss == 0 and (grad == 0).all()
    s, t = logits((7,)), logits((7,))
    got = run(backend, s, t, labels=torch.tensor(2), hard_weight=0.5, mask=torch.tensor(True))
    want = run(backend, s[None], t[None], labels=torch.tensor([2]), hard_weight=0.5)
    assert got[0].shape == () and torch.equal(got[0], want[0])
    assert torch.equal(got[3], want[3][0])


def test_kd_inputs_stay_as_they_are(backend):
    for dtype in (F32, BF16, F16):
        s, t, y = logits((4, 33), dtype), logits((4, 33), dtype), torch.randint(33, (4,))
        w, m = torch.rand(4), torch.rand(4) > 0.5
        before = [x.clone() for x in (s, t, y, w, m)]
        run(backend, s, t, labels=y, hard_weight=0.5, row_weight=w, mask=m, temperature=2.0)
        assert all(torch.equal(a, b) for a, b in zip((s, t, y, w, m), before, strict=True))


def test_kd_shift_invariance(backend):
    """Softmax does not see a constant added to a row, and so must the loss not."""
    s, t, y = logits((4, 64)), logits((4, 64)), torch.randint(64, (4,))
    for divergence, shift in itertools.product(DIVERGENCES, (256.0, -512.0)):
        settings = {"labels": y, "hard_weight": 0.5, "temperature": 2.0, "divergence": divergence}
        want = run(backend, s, t, **settings)
        got = run(backend, s + shift, t - shift, **settings)
        torch.testing.assert_close(got[0], want[0], rtol=2e-5, atol=1e-6)
        torch.testing.assert_close(got[3], want[3], rtol=1e-3, atol=1e-5)


def test_kd_rows_beyond_32_bits(cpu):
    """Row offsets past 2^31 elements, without the memory: the rows of an expanded tensor."""
    row = logits((1, 4, 70_000), BF16)
    wide = row.expand(8000, 4, 70_000)
    assert wide.numel() > 2**31
    mask = torch.zeros(8000, 4, dtype=torch.bool)
    mask[7999, 3] = mask[0, 0] = True
    t = logits((1, 4, 70_000), BF16)
    with torch.no_grad():
        rows = fd.kd_loss(wide, t.expand_as(wide), mask=mask, reduction="none")
    want = fd.kd_loss(row, t, reduction="none")
    assert rows[7999, 3] == want[0, 3] and rows[0, 0] == want[0, 0]
    assert rows[~mask].eq(0).all()


@pytest.mark.slow
def test_kd_a_dense_tensor_beyond_32_bits(cpu):
    """A real one: 4.3 GB of logits, gradient included."""
    shape = (17_000, 128_256)
    s = torch.zeros(shape, dtype=BF16)
    t = torch.zeros(shape, dtype=BF16)
    s[-1, -1], t[-1, 3] = 5.0, 4.0
    s.requires_grad_()
    fd.kd_loss(s, t, reduction="sum").backward()
    want = run("reference", s[-1:].detach(), t[-1:], reduction="sum")[3]
    torch.testing.assert_close(s.grad[-1:], want, rtol=1e-2, atol=1e-6)
    assert (s.grad[:-1] == 0).all()
