"""hint_loss: values and gradients of every backend against the oracle in float64."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within

import fastdistill as fd
from fastdistill import _native, _torch_private
from fastdistill.hint import blocks, native

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DISTANCES = ("mse", "l1", "smooth_l1", "cosine")
NORMS = (None, "layer_norm", "l2", ("layer_norm", None), (None, "l2"))


def run(backend, student, teacher, weight=None, bias=None, grad_output=None, **settings):
    """(loss, gradients of student, weight and bias as far as they are given) as users get them."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in (student, weight, bias)]
    with fd.backend(backend):
        loss = fd.hint_loss(
            leaves[0], teacher, proj_weight=leaves[1], proj_bias=leaves[2], **settings
        )
        upstream = torch.ones_like(loss) if grad_output is None else grad_output.to(loss.dtype)
        loss.backward(upstream)
    return [loss.detach(), *(x.grad for x in leaves if x is not None)]


def check(backend, student, teacher, weight=None, bias=None, grad_output=None, **settings):
    """The backend within the budget of float64 on the same (rounded) inputs."""
    inputs = (student, teacher, weight, bias)
    wide = [None if x is None else x.double() for x in inputs]
    exact = {k: v.double() if k == "row_weight" else v for k, v in settings.items()}
    got = run(backend, *inputs, grad_output, **settings)
    want = run("reference", *wide, grad_output, **exact)
    native_ = run("reference", *inputs, grad_output, **settings)
    assert got[0].dtype is (F64 if F64 in (student.dtype, teacher.dtype) else F32)
    # Row by row: a reduction over rows would hide the worst.
    assert_within("loss", *(x[0].unsqueeze(-1) for x in (got, want, native_)))
    for name, x, g, w, n in zip(
        ("student", "weight", "bias"), (student, weight, bias), got[1:], want[1:], native_[1:],
        strict=False,
    ):  # fmt: skip
        assert g.dtype is x.dtype and g.shape == x.shape
        if x.dtype is BF16:  # its residual is a bfloat16 operand of the products
            allowed = 3e-3 if w.numel() > 1000 else 8e-3  # few roundings do not average out
            assert (g.double() - w).norm() <= allowed * w.norm() + 1e-30, name
        else:
            # As one row: a sum over many rows may cancel in a single one of its elements.
            g, w, n = (y.reshape(1, -1) for y in (g, w, n))
            assert_within(f"gradient of {name}", g, w, n)
    return got


@pytest.fixture(autouse=True)
def one_thread(request):
    """Small tensors: more threads only wait for each other. A few tests take them all."""
    threads = torch.get_num_threads()
    if "all_threads" not in request.fixturenames:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def all_threads():
    """Ask for torch's own number of threads."""


def features(*shape, dtype=F32, spread=1.0):
    return (torch.randn(shape) * spread).to(dtype)


def regressor(wide, narrow, dtype=F32):
    return features(wide, narrow, dtype=dtype, spread=narrow**-0.5), features(wide, dtype=dtype)


@pytest.mark.parametrize("dtypes", [(F32, F32), (F64, F64), (BF16, BF16), (F16, F16), (BF16, F32),
                                    (F32, F64), (F16, BF16), (F64, F32)],
                         ids=lambda d: "-".join(str(x)[6:] for x in d))  # fmt: skip
@pytest.mark.parametrize("distance", DISTANCES)
def test_hint_values_and_grads(backend, distance, dtypes):
    for rows, narrow, wide in ((1, 1, 2), (5, 3, 17), (70, 24, 40), (3, 130, 300)):
        student, teacher = features(rows, narrow, dtype=dtypes[0]), features(rows, wide)
        weight, bias = regressor(wide, narrow, dtypes[0])
        scale = torch.tensor(512.0)  # keeps float16 above its subnormal numbers
        for norm, b in zip(NORMS, (bias, None, bias, None, bias), strict=True):
            if wide == 2 and norm is not None:
                continue  # normalised pairs are all equal or opposite: nothing but rounding
            check(
                backend, student, teacher.to(dtypes[1]), weight, b, scale, distance=distance,
                feature_norm=norm,
            )  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("distance", DISTANCES)
