"""temperature_softmax and its logarithm: every backend against the oracle in float64."""

import pytest
import torch
from budget import assert_within

import fastdistill as fd
from fastdistill import _native

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (F32, F64, BF16, F16)
FUNCTIONS = (fd.temperature_softmax, fd.temperature_log_softmax)


def run(backend, function, x, temperature, grad, dim=-1):
    """(y, gradient of x, gradient of the temperature or None) through the public function."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    learned = isinstance(temperature, torch.Tensor)
    if learned:
        temperature = temperature.detach().clone().requires_grad_()
    with fd.backend(backend):
        y = function(x, temperature, dim)
    y.backward(grad)
    return y.detach(), x.grad, temperature.grad if learned else None


def doubled(temperature):
    return temperature.double() if isinstance(temperature, torch.Tensor) else temperature


def check(backend, function, x, temperature, grad, dim=-1):
    """Within the budget of float64 on the same (rounded) inputs."""
    got = run(backend, function, x, temperature, grad, dim)
    want = run("reference", function, x.double(), doubled(temperature), grad.double(), dim)
    native = run("reference", function, x, temperature, grad, dim)
    if x.numel() == 0:
        assert all(g is None or g.numel() == 0 for g in got)
        return
    for name, g, w, n in zip(("y", "gradient"), got, want, native, strict=False):
        assert g.dtype == x.dtype and g.shape == x.shape
        w = torch.where(w.to(x.dtype).isinf(), w.to(x.dtype).double(), w)  # it overflows
        assert_within(name, *(v.movedim(dim, -1) for v in (g, w, n)))
    if got[2] is not None:
        assert got[2].dtype == temperature.dtype and got[2].shape == temperature.shape
        # Its terms cancel, so that the error of one row says little: the worst counts for all.
        # It is computed as x is, whatever type it is stored in.
        t = got[2] if x.dtype is F64 or got[2].dtype is not F64 else got[2].float()
        assert_within("temperature", *(v.reshape(1, -1) for v in (t, want[2], native[2])))


def logits(shape, dtype=F32, spread=3.0):
    return (torch.randn(shape) * spread).to(dtype)


def temperatures(shape, dtype=F32):
    return (torch.rand(shape) * 3 + 0.3).to(dtype)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax_values_and_grads(backend, dtype, function):
    for shape in ((1, 1), (3, 2), (5, 33), (70, 10), (2, 3, 100), (3, 2048), (3, 2049), (2, 6000)):
        for temperature in (1.0, 2.5, temperatures(shape[:-1])):
            check(backend, function, logits(shape, dtype), temperature, logits(shape, dtype, 1.0))


@pytest.mark.skipif(_native.cpu().module is None, reason=str(_native.cpu().reason))
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_softmax_few_classes_on_the_cpu(function, dtype):
    """16 rows at once: whole groups and the rest of one, widths around a vector and the bounds."""
    for shape in ((17, 1), (37, 15), (16, 16), (5, 96), (33, 112), (18, 191), (16, 192), (3, 193)):
        check("cpu", function, logits(shape, dtype), 2.5, logits(shape, dtype, 1.0))
    x, grad = logits((600, 100), dtype), logits((600, 100), dtype, 1.0)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run("cpu", function, x, 2.5, grad)[:2])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    alone = run("cpu", function, x[7:8], 2.5, grad[7:8])
    assert torch.equal(alone[0], results[0][0][7:8])  # no row knows of its neighbours


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("temperature", [1e-3, 0.1, 1.0, 4, 1e3])
def test_softmax_temperatures(backend, temperature, function):
    for dtype in (F32, BF16):
        x, grad = logits((4, 3000), dtype), logits((4, 3000), dtype, 1.0)
        check(backend, function, x, temperature, grad)
        check(backend, function, x, torch.full((4,), float(temperature)), grad)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("classes", [32000, 50257, 128256])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_softmax_vocabularies(backend, classes, dtype, function):
    x, grad = logits((2, classes), dtype), logits((2, classes), dtype, 1.0)
    check(backend, function, x, 2.0, grad)
    # Of two rows' temperatures the native error would be a matter of luck.
    x, grad = logits((8, classes), dtype), logits((8, classes), dtype, 1.0)
    check(backend, function, x, temperatures(8), grad)


@pytest.mark.parametrize("of", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax_dtypes_of_the_temperature(backend, dtype, of):
    """Any with any: the output has x's dtype, each gradient that of its input."""
    for function in FUNCTIONS:
        check(
            backend, function, logits((6, 40), dtype), temperatures(6, of), logits((6, 40), dtype)
        )


