"""temperature_softmax at the edges: infinities, NaN, no rows, extreme logits, large tensors."""

import pytest
import torch
from test_softmax_values import BF16, DTYPES, F16, F32, F64, FUNCTIONS, check, logits, run

import fastdistill as fd

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [40, 5000])
@pytest.mark.parametrize("learned", [False, True])
def test_softmax_a_bad_row_stays_alone(backend, classes, dtype, function, learned):
    """NaN, +inf and rows of only -inf give NaN for that row, output and whole gradient."""
    spoil = [
        lambda x: x.__setitem__(3, NAN),
        lambda x: x.__setitem__(classes - 1, NAN),
        lambda x: x.__setitem__(7, INF),
        lambda x: x.fill_(-INF),
        lambda x: x.fill_(NAN),
        lambda x: x.fill_(INF),
    ]
    x = logits((len(spoil) + 2, classes), dtype)
    grad = logits(x.shape, dtype, 1.0)
    temperature = torch.full(x.shape[:1], 2.0) if learned else 2.0
    clean = run(backend, function, x, temperature, grad)
    for i, change in enumerate(spoil):
        change(x[i + 1])
    got = run(backend, function, x, temperature, grad)
    for g, c in zip(got, clean, strict=True):
        if g is not None:
            assert g[1:-1].isnan().all()
            assert torch.equal(g[[0, -1]], c[[0, -1]])


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("classes", [30, 4500])
def test_softmax_masked_classes(backend, classes, function):
    """-inf masks a class: the others are as if it were not there, for the temperature too."""
    x, grad, t = logits((6, classes)), logits((6, classes), spread=1.0), torch.rand(6) + 0.5
    masked = torch.rand(6, classes) < 0.3
    masked[:, :5] = False
    masked[0, :2048] = torch.arange(min(2048, classes)) >= 5  # nearly a whole block
    masked[1, 2048:4096] = True  # a whole one
    grad[masked] = 0
    y, gx, gt = run(backend, function, x.masked_fill(masked, -INF), t, grad)
    nothing = 0.0 if function is fd.temperature_softmax else -INF
    assert (y[masked] == nothing).all() and (gx[masked] == 0).all()
    for i in range(6):
        keep = ~masked[i]
        want = run(
            "reference", function, x[i, keep].double(), t[i].double(), grad[i, keep].double()
        )
        torch.testing.assert_close(y[i, keep].double(), want[0], rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(gx[i, keep].double(), want[1], rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(gt[i].double(), want[2], rtol=1e-4, atol=1e-5)


def test_softmax_masked_classes_are_torch_s(backend):
    """What comes back for a masked class of the logarithm is the upstream gradient over T."""
    x, grad = logits((3, 12)), logits((3, 12))
    x[0, 4] = x[1, :11] = -INF
    for function, theirs in zip(FUNCTIONS, (torch.softmax, torch.log_softmax), strict=True):
        _, got, _ = run(backend, function, x, 2.0, grad)
        leaf = x.clone().requires_grad_()
        theirs(leaf / 2.0, -1).backward(grad)
        torch.testing.assert_close(got, leaf.grad)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_softmax_extreme_logits(backend, dtype, temperature, function):
    x = logits((7, 500), dtype)
    x[0, 0], x[1, 3] = 1e4, -1e4
    x[2] *= 1e3
    x[3] = 1e4
    x[4, ::2] = -1e4
    if dtype is not F16:
        x[5] *= 1e30
        x[6, 0] = 1e35
    check(backend, function, x, temperature, logits((7, 500), dtype, 1.0))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("classes", [5, 33, 100])
def test_softmax_any_class_may_be_the_largest(backend, classes, function):
    """By so much that the exponentials overflow where the row's maximum is not seen."""
    x = logits((classes, classes)).fill_diagonal_(1e4)
    check(backend, function, x, 1.0, logits(x.shape, spread=1.0))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("temperature", [1e-35, 1e-31, 1e31, 1e35])
def test_softmax_temperatures_beyond_the_range_of_float(backend, temperature, function):
    x = logits((3, 40))
    x[1, 2] = -INF
    for t in (temperature, torch.full((3,), temperature)):
        y, _, _ = run(backend, function, x, t, torch.ones(3, 40))
        p = y if function is fd.temperature_softmax else y.exp()
        want = torch.zeros(3, 40)
        if temperature < 1:
            want[torch.arange(3), x.argmax(-1)] = 1
        else:
            want = (x > -INF) / (x > -INF).sum(-1, keepdim=True)
        torch.testing.assert_close(p, want)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(0, 9), (2, 0, 9), (3, 1), (7,), (1,)])
def test_softmax_small_shapes(backend, shape, function):
    for dtype in (F32, BF16, F64):
        for t in (2.0, torch.full(shape[:-1], 2.0)):
            check(backend, function, logits(shape, dtype), t, logits(shape, dtype))
    y, gx, gt = run(backend, function, logits((3, 1)), torch.rand(3) + 1, torch.ones(3, 1))
    assert (y == (function is fd.temperature_softmax)).all()
    assert (gx == 0).all() and (gt == 0).all()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_softmax_shift_invariance(backend, function):
    x, grad, t = logits((4, 64)), logits((4, 64)), torch.rand(4) + 1
    want = run(backend, function, x, t, grad)
    for shift in (256.0, -512.0):
        got = run(backend, function, x + shift, t, grad)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=2e-3, atol=2e-4)


def test_softmax_inputs_stay_as_they_are(backend):
    for dtype in (F32, BF16, F16):
        x, t, grad = logits((4, 33), dtype), torch.rand(4) + 1, logits((4, 33), dtype)
        before = [v.clone() for v in (x, t, grad)]
        run(backend, fd.temperature_softmax, x, t, grad)
        assert all(torch.equal(a, b) for a, b in zip((x, t, grad), before, strict=True))


def test_softmax_sums_to_one(backend):
    for classes in (10, 2047, 50257):
        y = fd.temperature_softmax(logits((5, classes)), 3.0)
        torch.testing.assert_close(y.double().sum(-1), torch.ones(5, dtype=F64), rtol=0, atol=1e-6)


def test_softmax_does_not_depend_on_threads(cpu):
    x, t, grad = logits((64, 3000)), torch.rand(64) + 1, logits((64, 3000))
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run("cpu", fd.temperature_log_softmax, x, t, grad))
    finally:
        torch.set_num_threads(threads)
    for r in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(r, results[0], strict=True))


@pytest.mark.slow
def test_softmax_a_tensor_beyond_32_bits(cpu):
    """17,000 rows of 128,256 classes in bfloat16: 4.4 GB, and as much for each result."""
    x = torch.zeros((17_000, 128_256), dtype=BF16)
    x[-1, -1] = 20.0
    x.requires_grad_()
    y = fd.temperature_softmax(x, 2.0)
    want = torch.softmax(x.detach()[-1].double() / 2, -1)
    torch.testing.assert_close(y.detach()[-1].double(), want, rtol=1e-2, atol=1e-6)
    y[-1, -1].backward()
    assert (x.grad[:-1] == 0).all() and x.grad[-1].isfinite().all()
