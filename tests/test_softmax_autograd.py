"""temperature_softmax as a citizen of autograd: op checks, compile, transforms, second order."""

import subprocess
import sys

import pytest
import torch
from test_softmax_values import BF16, DTYPES, F16, F32, F64, FUNCTIONS, logits

import fastdistill as fd

OPS = torch.ops.fastdistill


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("log", [False, True])
def test_softmax_opcheck(cpu, dtype, log):
    x, t = logits((2, 3, 17), dtype), torch.rand(2, 3) + 1
    for temperature in (None, t):
        torch.library.opcheck(OPS.softmax_fwd.default, (x, temperature, 2.0, log, "cpu"))
        _, stats = OPS.softmax_fwd(x, temperature, 2.0, log, "cpu")
        need = temperature is not None
        arguments = (logits(x.shape, dtype), x, stats, temperature, 2.0, log, need, "cpu")
        torch.library.opcheck(OPS.softmax_bwd.default, arguments)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_softmax_gradcheck(backend, function):
    """First and second order, of x and of T, also where one of them alone requires a gradient."""
    x, t = logits((3, 7), F64, 1.0), torch.rand(3, dtype=F64) + 0.5
    for need_x, need_t in ((True, True), (True, False), (False, True)):
        inputs = (x.clone().requires_grad_(need_x), t.clone().requires_grad_(need_t))
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
    x = x.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: function(v, 2.5, 0), x)
    assert torch.autograd.gradgradcheck(lambda v: function(v, 2.5, 0), x)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_softmax_third_order(cpu, function):
    """The derivative of the fused gradient can be differentiated again."""
    x, t = logits((2, 5), F64, 1.0), torch.rand(2, dtype=F64) + 1

    def third(v, temperature):
        out = function(v, temperature).square().sum()
        for _ in range(2):
            (g,) = torch.autograd.grad(out, v, create_graph=True)
            out = (g * torch.arange(10.0, dtype=F64).view(2, 5)).sum()
        return torch.autograd.grad(out, v)[0]

    got = third(x.clone().requires_grad_(), t)
    with fd.backend("reference"):
        want = third(x.clone().requires_grad_(), t)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_softmax_gradient_penalty(backend, dtype):
    """A chain in front, a loss behind, both orders in one backward."""
    w, data, t = logits((6, 9), dtype, 0.5), logits((4, 6), dtype, 1.0), torch.rand(4) + 1

    def penalty(w, data, t):
        x = data @ w
        y = fd.temperature_softmax(x, t)
        (g,) = torch.autograd.grad(y[:, 0].sum(), x, create_graph=True)
        (y[:, 1].float().sum() + 10 * g.float().square().sum()).backward()

    leaves = [v.clone().requires_grad_() for v in (w, t)]
    penalty(leaves[0], data, leaves[1])
    exact = [v.double().requires_grad_() for v in (w, t)]
    with fd.backend("reference"):
        penalty(exact[0], data.double(), exact[1])
    for got, want in zip(leaves, exact, strict=True):
        close = 40 * torch.finfo(dtype).eps * want.grad.norm()
        assert (got.grad.double() - want.grad).norm() <= close


def test_softmax_create_graph_gives_the_same_first_derivative(cpu):
    x, grad = logits((4, 33)).requires_grad_(), logits((4, 33))
    y = fd.temperature_softmax(x, 2.0)
    (plain,) = torch.autograd.grad(y, x, grad, retain_graph=True)
    (graph,) = torch.autograd.grad(y, x, grad, create_graph=True)
    assert graph.requires_grad and torch.equal(plain, graph)
    assert torch.equal(torch.autograd.grad(y, x, grad)[0], plain)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_softmax_transforms_are_right_under_auto(function):
    x, t = logits((3, 5), F64, 1.0), torch.rand(3, dtype=F64) + 0.5

    def loss(v, temperature=t):
        return function(v, temperature).square().sum()

    with fd.backend("reference"):
        hessian = torch.autograd.functional.hessian(loss, x)
        leaf = x.clone().requires_grad_()
        loss(leaf).backward()
    torch.testing.assert_close(torch.func.grad(loss)(x), leaf.grad)
    torch.testing.assert_close(torch.func.hessian(loss)(x), hessian)
    v = torch.randn_like(x)
    want = (leaf.grad * v).sum()
    torch.testing.assert_close(torch.func.jvp(loss, (x,), (v,))[1], want)
    torch.testing.assert_close(torch.func.vmap(function)(x, t), function(x, t))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        tangent = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
    torch.testing.assert_close(tangent, want)