@pytest.mark.parametrize("function", FUNCTIONS)
def test_softmax_is_torch_s(backend, function):
    theirs = torch.softmax if function is fd.temperature_softmax else torch.log_softmax
    x = logits((4, 5, 6), spread=1.0)
    for dim in (-1, 0, 1, 2, -3):
        torch.testing.assert_close(function(x, 2.0, dim), theirs(x / 2, dim))
        assert function(x, 2.0, dim).is_contiguous()
        rows = x.movedim(dim, -1).shape[:-1]
        t = temperatures(rows)
        want = theirs(x / t.unsqueeze(dim if dim >= 0 else dim + 3), dim)
        torch.testing.assert_close(function(x, t, dim=dim), want)
        check(backend, function, x, t, logits(x.shape), dim)
    assert torch.equal(function(x), function(x, 1.0, -1))
    assert torch.equal(function(x, torch.ones(4, 5)), function(x))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_softmax_layouts(backend, function, dtype):
    """Strided rows, shifted views, expanded rows and gradients: as the dense copy, to the bit."""
    base, other = logits((3, 9, 40), dtype), logits((3, 9, 40), dtype)
    views = [
        lambda x: x[:, :-1],
        lambda x: x[:, ::2],
        lambda x: x.transpose(0, 1),
        lambda x: x[:, :, 3:33],
        lambda x: x[:, :, ::2],
        lambda x: x[1, 2],
        lambda x: x[1:2, 2:3].expand(4, 5, 40),
        lambda x: x[:, None, :, :].expand(3, 2, 9, 40)[:, :, :-1],
        lambda x: x[0, 0, :1].expand(7, 30),
    ]
    for view in views:
        x, grad = view(base), view(other)
        for temperature in (2.0, temperatures((*x.shape[:-1], 2))[..., 0]):
            got = run(backend, function, x, temperature, grad)
            dense = temperature.contiguous() if torch.is_tensor(temperature) else temperature
            want = run(backend, function, x.contiguous(), dense, grad.contiguous())
            for g, w in zip(got, want, strict=True):
                assert g is w is None or torch.equal(g, w)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_softmax_bfloat16_gradient_within_a_third_of_a_percent(backend, spread, function):
    """Also where one class takes nearly all: an output rounded to bfloat16 would be 1 - 0.996."""
    x, grad = logits((64, 4000), BF16, spread), logits((64, 4000), BF16, 1.0)
    _, got, _ = run(backend, function, x, 2.0, grad)
    _, want, _ = run("reference", function, x.double(), 2.0, grad.double())
    assert (got.double() - want).norm() <= 3e-3 * want.norm()


def test_softmax_learns_a_temperature(backend):
    """A calibration: the temperature that the labels were drawn at is found again."""
    x = logits((4000, 10))
    labels = torch.distributions.Categorical(logits=x / 2.5).sample()
    log_t = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=30)

    def loss():
        optimizer.zero_grad()
        log_p = fd.temperature_log_softmax(x, log_t.exp().expand(4000))
        out = torch.nn.functional.nll_loss(log_p, labels)
        out.backward()
        return out

    optimizer.step(loss)
    assert abs(float(log_t.detach().exp()) - 2.5) < 0.15