def test_hint_the_distance_alone(backend, distance, dtype):
    for shape in ((1, 3), (4, 6, 50), (2, 768), (3, 2, 2, 33), (7,)):
        for norm in NORMS:
            student, teacher = features(*shape, dtype=dtype), features(*shape, dtype=dtype)
            check(
                backend, student, teacher, None, None, torch.tensor(512.0), distance=distance,
                feature_norm=norm,
            )  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("projected", [True, False])
def test_hint_reductions_masks_and_weights(backend, reduction, dtype, projected):
    shape = (4, 6)
    student, teacher = features(*shape, 20, dtype=dtype), features(*shape, 20, dtype=dtype)
    weight, bias = regressor(20, 20, dtype) if projected else (None, None)
    mask = torch.rand(shape) > 0.3
    row_weight = torch.rand(shape)
    row_weight[2, 2] = 0
    grad_output = torch.randn(shape) * 64 if reduction == "none" else torch.tensor(512.0)
    for kept in (
        {},
        {"mask": mask},
        {"row_weight": row_weight},
        {"mask": mask, "row_weight": row_weight},
    ):
        for distance in ("mse", "cosine"):
            check(
                backend, student, teacher, weight, bias, grad_output, reduction=reduction,
                distance=distance, **kept,
            )  # fmt: skip


def test_hint_many_blocks(backend, monkeypatch, all_threads):
    """Blocks that do not divide the rows, with and without dropped rows, nested or not."""
    monkeypatch.setattr(native, "block_rows", lambda *_: 32)
    for dtype, shape in itertools.product((F32, BF16), ((101,), (5, 41), (41, 5))):
        student, teacher = features(*shape, 24, dtype=dtype), features(*shape, 40, dtype=dtype)
        weight, bias = regressor(40, 24, dtype)
        for mask in (None, torch.rand(shape) > 0.4):
            check(backend, student, teacher, weight, bias, mask=mask, distance="smooth_l1")
            check(backend, student, teacher, weight, bias, torch.randn(shape), mask=mask,
                  reduction="none")  # fmt: skip


def test_hint_formula(backend):
    """The textbook, written out: torch's own losses, and the definitions of the reductions."""
    s, t = features(3, 8, 12), features(3, 8, 20)
    weight, bias = regressor(20, 12)
    p = F.linear(s, weight, bias)
    call = {"proj_weight": weight, "proj_bias": bias}
    close = {"rtol": 2e-6, "atol": 1e-6}
    torch.testing.assert_close(fd.hint_loss(s, t, **call), F.mse_loss(p, t), **close)
    rows = {
        "mse": F.mse_loss(p, t, reduction="none").mean(-1),
        "l1": F.l1_loss(p, t, reduction="none").mean(-1),
        "smooth_l1": F.smooth_l1_loss(p, t, reduction="none").mean(-1),
        "cosine": 1 - F.cosine_similarity(p, t, -1),
    }
    mask, w = torch.rand(3, 8) > 0.3, torch.rand(3, 8)
    kept = torch.where(mask, w, 0.0)
    for distance, row in rows.items():
        settings = {**call, "distance": distance, "mask": mask, "row_weight": w}
        for reduction, want in {
            "none": row * kept,
            "sum": (row * kept).sum(),
            "mean": (row * kept).sum() / kept.sum(),
        }.items():
            got = fd.hint_loss(s, t, reduction=reduction, **settings)
            torch.testing.assert_close(got, want, **close)
    norm = {"layer_norm": lambda x: F.layer_norm(x, (20,)), "l2": lambda x: F.normalize(x, dim=-1)}
    norm[None] = lambda x: x
    for a, b in itertools.product(norm, norm):
        got = fd.hint_loss(s, t, feature_norm=(a, b), **call)
        torch.testing.assert_close(got, F.mse_loss(norm[a](p), norm[b](t)), **close)
        if a == b:
            assert torch.equal(fd.hint_loss(s, t, feature_norm=a, **call), got)


