"""kd_loss as a citizen of autograd: checks of the op, compile, transforms, second order, AMP."""

import copy
import subprocess
import sys
import threading

import pytest
import torch
from test_kd_values import BF16, DIVERGENCES, F16, F32, F64, logits

import fastdistill as fd

OPS = torch.ops.fastdistill


def op_arguments(dtype=F32, reduction="mean", need_grad=True, backend="cpu"):
    s, t = logits((2, 3, 17), dtype), logits((2, 3, 17), dtype)
    y = torch.randint(17, (2, 3))
    return (
        s, t, y, torch.rand(2, 3) > 0.3, torch.rand(2, 3), None, 2.0, 0.5, 0.5, "forward_kl", True,
        -100, 0.1, reduction, 1.0, need_grad, backend,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("need_grad", [True, False])
def test_kd_opcheck(cpu, monkeypatch, dtype, reduction, need_grad):
    torch.library.opcheck(OPS.kd_fwd.default, op_arguments(dtype, reduction, need_grad))


@pytest.mark.parametrize("dtype", [F32, F16])
def test_kd_backward_opcheck(cpu, dtype):
    _, _, _, grad, scale = OPS.kd_fwd(*op_arguments(dtype))
    torch.library.opcheck(OPS.kd_bwd.default, (grad, scale, torch.tensor(2.0), "cpu"))
    torch.library.opcheck(OPS.kd_bwd_.default, (grad, scale, torch.tensor(2.0), "cpu"))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kd_gradcheck(backend, divergence, temperature):
    s, t, y = logits((3, 7), F64, 1.0), logits((3, 7), F64, 1.0), torch.tensor([1, -100, 3])

    def loss(x):
        return fd.kd_loss(
            x, t, y, temperature=temperature, hard_weight=0.3, divergence=divergence,
            label_smoothing=0.1, row_weight=torch.tensor([1.0, 2.0, 0.5]), reduction="none",
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, s.requires_grad_())
    if backend == "reference":
        assert torch.autograd.gradgradcheck(loss, s)


def test_kd_double_backward_raises_in_words(cpu):
    s, t = logits((3, 7)).requires_grad_(), logits((3, 7))
    loss = fd.kd_loss(s, t)
    (g,) = torch.autograd.grad(loss, s, create_graph=True)
    with pytest.raises(RuntimeError, match=r'second derivative.*backend\("reference"\)'):
        (loss + g.square().sum()).backward()  # a gradient penalty: g is no constant
    with pytest.raises(RuntimeError):
        torch.autograd.grad(g.square().sum(), s)


SECOND = {
    "penalty": lambda f, s, g: torch.autograd.grad(g.square().sum() + s.square().sum(), s),
    "backward(inputs)": lambda f, s, g: (g.square().sum() + s.square().sum()).backward(inputs=[s]),
    "hessian": lambda f, s, g: torch.autograd.functional.hessian(f, s.detach()),
    "hvp": lambda f, s, g: torch.autograd.functional.hvp(f, s.detach(), s.detach()),
    "vhp": lambda f, s, g: torch.autograd.functional.vhp(f, s.detach(), s.detach()),
    "jvp by two backwards": lambda f, s, g: torch.autograd.functional.jvp(
        f, s.detach(), s.detach()
    ),
}


@pytest.mark.parametrize("way", SECOND)
def test_kd_no_way_to_a_silent_second_derivative(cpu, way):
    s, t = logits((3, 7)).requires_grad_(), logits((3, 7))
    (g,) = torch.autograd.grad(fd.kd_loss(s, t), s, create_graph=True)
    with pytest.raises(RuntimeError, match=r'second derivative.*backend\("reference"\)'):
        SECOND[way](lambda x: fd.kd_loss(x, t), s, g)


@pytest.mark.parametrize("transform", ["grad", "jacrev", "hessian"])
def test_kd_transforms_inside_compile(transform):
    torch._dynamo.reset()
    s, t = logits((3, 5), spread=1.0), logits((3, 5), spread=1.0)

    def apply(x):
        return getattr(torch.func, transform)(lambda z: fd.kd_loss(z, t, temperature=2.0))(x)

    torch.testing.assert_close(torch.compile(apply, backend="aot_eager")(s), apply(s))


def test_kd_a_schedule_of_settings_compiles_whole(cpu):
    torch._dynamo.reset()
    s, t, y = logits((4, 9)), logits((4, 9)), torch.randint(9, (4,))

    def loss(temperature, weight):
        return fd.kd_loss(s, t, y, temperature=temperature, hard_weight=weight)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for settings in ((2.0, 0.5), (1.5, 0.4), (1.0, 0.3)):
        assert torch.equal(compiled(*settings), loss(*settings))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_kd_dropped_rows_stay_zero_whatever_comes_from_outside(backend, dtype):
    s, t = logits((4, 9), dtype).requires_grad_(), logits((4, 9), dtype)
    mask = torch.tensor([True, False, True, True])
    rows = fd.kd_loss(s, t, mask=mask, reduction="none")
    rows.sqrt().sum().backward()  # d sqrt(0) = inf
    assert (s.grad[1] == 0).all() and s.grad[mask].isfinite().all()


def test_kd_create_graph_of_an_outer_sum_still_works(cpu):
    """create_graph alone asks for no second derivative of the loss."""
    s, t = logits((3, 7)).requires_grad_(), logits((3, 7))
    (g,) = torch.autograd.grad(fd.kd_loss(s, t), s, create_graph=True)
    (h,) = torch.autograd.grad(fd.kd_loss(s, t), s)
    assert torch.equal(g.detach(), h)


def test_kd_transforms_are_right_under_auto():
    s, t, y = logits((3, 5), F64, 1.0), logits((3, 5), F64, 1.0), torch.randint(5, (3,))

    def loss(x):
        return fd.kd_loss(x, t, y, hard_weight=0.5, temperature=2.0)

    x = s.clone().requires_grad_()
    with fd.backend("reference"):
        hessian = torch.autograd.functional.hessian(loss, s)
        loss(x).backward()
    torch.testing.assert_close(torch.func.grad(loss)(s), x.grad)
    torch.testing.assert_close(torch.func.hessian(loss)(s), hessian)
    v = torch.randn_like(s)
    _, tangent = torch.func.jvp(loss, (s,), (v,))
    torch.testing.assert_close(tangent, (x.grad * v).sum())
    rows = torch.func.vmap(lambda a, b, c: fd.kd_loss(a, b, c, hard_weight=0.5))(s, t, y)
    each = fd.kd_loss(s, t, y, hard_weight=0.5, reduction="none")
    torch.testing.assert_close(rows, each)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(s, v)
        tangent = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
    torch.testing.assert_close(tangent, (x.grad * v).sum())


def test_kd_transforms_on_an_explicit_kernel_raise(cpu):
    s, t = logits((3, 5)), logits((3, 5))
    with pytest.raises(RuntimeError, match="functorch transforms.*reference"):
        torch.func.grad(lambda x: fd.kd_loss(x, t))(s)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_kd_retain_graph_gives_the_same_gradient_twice(backend, dtype):
    s, t = logits((6, 33), dtype).requires_grad_(), logits((6, 33), dtype)
    for scale in (1.0, 3.0):
        loss = fd.kd_loss(s, t, temperature=2.0) * scale
        s.grad = None
        loss.backward(retain_graph=True)
        first = s.grad
        kept = first.clone()
        s.grad = None
        first.zero_()  # were .grad the saved buffer, the second pass would give zeros
        loss.backward(retain_graph=True)
        assert torch.equal(s.grad, kept)
        s.grad = None
        loss.backward()
        assert torch.equal(s.grad, kept)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_kd_gradient_accumulates_and_mixes_with_other_losses(backend, dtype):
    s, t = logits((6, 33), dtype).requires_grad_(), logits((6, 33), dtype)
    (
        fd.kd_loss(s, t) + 2 * fd.kd_loss(s, t, temperature=3.0) + s.float().square().mean()
    ).backward()
    got = s.grad.clone()
    want = torch.zeros_like(s, dtype=F64)
    with fd.backend("reference"):
        x = s.detach().double().requires_grad_()
        (fd.kd_loss(x, t) + 2 * fd.kd_loss(x, t, temperature=3.0) + x.square().mean()).backward()
    want = x.grad
    assert (got.double() - want).norm() <= 4 * torch.finfo(dtype).eps * want.norm()


def test_kd_teacher_is_detached(backend):
    s, t = logits((3, 7)).requires_grad_(), logits((3, 7)).requires_grad_()
    parts = fd.kd_loss(s, t, return_parts=True)
    parts.loss.backward()
    assert t.grad is None
    assert not parts.hard.requires_grad and not parts.soft.requires_grad


def test_kd_without_need_of_gradient(backend):
    s, t = logits((3, 7)), logits((3, 7)).requires_grad_()
    assert not fd.kd_loss(s, t).requires_grad
    with torch.no_grad():
        assert not fd.kd_loss(s.requires_grad_(), t).requires_grad
    with torch.inference_mode():
        fd.kd_loss(logits((3, 7)), logits((3, 7)))


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_kd_compiles_whole(cpu, dtype, reduction):
    """fullgraph: no break, in the forward and in the backward; the same bits."""
    torch._dynamo.reset()
    s, t, y = logits((4, 50), dtype), logits((4, 50), dtype), torch.randint(50, (4,))

    def loss(a, b, c):
        out = fd.kd_loss(a, b, c, hard_weight=0.5, temperature=2.0, reduction=reduction)
        return (out * 3.0).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for f in (loss, compiled):
        x = s.clone().requires_grad_()
        value = f(x, t, y)
        value.backward()
        results.append((value.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_kd_compiles_whole_as_the_first_call_of_a_process(cpu):
    code = (
        "import torch, fastdistill as fd\n"
        "s, t = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)\n"
        "f = torch.compile(lambda a: fd.kd_loss(a, t), fullgraph=True, backend='aot_eager')\n"
        "f(s).backward()\n"
        "assert s.grad.isfinite().all()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_kd_reference_compiles_whole():
    torch._dynamo.reset()
    s, t, y = logits((4, 50)), logits((4, 50)), torch.randint(50, (4,))
    with fd.backend("reference"):
        compiled = torch.compile(
            lambda a: fd.kd_loss(a, t, y, hard_weight=0.5), fullgraph=True, backend="aot_eager"
        )
        x = s.clone().requires_grad_()
        compiled(x).backward()
        z = s.clone().requires_grad_()
        fd.kd_loss(z, t, y, hard_weight=0.5).backward()
    torch.testing.assert_close(x.grad, z.grad)


def test_kd_compiled_sees_a_change_of_backend():
    """A graph compiled for one backend must not serve another one."""
    torch._dynamo.reset()
    s, t = logits((4, 50)), logits((4, 50))
    compiled = torch.compile(lambda a: fd.kd_loss(a, t), backend="aot_eager")
    compiled(s)
    with fd.backend("cuda"), pytest.raises(Exception, match="cannot run on device 'cpu'"):
        compiled(s)


def test_kd_inductor(cpu):
    torch._dynamo.reset()
    s, t = logits((4, 50)).requires_grad_(), logits((4, 50))
    torch.compile(lambda a: fd.kd_loss(a * 2, t), fullgraph=True)(s).backward()
    got, s.grad = s.grad, None
    fd.kd_loss(s * 2, t).backward()
    torch.testing.assert_close(got, s.grad)


def test_kd_bad_values_under_the_compiled_reference_are_nan():
    torch._dynamo.reset()
    s, t = logits((3, 5)), logits((3, 5))
    with fd.backend("reference"):
        f = torch.compile(
            lambda y, w: fd.kd_loss(s, t, y, hard_weight=1.0, row_weight=w, reduction="none"),
            backend="aot_eager",
        )
        out = f(torch.tensor([1, 5, 2]), torch.tensor([1.0, 1.0, -1.0]))
    assert out.isnan().tolist() == [False, True, True]


def test_kd_grad_scaler_trains_in_float16(backend):
    torch.manual_seed(3)
    model = torch.nn.Linear(20, 11)
    teacher = torch.nn.Linear(20, 11)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    x = torch.randn(64, 20)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        z = model(x)
        half = z.half()
        loss = fd.kd_loss(half, teacher(x).detach().half(), temperature=2.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_kd_autocast_leaves_the_loss_in_float32(backend):
    lin = torch.nn.Linear(8, 5)
    with torch.autocast("cpu", dtype=BF16):
        z = lin(torch.randn(3, 8))
        loss = fd.kd_loss(z, torch.randn(3, 5))
    assert z.dtype is BF16 and loss.dtype is F32
    loss.backward()
    assert lin.weight.grad.isfinite().all()


def test_kd_saved_tensor_hooks(cpu):
    s, t = logits((4, 9)).requires_grad_(), logits((4, 9))
    with torch.autograd.graph.save_on_cpu():
        loss = fd.kd_loss(s, t)
    loss.backward()
    with fd.backend("reference"):
        x = s.detach().clone().requires_grad_()
        fd.kd_loss(x, t).backward()
    torch.testing.assert_close(s.grad, x.grad)


def test_kd_checkpointed(cpu):
    s, t = logits((4, 9)).requires_grad_(), logits((4, 9))
    torch.utils.checkpoint.checkpoint(lambda a: fd.kd_loss(a, t), s, use_reentrant=False).backward()
    got, s.grad = s.grad, None
    fd.kd_loss(s, t).backward()
    assert torch.equal(got, s.grad)


def test_kd_backward_in_another_thread(cpu):
    s, t = logits((4, 9)).requires_grad_(), logits((4, 9))
    loss = fd.kd_loss(s, t)
    errors = []

    def work():
        try:
            loss.backward()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors and s.grad.isfinite().all()


def test_kd_module_is_copied_and_pickled_with_its_settings():
    module = fd.nn.KDLoss(temperature=2.0)
    assert copy.deepcopy(module).settings == module.settings
    assert module.state_dict() == {}
