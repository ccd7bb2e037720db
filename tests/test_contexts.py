"""The ops inside what torch may have set up around them: default types, fake tensors, batches."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.functional import jacobian
from torch.fx.experimental.proxy_tensor import make_fx

import fastdistill as fd
from fastdistill.hint import attention_kl, attention_transfer
from fastdistill.nn import DistilBertLoss, HintLosses

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
MASK = (True, True, False, True)
DIVERGENCES = ("forward_kl", "reverse_kl", "cross_entropy")
DISTANCES = ("mse", "l1", "smooth_l1", "cosine")


def calls(dtype, temperatures=True):
    """name -> (function of leaves, the leaves) of all ops and the losses made of them."""

    def leaves(*shapes):
        return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]

    t, labels, mask = torch.full((4,), 2.0), torch.randint(5, (4,)), torch.tensor(MASK)
    other, wide = torch.randn(4, 5).to(dtype), torch.randn(4, 7).to(dtype)
    made = {}
    for divergence in DIVERGENCES:
        settings = {"labels": labels, "hard_weight": 0.5, "divergence": divergence, "mask": mask}
        for reduction in ("mean", "none"):
            made[f"kd {divergence} {reduction}"] = (
                lambda s, k=settings, r=reduction: fd.kd_loss(
                    s, other, row_weight=t, label_smoothing=0.1, reduction=r, **k
                ),
                leaves((4, 5)),
            )
        made[f"kd {divergence} normalizer"] = (
            lambda s, k=settings: fd.kd_loss(s, other, normalizer=torch.tensor(3.0), **k),
            leaves((4, 5)),
        )
        if temperatures:
            made[f"kd {divergence} temperatures"] = (
                lambda s, d=divergence: fd.kd_loss(s, other, temperature=t, divergence=d),
                leaves((4, 5)),
            )
    made["kd of one row"] = (lambda s: fd.kd_loss(s, other[0]), leaves((5,)))
    for function in (fd.temperature_softmax, fd.temperature_log_softmax):
        name = function.__name__
        made[name] = (lambda x, f=function: f(x, 2.0), leaves((4, 5)))
        made[f"{name} of rows"] = (lambda x, f=function: f(x, t), leaves((4, 5)))
    for distance in DISTANCES:
        for norm in (None, "l2"):
            settings = {"distance": distance, "feature_norm": norm, "mask": mask}
            made[f"hint {distance} {norm}"] = (
                lambda s, k=settings: fd.hint_loss(s, other, reduction="none", **k),
                leaves((4, 5)),
            )
            made[f"hint {distance} {norm} projected"] = (
                lambda s, w, b, k=settings: fd.hint_loss(s, wide, proj_weight=w, proj_bias=b, **k),
                leaves((4, 5), (7, 5), (7,)),
            )
    made["attention KL"] = (
        lambda a: attention_kl(a.softmax(-1), torch.full((2, 3, 4, 4), 0.25, dtype=dtype)),
        leaves((2, 3, 4, 4)),
    )
    made["attention transfer"] = (
        lambda a: attention_transfer(a, torch.ones(2, 3, 4, 4, dtype=dtype)),
        leaves((2, 3, 4, 4)),
    )
    tokens, padding = torch.randint(5, (2, 4)), torch.ones(2, 4, dtype=torch.int64)
    made["DistilBERT"] = (
        lambda s, h: DistilBertLoss()(s, s * 2, h, h * 2, tokens, padding),
        leaves((2, 4, 5), (2, 4, 3)),
    )
    for off in ("soft_weight", "task_weight", "cosine_weight"):
        only = {"soft_weight": 0.0, "task_weight": 0.0, "cosine_weight": 0.0, off: 1.0}
        made[f"DistilBERT {off}"] = (
            lambda s, h, k=only: DistilBertLoss(**k)(s, s * 2, h, h * 2, tokens),
            leaves((2, 4, 5), (2, 4, 3)),
        )
    made["hints"] = (
        lambda s: HintLosses([{}, {"distance": "cosine"}])([s, s], [other, other]),
        leaves((4, 5)),
    )
    return made


def result_type(name, dtype):
    """The output's: that of the input for the softmaxes, of the arithmetic for the losses."""
    return dtype if name.startswith("temperature") or dtype is F64 else F32


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("default", [F64, BF16, F16], ids=str)
def test_contexts_a_default_dtype_changes_nothing(host_backend, default):
    """Neither types nor bits: what is computed depends on the arguments alone."""
    for dtype in (F32, F16):
        for name, (function, leaves) in calls(dtype, host_backend == "reference").items():
            want = function(*leaves)
            before = torch.autograd.grad(want.sum(), leaves, allow_unused=True)
            with default_dtype(default):
                got = function(*leaves)
                after = torch.autograd.grad(got.sum(), leaves, allow_unused=True)
            assert want.dtype is got.dtype is result_type(name, dtype), name
            for x, y in zip((want, *before), (got, *after), strict=True):
                assert (x is None and y is None) or torch.equal(x, y), name