def test_hint_normalizer(backend):
    s, t = features(8, 12), features(8, 12)
    mask = torch.rand(8) > 0.4
    for normalizer in (5, torch.tensor(5), torch.tensor(5.0, dtype=F64)):
        got = fd.hint_loss(s, t, mask=mask, normalizer=normalizer)
        want = fd.hint_loss(s, t, mask=mask, reduction="sum") / 5
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hint_feature_maps(backend, dtype, reduction, monkeypatch):
    """channel_dim=1 with a convolution's weight: each position is a row."""
    monkeypatch.setattr(native, "block_rows", lambda *_: 32)
    for size in ((5, 7), (2, 3), (9,)):
        s, t = features(4, 6, *size, dtype=dtype), features(4, 10, *size, dtype=dtype)
        weight, bias = regressor(10, 6, dtype)
        mask = torch.rand(4, *size) > 0.3
        for kept, distance in ((None, "mse"), (mask, "cosine")):
            settings = {"distance": distance, "mask": kept, "reduction": reduction}
            grad_output = torch.randn(4, *size) if reduction == "none" else None
            got = run(
                backend, s, t, weight.view(10, 6, *(1 for _ in size)), bias, grad_output,
                channel_dim=1, **settings,
            )  # fmt: skip
            last = [x.movedim(1, -1).contiguous() for x in (s, t)]
            want = run(backend, *last, weight, bias, grad_output, **settings)
            tolerance = (
                {"rtol": 1e-5, "atol": 1e-6} if dtype is F32 else {"rtol": 2e-2, "atol": 1e-3}
            )
            torch.testing.assert_close(got[0], want[0])
            torch.testing.assert_close(got[1], want[1].movedim(-1, 1), **tolerance)
            assert got[1].stride() == s.stride()
            torch.testing.assert_close(got[2].flatten(1), want[2], **tolerance)
            torch.testing.assert_close(got[3], want[3], **tolerance)
            if kept is None and reduction == "mean" and len(size) == 2 and dtype is F32:
                conv = F.conv2d(s, weight[..., None, None], bias)
                torch.testing.assert_close(got[0], F.mse_loss(conv, t))
        alone = run(backend, t.flip(0), t, None, None, mask=mask, channel_dim=1)
        dense = [x.movedim(1, -1).contiguous() for x in (t.flip(0), t)]
        want = run(backend, *dense, None, None, mask=mask)
        torch.testing.assert_close(alone[0], want[0])
        assert torch.equal(alone[1], want[1].movedim(-1, 1))


def test_hint_layouts(backend):
    """Strided rows, slices, transposes: as the dense copy."""
    base, other = features(3, 9, 40), features(3, 9, 40)
    weight, bias = regressor(40, 40)
    for view in (
        lambda x: x[:, :-1],
        lambda x: x[:, ::2],
        lambda x: x.transpose(0, 1),
        lambda x: x[1:2, 2:3].expand(4, 5, 40),
        lambda x: x[:, None].expand(3, 2, 9, 40)[:, :, :-1],
        lambda x: x.transpose(1, 2)[:, :, 1:].transpose(1, 2),
        lambda x: x[1, 2],
    ):
        s, t = view(base), view(other)
        for w, b in ((weight, bias), (None, None)):
            got = run(backend, s, t, w, b, distance="cosine")
            want = run(backend, s.contiguous(), t.contiguous(), w, b, distance="cosine")
            for g, x in zip(got, want, strict=True):
                torch.testing.assert_close(g, x, rtol=1e-5, atol=1e-7)