def test_softmax_a_bad_temperature_under_a_transform_is_a_nan_row():
    rows = torch.func.vmap(fd.temperature_softmax)(logits((3, 5)), torch.tensor([1.0, -1.0, 2.0]))
    assert rows.isnan().all(-1).tolist() == [False, True, False]
    assert not rows[[0, 2]].isnan().any()


def test_softmax_transforms_on_an_explicit_kernel_raise(cpu):
    with pytest.raises(RuntimeError, match="functorch transforms.*reference"):
        torch.func.grad(lambda v: fd.temperature_softmax(v)[0])(logits((5,)))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_softmax_compiles_whole(backend, function, dtype):
    """fullgraph: no break, in the forward and in the backward; the same numbers."""
    torch._dynamo.reset()
    x, t = logits((4, 50), dtype), torch.rand(4) + 1

    def loss(v, temperature):
        return (function(v, temperature) * torch.arange(50)).sum() + function(v, 2.0, 0)[0, 0]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for f in (loss, compiled):
        leaves = [v.clone().requires_grad_() for v in (x, t)]
        value = f(*leaves)
        value.backward()
        results.append((value.detach(), *(v.grad for v in leaves)))
    for eager, whole in zip(*results, strict=True):
        torch.testing.assert_close(whole, eager, rtol=1e-5, atol=1e-6)


def test_softmax_compiles_whole_as_the_first_call_of_a_process(cpu):
    code = (
        "import torch, fastdistill as fd\n"
        "x = torch.randn(4, 9, requires_grad=True)\n"
        "f = torch.compile(fd.temperature_log_softmax, fullgraph=True, backend='aot_eager')\n"
        "f(x, 2.0).sum().backward()\n"
        "assert x.grad.isfinite().all()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_softmax_inductor(cpu):
    torch._dynamo.reset()
    x = logits((4, 50)).requires_grad_()
    compiled = torch.compile(
        lambda v: fd.temperature_softmax(v * 2, 3.0)[:, 0].sum(), fullgraph=True
    )
    compiled(x).backward()
    got, x.grad = x.grad, None
    fd.temperature_softmax(x * 2, 3.0)[:, 0].sum().backward()
    torch.testing.assert_close(got, x.grad)


def test_softmax_a_schedule_of_temperatures_compiles_whole(cpu):
    torch._dynamo.reset()
    x = logits((4, 9))
    compiled = torch.compile(fd.temperature_softmax, fullgraph=True, backend="aot_eager")
    for temperature in (2.0, 1.5, 1.0):
        assert torch.equal(compiled(x, temperature), fd.temperature_softmax(x, temperature))


def test_softmax_without_need_of_gradient(backend):
    x, t = logits((3, 7)), torch.ones(3)
    assert not fd.temperature_softmax(x, t).requires_grad
    with torch.no_grad():
        assert not fd.temperature_softmax(x.requires_grad_(), t.requires_grad_()).requires_grad
    with torch.inference_mode():
        fd.temperature_softmax(logits((3, 7)), 2.0)


def test_softmax_only_what_requires_a_gradient_gets_one(backend):
    x, t = logits((3, 7)).requires_grad_(), torch.ones(3)
    fd.temperature_softmax(x, t)[:, 0].sum().backward()
    assert x.grad is not None and t.grad is None
    x, t = x.detach(), t.requires_grad_()
    fd.temperature_softmax(x, t)[:, 0].sum().backward()
    assert x.grad is None and t.grad is not None


def test_softmax_a_change_of_its_input_is_noticed(cpu):
    x = logits((3, 7)).requires_grad_()
    z = x * 1
    y = fd.temperature_softmax(z)
    z.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_softmax_keeps_its_dtype_under_autocast(backend):
    with torch.autocast("cpu", dtype=BF16):
        for dtype in (F32, BF16):
            assert fd.temperature_softmax(logits((3, 5), dtype)).dtype is dtype


def test_softmax_retain_graph_hooks_and_checkpoint(cpu):
    x = logits((4, 9)).requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        y = fd.temperature_softmax(x, 2.0)
    first = torch.autograd.grad(y[:, 0].sum(), x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y[:, 0].sum(), x)[0], first)
    torch.utils.checkpoint.checkpoint(
        lambda v: fd.temperature_softmax(v, 2.0)[:, 0].sum(), x, use_reentrant=False
    ).backward()
    assert torch.equal(x.grad, first)
