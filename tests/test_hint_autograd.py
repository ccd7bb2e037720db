"""hint_loss as a citizen of autograd: checks of the ops, compile, transforms, second order, AMP."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from test_hint_values import BF16, DISTANCES, F16, F32, F64, features, regressor, run

import fastdistill as fd

OPS = torch.ops.fastdistill


def op_inputs(dtype, projected=True):
    s, t = features(2, 3, 8, dtype=dtype), features(2, 3, 12 if projected else 8, dtype=dtype)
    weight, bias = regressor(12, 8, dtype) if projected else (None, None)
    return s, t, weight, bias, torch.rand(2, 3) > 0.3, torch.rand(2, 3)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("projected", [True, False])
def test_hint_opcheck(cpu, dtype, projected):
    settings = ("smooth_l1", "layer_norm", "none")
    inputs = op_inputs(dtype, projected)
    for reduction, needs in (("mean", (True, projected, projected)), ("none", (False,) * 3)):
        arguments = (*inputs, None, *settings, reduction, 1.0, *needs, "cpu")
        torch.library.opcheck(OPS.hint_fwd.default, arguments)
    _, grad, _, _, scale = OPS.hint_fwd(
        *inputs, None, *settings, "mean", 1.0, True, False, False, "cpu"
    )
    torch.library.opcheck(OPS.hint_bwd.default, (grad, scale, torch.tensor(2.0), dtype, "cpu"))
    torch.library.opcheck(OPS.hint_bwd_.default, (grad, scale, torch.tensor(2.0), "cpu"))
    needs = (True, projected, projected)
    torch.library.opcheck(
        OPS.hint_grad.default, (*inputs, torch.randn(2, 3), *settings, *needs, "cpu")
    )


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("norm", [None, "layer_norm", "l2"])
def test_hint_gradcheck(backend, distance, norm):
    s, t = features(3, 4, dtype=F64), features(3, 6, dtype=F64)
    weight, bias = regressor(6, 4, F64)

    def loss(a, w, b, reduction="none"):
        return fd.hint_loss(
            a, t, proj_weight=w, proj_bias=b, distance=distance, feature_norm=norm,
            row_weight=torch.tensor([1.0, 2.0, 0.5]), reduction=reduction,
        )  # fmt: skip

    leaves = tuple(x.requires_grad_() for x in (s, weight, bias))
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradcheck(lambda *x: loss(*x, reduction="mean"), leaves)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(loss, leaves)


WORDS = r'hint_loss.*second derivative.*backend\("reference"\)'


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_hint_no_way_to_a_silent_second_derivative(cpu, reduction, which):
    s, t = features(3, 4), features(3, 6)
    leaves = [x.requires_grad_() for x in (s, *regressor(6, 4))]

    def loss():
        return fd.hint_loss(
            leaves[0], t, proj_weight=leaves[1], proj_bias=leaves[2], reduction=reduction
        ).sum()

    grads = torch.autograd.grad(loss(), leaves, create_graph=True)
    for other in leaves:
        with pytest.raises(RuntimeError, match=WORDS):
            torch.autograd.grad(
                grads[which].square().sum() + other.square().sum(), other, retain_graph=True
            )
    with pytest.raises(RuntimeError, match=WORDS):
        torch.autograd.functional.hessian(lambda x: fd.hint_loss(x, t[:, :4]), s.detach())
    plain = torch.autograd.grad(loss(), leaves)
    assert all(torch.equal(g.detach(), p) for g, p in zip(grads, plain, strict=True))


def test_hint_transforms_are_right_under_auto():
    s, t = features(3, 4, dtype=F64), features(3, 6, dtype=F64)
    weight, bias = regressor(6, 4, F64)

    def loss(x, distance="cosine"):
        return fd.hint_loss(x, t, proj_weight=weight, proj_bias=bias, distance=distance)

    x = s.clone().requires_grad_()
    with fd.backend("reference"):
        hessian = torch.autograd.functional.hessian(loss, s)
        loss(x).backward()
    torch.testing.assert_close(torch.func.grad(loss)(s), x.grad)
    torch.testing.assert_close(torch.func.hessian(loss)(s), hessian)
    v = torch.randn_like(s)
    torch.testing.assert_close(torch.func.jvp(loss, (s,), (v,))[1], (x.grad * v).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(s, v)
        tangent = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
    torch.testing.assert_close(tangent, (x.grad * v).sum())
    rows = torch.func.vmap(lambda a, b: fd.hint_loss(a, b, proj_weight=weight))(s, t)
    each = fd.hint_loss(s, t, proj_weight=weight, reduction="none")
    torch.testing.assert_close(rows, each)
    with fd.backend("cpu"), pytest.raises(RuntimeError, match="functorch transforms.*reference"):
        torch.func.grad(loss)(s)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_hint_compiles_whole(name, dtype, reduction):
    """fullgraph: no break, in the forward and in the backward; the same bits on the CPU."""
    torch._dynamo.reset()
    s, t = features(2, 40, 8, dtype=dtype), features(2, 40, 12, dtype=dtype)
    weight, bias = regressor(12, 8, dtype)
    mask = torch.rand(2, 40) > 0.5

    def loss(a, w, b):
        out = fd.hint_loss(
            a, t, proj_weight=w, proj_bias=b, mask=mask, reduction=reduction, distance="cosine"
        )
        return (out * 64.0).sum()

    with fd.backend(name):
        results = []
        for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            leaves = [x.clone().requires_grad_() for x in (s, weight, bias)]
            value = f(*leaves)
            value.backward()
            results.append([value.detach(), *(x.grad for x in leaves)])
    for eager, compiled in zip(*results, strict=True):
        if name == "cpu":
            assert torch.equal(eager, compiled)
        else:
            torch.testing.assert_close(eager, compiled)


def test_hint_compiles_whole_under_autocast(cpu):
    torch._dynamo.reset()
    s, t = features(40, 8), features(40, 12)
    weight, _ = regressor(12, 8)

    def loss(a, w):
        with torch.autocast("cpu", dtype=BF16):
            return fd.hint_loss(a, t, proj_weight=w)

    results = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (s, weight)]
        f(*leaves).backward()
        results.append([x.grad for x in leaves])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_hint_compiles_whole_as_the_first_call_of_a_process(cpu):
    code = (
        "import torch, fastdistill as fd\n"
        "s, t = torch.randn(4, 9, requires_grad=True), torch.randn(4, 7)\n"
        "w = torch.randn(7, 9, requires_grad=True)\n"
        "f = torch.compile(lambda a: fd.hint_loss(a, t, proj_weight=w), fullgraph=True,\n"
        "                  backend='aot_eager')\n"
        "f(s).backward()\n"
        "assert s.grad.isfinite().all() and w.grad.isfinite().all()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_hint_transforms_inside_compile():
    torch._dynamo.reset()
    s, t = features(3, 5), features(3, 5)

    def apply(x):
        return torch.func.hessian(lambda z: fd.hint_loss(z, t, distance="smooth_l1"))(x)

    torch.testing.assert_close(torch.compile(apply, backend="aot_eager")(s), apply(s))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_hint_autocast_casts_the_operands_as_torch_does(backend, dtype):
    s, t = features(50, 12), features(50, 20)
    weight, bias = regressor(20, 12)
    with torch.autocast("cpu", dtype=dtype):
        got = run(backend, s, t, weight, bias)
    rounded = [x.to(dtype).double() for x in (s, weight, bias)]
    want = run("reference", rounded[0], t.double(), *rounded[1:])
    assert got[0].dtype is F32 and all(g.dtype is F32 for g in got[1:])
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=0)
    for g, w in zip(got[1:], want[1:], strict=True):
        assert (g.double() - w).norm() <= (4e-3 if dtype is BF16 else 2e-2) * w.norm()
    with torch.autocast("cpu", dtype=dtype):
        linear = F.linear(s, weight, bias)
        assert linear.dtype is dtype
        mixed = run(backend, s.to(dtype), t, weight, bias)  # what a model under autocast gives
        assert mixed[1].dtype is dtype and mixed[2].dtype is F32
        alone = run(backend, t, t.flip(0))  # no product: nothing is cast
    assert torch.equal(alone[0], run(backend, t, t.flip(0))[0])


def test_hint_float64_features_under_autocast_stay(backend):
    s, t = features(5, 4, dtype=F64), features(5, 6, dtype=F64)
    weight, _ = regressor(6, 4, F64)
    with torch.autocast("cpu", dtype=BF16):
        got = run(backend, s, t, weight)
    assert torch.equal(got[0], run(backend, s, t, weight)[0])


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_hint_retain_graph_gives_the_same_gradient_twice(backend, dtype, reduction):
    s, t = features(6, 8, dtype=dtype), features(6, 12, dtype=dtype)
    leaves = [x.requires_grad_() for x in (s, *regressor(12, 8, dtype))]
    loss = fd.hint_loss(s, t, proj_weight=leaves[1], proj_bias=leaves[2], reduction=reduction)
    loss = (loss * 3.0).sum()
    passes = []
    for retain in (True, True, False):
        for x in leaves:
            x.grad = None
        loss.backward(retain_graph=retain)
        passes.append([x.grad.clone() for x in leaves])
        for x in leaves:
            x.grad.zero_()  # were .grad the saved buffer, the next pass would give zeros
    assert all(torch.equal(x, y) for x, y in zip(passes[0], passes[1], strict=True))
    assert all(torch.equal(x, y) for x, y in zip(passes[0], passes[2], strict=True))


def test_hint_teacher_is_detached(backend):
    s, t = features(3, 7).requires_grad_(), features(3, 7).requires_grad_()
    fd.hint_loss(s, t, row_weight=torch.rand(3).requires_grad_()).backward()
    assert t.grad is None and s.grad is not None


def test_hint_without_need_of_gradient(backend):
    s, t = features(3, 7), features(3, 7).requires_grad_()
    assert not fd.hint_loss(s, t).requires_grad
    with torch.no_grad():
        assert not fd.hint_loss(s.requires_grad_(), t).requires_grad
    with torch.inference_mode():
        fd.hint_loss(features(3, 7), features(3, 7))


def test_hint_checkpoint_and_saved_tensor_hooks(cpu):
    s, t = features(20, 8), features(20, 12)
    weight, _ = regressor(12, 8)
    want = run("cpu", s, t, weight, reduction="sum")
    a, w = s.clone().requires_grad_(), weight.clone().requires_grad_()

    def loss(x):
        return fd.hint_loss(x, t, proj_weight=w, reduction="sum")

    torch.utils.checkpoint.checkpoint(loss, a, use_reentrant=False).backward()
    assert torch.equal(a.grad, want[1]) and torch.equal(w.grad, want[2])
    a.grad = w.grad = None
    with torch.autograd.graph.save_on_cpu():
        value = loss(a)
    value.backward()
    assert torch.equal(a.grad, want[1]) and torch.equal(w.grad, want[2])


def test_hint_trains_a_regressor(backend):
    """Hint-based training of a first half (FitNets, stage 1): the loss goes down."""
    student, teacher = torch.nn.Linear(10, 6), torch.nn.Linear(10, 16)
    regress = torch.nn.Linear(6, 16)
    optimizer = torch.optim.Adam([*student.parameters(), *regress.parameters()], lr=0.02)
    x = torch.randn(128, 10)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = fd.hint_loss(
            student(x), teacher(x), proj_weight=regress.weight, proj_bias=regress.bias
        )
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