def test_hint_strided_weight(backend):
    s, t = features(50, 12), features(50, 20)
    for dtype in (F32, BF16):
        weight = features(12, 20, dtype=dtype).t()
        got = run(backend, s.to(dtype), t, weight)
        want = run(backend, s.to(dtype), t, weight.contiguous())
        for g, x in zip(got, want, strict=True):
            torch.testing.assert_close(g, x, rtol=1e-2 if dtype is BF16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("noise", [1e-6, 1e-4, 1e-2])
def test_hint_near_the_teacher(backend, distance, noise):
    """Where 1 - cos is 0 or negative in float32."""
    s = features(16, 768)
    t = s + noise * torch.randn_like(s)
    for norm in (None, "l2"):
        settings = {"distance": distance, "feature_norm": norm}
        got = run(backend, s, t, **settings)
        want = run("reference", s.double(), t.double(), **settings)
        slack = 5e-2 if noise < 1e-5 else 2e-3
        assert abs(got[0] - want[0]) <= slack * want[0]
        if distance != "l1" or norm is None:  # the sign of a rounded difference may flip
            assert (got[1] - want[1]).norm() <= 2 * slack * want[1].norm()
        rows = fd.hint_loss(s, t, reduction="none", **settings)
        assert (rows >= 0).all()


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("distance", DISTANCES)
def test_hint_identical_features_are_exactly_zero(backend, distance, dtype):
    for width, norm in itertools.product((1, 33, 768), (None, "l2", "layer_norm")):
        x = features(5, width, dtype=dtype) + 3
        loss, grad = run(backend, x, x.clone(), distance=distance, feature_norm=norm)
        if distance == "cosine" and norm == "layer_norm" and width == 1:
            continue  # a constant row becomes 0, whose cosine is 0
        assert loss == 0 and (grad == 0).all()


def test_hint_bfloat16_near_the_teacher_keeps_its_gradients(cpu):
    """A projection rounded to bfloat16 would be off by 2 to 6 %."""
    s = features(2048, 384, dtype=BF16)
    weight, bias = regressor(256, 384, BF16)
    p = F.linear(s.double(), weight.double(), bias.double())
    t = (p + 0.03 * torch.randn_like(p)).float()
    got = run("cpu", s, t, weight, bias)
    want = run("reference", s.double(), t.double(), weight.double(), bias.double())
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w).norm() <= 3e-3 * w.norm()


@pytest.fixture(params=["own", "oneMKL", "widened"])
def bf16_products(request, cpu, monkeypatch):
    """Who multiplies bfloat16 matrices: the class, in force."""
    module = _native.cpu().module
    if request.param == "own":
        if not module.has_bf16():
            pytest.skip("needs AVX512_BF16")
        monkeypatch.setattr(_torch_private, "gemm_bf16bf16f32", lambda: None)
        return blocks.Bf16Products
    without = {name: getattr(module, name) for name in ("hint_rows", "hint_bias_rows")}
    without = SimpleNamespace(**without, has_bf16=lambda: False)
    monkeypatch.setattr(_native, "cpu", lambda: _native.Loaded(without, None))
    if request.param == "widened":
        monkeypatch.setattr(_torch_private, "gemm_bf16bf16f32", lambda: None)
        return blocks.WidenedProducts
    if _torch_private.gemm_bf16bf16f32() is None:
        pytest.skip("this torch has no oneMKL")
    return blocks.MklProducts


def test_hint_bfloat16_products(bf16_products):
    weight, bias = regressor(40, 24, BF16)
    assert type(blocks.products(weight, F32)) is bf16_products
    wide = features(300, 30, dtype=BF16)
    for s in (features(300, 24, dtype=BF16), wide[:, :24], wide[:, 3:27], wide[::2, 6:]):
        check("cpu", s, features(len(s), 40, dtype=BF16), weight, bias)