def test_contexts_fake_tensors(host_backend):
    """Shapes and types without values: memory estimates, tracing, sharded initialisation."""
    for dtype in (F32, F16):
        with FakeTensorMode():
            fake = calls(dtype, host_backend == "reference")
            for name, (function, leaves) in fake.items():
                got = function(*leaves)
                grads = torch.autograd.grad(got.sum(), leaves, allow_unused=True)
                assert got.dtype is result_type(name, dtype), name
                for x, g in zip(leaves, grads, strict=True):
                    assert g is None or (g.shape == x.shape and g.dtype is x.dtype), name


def traced(function, leaves, mode):
    def of_leaves(*leaves):  # make_fx counts the others among a function's parameters too
        return function(*leaves)

    return make_fx(of_leaves, tracing_mode=mode, _allow_non_fake_inputs=True)(*leaves)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_contexts_traced_graphs(host_backend, mode):
    """make_fx records the ops, whatever values it records them with."""
    for name, (function, leaves) in calls(F32, host_backend == "reference").items():
        if name.startswith(("kd", "temperature", "hint", "attention")):
            leaves = [x.detach() for x in leaves]
            graph = traced(function, leaves, mode)
            others = [x * 0.5 for x in leaves]
            torch.testing.assert_close(
                graph(*others), function(*others), msg=lambda m, n=name: f"{n}: {m}"
            )


def test_contexts_fake_outputs_are_laid_out_as_real_ones(host_backend):
    views = {
        "dense": lambda: torch.randn(2, 3, 4, 5),
        "channels first": lambda: torch.randn(2, 5, 3, 4).movedim(1, -1),
        "padded": lambda: torch.randn(2, 3, 4, 9)[..., :5],
        "no two strides": lambda: torch.randn(3, 2, 4, 5).permute(1, 0, 2, 3)[:, :, ::2],
        "expanded": lambda: torch.randn(1, 3, 4, 5).expand(2, 3, 4, 5),
    }
    ops = {
        "kd": lambda x: fd.kd_loss(x, x * 2, reduction="none"),
        "softmax": fd.temperature_softmax,
        "hint": lambda x: fd.hint_loss(x, x * 2, reduction="none"),
    }
    for op, function in ops.items():
        for name, make in views.items():
            found = []
            for mode in (contextlib.nullcontext(), FakeTensorMode()):
                with mode:
                    x = make().requires_grad_()
                    y = function(x)
                    found.append((y, *torch.autograd.grad(y.sum(), x)))
            for real, fake in zip(*found, strict=True):
                assert real.shape == fake.shape and real.stride() == fake.stride(), (op, name)


def test_contexts_meta_tensors():
    """The reference on a device without values, and without autocast."""
    with torch.device("meta"):
        for name, (function, leaves) in calls(F32).items():
            if name.startswith("DistilBERT") or "attention" in name:
                continue
            assert function(*leaves).device.type == "meta", name


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("dtype", [F32, F16])
def test_contexts_jacobians_in_one_batch(host_backend, dtype):
    """`vectorize=True` gives backward a batch of grad_outputs: no writing into what is saved."""
    bound = {"rtol": 2e-5, "atol": 1e-6} if dtype is F32 else {"rtol": 5e-3, "atol": 1e-4}
    for name, (function, leaves) in calls(dtype, host_backend == "reference").items():
        if name.startswith(("kd", "hint ", "temperature")):
            leaves = tuple(x.detach() for x in leaves)
            one_by_one = jacobian(function, leaves)
            together = jacobian(function, leaves, vectorize=True)
            for got, want in zip(together, one_by_one, strict=True):
                torch.testing.assert_close(got, want, msg=lambda m, n=name: f"{n}: {m}", **bound)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_contexts_a_batch_of_gradients_leaves_the_saved_ones_alone(host_backend):
    for name, (function, leaves) in calls(F32, host_backend == "reference").items():
        y = function(*leaves)
        if y.ndim or not name.startswith(("kd", "hint")):
            continue
        batch = torch.tensor([2.0, -3.0])
        got = torch.autograd.grad(
            y, leaves, batch, is_grads_batched=True, retain_graph=True, allow_unused=True
        )
        once = torch.autograd.grad(y, leaves)
        for g, o in zip(got, once, strict=True):
            torch.testing.assert_close(g, torch.stack([2 * o, -3 * o]), rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_contexts_nested_tensors_are_refused():
    nested = torch.nested.nested_tensor([torch.randn(2, 5), torch.randn(3, 5)])
    with pytest.raises(TypeError, match="x: expected a dense .* got a nested tensor"):
        fd.temperature_softmax(nested)
    with pytest.raises(TypeError, match="student_logits: expected a dense .* got a nested tensor"):
        fd.kd_loss(nested, nested)