@pytest.mark.parametrize("sizes", [(1, 2, 2), (7, 10, 18), (37, 130, 66), (200, 98, 400)])
def test_hint_bfloat16_products_one_by_one(bf16_products, sizes, all_threads):
    """Tiles with ends in every dimension, rows with gaps, any number of threads."""
    rows, width, out = sizes
    weight = features(out, width + 3, dtype=BF16)[:, 3:]
    x, r = features(rows, width, dtype=BF16), features(rows, out, dtype=BF16)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        matrix = blocks.products(weight, F32)
        assert type(matrix) is bf16_products
        p, df = torch.full((rows, out), math.nan), torch.full((rows, width), math.nan, dtype=BF16)
        dw = torch.ones(out, width)
        space = torch.full((rows, 2 * out), math.nan, dtype=BF16)
        residual = r if matrix.residual_apart else space[:, :out].copy_(r)
        residual = residual.to(matrix.residual)
        matrix.project(matrix.operand(x), p)
        matrix.student_gradient(residual, df, 0.75)
        matrix.add_weight_gradient(dw, residual, matrix.operand(x))
        found.append((p, df, dw))
    wide = [y.double() for y in (x, weight, r)]
    wanted = wide[0] @ wide[1].T, 0.75 * wide[2] @ wide[1], 1 + wide[2].T @ wide[0]
    for got, want, rounding in zip(found[0], wanted, (1e-6, 2**-8, 1e-6), strict=True):
        assert (got - want).abs().max() <= rounding * want.abs().max()
    if bf16_products is blocks.Bf16Products:
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_hint_float16_survives_a_large_batch_and_a_loss_scale(backend, all_threads):
    """1 / (N D) inside a float16 gradient would flush it to 0 before the scaler multiplies."""
    s, t = features(8192, 64, dtype=F16), features(8192, 64, dtype=F16)
    weight, bias = regressor(64, 64, F16)
    scale = torch.tensor(65536.0)
    got = run(backend, s, t, weight, bias, scale)
    want = run("reference", s.double(), t.double(), weight.double(), bias.double(), scale)
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w).norm() <= 1e-3 * w.norm()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("width", [512, 518])
def test_hint_large_gradients_are_those_of_small_calls(cpu, width, dtype):
    """Stored past the caches where rows are whole chunks, as 518 elements are not."""
    rows = 9 * 2**20 // (width * dtype.itemsize)
    s, t = features(rows, width, dtype=dtype), features(rows, width, dtype=dtype)
    for distance in ("mse", "smooth_l1"):
        _, grad = run("cpu", s, t, distance=distance, reduction="sum")
        for first in (0, rows // 2, rows - 64):
            part = slice(first, first + 64)
            _, small = run("cpu", s[part], t[part], distance=distance, reduction="sum")
            assert torch.equal(grad[part], small)
        assert grad.isfinite().all()


def test_hint_same_bits_again(cpu, all_threads):
    s, t = features(3000, 96), features(3000, 160)
    weight, bias = regressor(160, 96)
    first = run("cpu", s, t, weight, bias)
    for _ in range(3):
        assert all(
            torch.equal(x, y) for x, y in zip(first, run("cpu", s, t, weight, bias), strict=True)
        )


@pytest.mark.parametrize("rows", [37, 300, 333])
@pytest.mark.parametrize("kind", ["mean", "mask", "sum", "none", "normalizer"])
def test_hint_l1_in_bfloat16_shares_no_rounding(backend, kind, rows):
    """All residuals of an l1 distance are +-c: c's own rounding must stay out of the products."""
    s, t = features(rows, 40, dtype=BF16), features(rows, 90, dtype=BF16)
    w, b = regressor(90, 40, BF16)
    settings = {"reduction": kind if kind in ("sum", "none") else "mean", "distance": "l1"}
    if kind == "mask":
        settings["mask"] = torch.rand(rows) < 0.7
    if kind == "normalizer":
        settings["normalizer"] = torch.tensor(77.0)
    grad = torch.randn(rows) if kind == "none" else torch.tensor(1.3)
    got = run(backend, s, t, w, b, grad, **settings)
    wide = [x.double() for x in (s, t, w, b)]
    want = run("reference", *wide, grad.double(), **settings)
    for g, x in zip(got[1:], want[1:], strict=True):
        assert (g.double() - x).norm() <= 2.6e-3 * x.norm()
