"""Every op gives the same for the same numbers, however their tensor lies in memory."""

import random

import pytest
import torch

import fastdistill as fd
from fastdistill import _layout
from fastdistill.hint import blocks

F32, BF16 = torch.float32, torch.bfloat16
ODD = (0, 1, 2, 5, 13, 1000)
"""Strides that a dimension of size 1 may have, and torch still calls the tensor contiguous."""


def laid_out(draw, shape, dtype=F32):
    """Random numbers in NaN: dimensions in any order, padded, expanded, odd where of size 1."""
    order = list(range(len(shape)))
    if draw.random() < 0.5:
        draw.shuffle(order)
    padding = [draw.choice((0, 0, 1, 3)) for _ in shape]
    whole = torch.full([shape[i] + padding[i] for i in order], float("nan"), dtype=dtype)
    x = whole.permute([order.index(i) for i in range(len(shape))])
    for i, size in enumerate(shape):
        x = x.narrow(i, draw.randint(0, padding[i]), size)
    x.copy_(torch.randn(shape) * 2)
    strides = list(x.stride())
    for i, size in enumerate(shape):
        if draw.random() < (0.6 if size == 1 else 0.1):
            strides[i] = draw.choice(ODD) if size == 1 else 0
    return x.as_strided(shape, strides, x.storage_offset())


def plain(x):
    """The same numbers, in rows one after the other."""
    return torch.empty(x.shape, dtype=x.dtype).copy_(x)


def cases(seed, classes, count):
    """`count` draws of (generator, shape, dim of the classes), half of the sizes 1."""
    for i in range(count):
        draw = random.Random(1000 * seed + i)
        rows = [draw.choice((1, 1, 1, 2, 3, 4)) for _ in range(draw.randint(0, 4))]
        dim = draw.choice((len(rows), draw.randint(0, len(rows))))
        rows.insert(dim, draw.choice(classes))
        yield draw, tuple(rows), dim


def assert_same(function, draw, leaves):
    """Value and gradients of function(*leaves), for leaves as they lie and for plain ones."""
    results = []
    upstream = None
    for these in (leaves, [plain(x) for x in leaves]):
        these = [x.detach().requires_grad_() for x in these]
        y = function(*these)
        if upstream is None:
            upstream = laid_out(draw, tuple(y.shape)).to(y.dtype)
        results.append([y, *torch.autograd.grad(y, these, upstream)])
        upstream = plain(upstream)
    for got, want in zip(*results, strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5, equal_nan=True)


def test_layout_of_kd_loss(backend):
    for draw, shape, dim in cases(1, (1, 2, 7, 70), 60):
        teacher = laid_out(draw, shape)
        rows = shape[:dim] + shape[dim + 1 :]
        settings = {"labels": torch.randint(shape[dim], rows), "hard_weight": 0.3, "dim": dim}
        if draw.random() < 0.5:
            settings["row_weight"] = laid_out(draw, rows).abs()
        reduction = draw.choice(("mean", "none"))
        assert_same(
            lambda s, t=teacher, k=settings, r=reduction: fd.kd_loss(s, t, reduction=r, **k),
            draw,
            [laid_out(draw, shape)],
        )


@pytest.mark.parametrize(
    "function", [fd.temperature_softmax, fd.temperature_log_softmax], ids=["softmax", "log"]
)
def test_layout_of_the_softmaxes(backend, function):
    for draw, shape, dim in cases(2, (1, 2, 7, 70), 40):
        rows = shape[:dim] + shape[dim + 1 :]
        leaves = [laid_out(draw, shape)]
        if draw.random() < 0.5:
            t = laid_out(draw, rows)
            leaves.append(t.abs().add(0.5) if rows else t.abs() + 0.5)
        assert_same(lambda x, t=2.0, d=dim: function(x, t, d), draw, leaves)


@pytest.mark.parametrize("classes", [1, 7, 70])
def test_layout_with_a_stride_that_is_never_taken(backend, classes):
    """Of a dimension of size 1 among the outer ones; torch says that nothing needs a copy."""
    shape, strides = (2, 1, 3, classes), (3 * classes, 5, classes, 1)
    x = torch.randn(6 * classes).as_strided(shape, strides)
    assert x.is_contiguous()
    draw = random.Random(0)
    assert_same(lambda s: fd.kd_loss(s, x, reduction="none"), draw, [plain(x) * 2])
    assert_same(lambda s: fd.kd_loss(s, plain(x) * 2, reduction="none"), draw, [x])
    for function in (fd.temperature_softmax, fd.temperature_log_softmax):
        assert_same(lambda s, f=function: f(s, 2.0), draw, [x])
    assert_same(lambda s: fd.hint_loss(s, plain(x) * 2, reduction="none"), draw, [x])
    assert_same(lambda s: fd.hint_loss(s, x, reduction="none"), draw, [plain(x) * 2])


@pytest.mark.parametrize("regressor", [False, True])
def test_layout_of_hint_loss(backend, regressor):
    for draw, shape, dim in cases(3, (3, 7, 30), 50):
        wide = draw.choice((1, 3, 9)) if regressor else shape[dim]
        teacher = laid_out(draw, (*shape[:dim], wide, *shape[dim + 1 :]))
        rows = shape[:dim] + shape[dim + 1 :]
        settings = {"distance": draw.choice(("mse", "smooth_l1", "cosine")), "channel_dim": dim}
        if draw.random() < 0.5:
            settings["mask"] = torch.rand(rows) < 0.6
        if not regressor and draw.random() < 0.5:
            settings["feature_norm"] = "l2"
        reduction = draw.choice(("mean", "none"))

        def loss(s, w=None, b=None, t=teacher, k=settings, r=reduction):
            return fd.hint_loss(s, t, proj_weight=w, proj_bias=b, reduction=r, **k)

        leaves = [laid_out(draw, shape)]
        if regressor:
            leaves += [laid_out(draw, (wide, shape[dim])), laid_out(draw, (wide,))]
        assert_same(loss, draw, leaves)


@pytest.mark.parametrize("narrow, wide, rows", [(70, 1, 3), (1, 70, 3), (70, 9, 1)])
def test_layout_of_bfloat16_products(cpu, narrow, wide, rows):
    """Matrices of one row or column, whose pitch oneMKL would refuse."""
    for seed in range(8):
        draw = random.Random(seed)
        leaves = [laid_out(draw, s, BF16) for s in ((rows, narrow), (wide, narrow), (wide,))]
        leaves = [x.detach().requires_grad_() for x in leaves]
        teacher = laid_out(draw, (rows, wide))
        found = []
        for these in (leaves, [plain(x).detach().requires_grad_() for x in leaves]):
            loss = fd.hint_loss(these[0], teacher, proj_weight=these[1], proj_bias=these[2])
            found.append([loss, *torch.autograd.grad(loss, these)])
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3)


def test_layout_is_read_where_it_can_be():
    """No copy for a stride that is never taken."""
    base = torch.randn(4, 3, 8)
    views = {
        "a dimension of size 1 between": base.as_strided((4, 1, 3, 8), (24, 1000, 8, 1)),
        "the innermost row alone": base.as_strided((4, 3, 1, 8), (24, 8, 1000, 1)),
        "one class": base.as_strided((4, 3, 1), (24, 8, 1000)),
        "one row": base.as_strided((1, 1, 8), (7, 1000, 1)),
    }
    for what, x in views.items():
        assert _layout.strided_rows(x)[0] is x, what
        rows = blocks.Rows(x)
        assert rows.nested.data_ptr() == x.data_ptr(), what
        assert torch.equal(rows.nested.reshape(x.shape), x), what


def test_layout_that_torch_calls_contiguous():
    """`contiguous()` gives it back as it is: its strides are no use, its rows are."""
    for shape, strides in (((4, 1, 3, 8), (24, 1000, 8, 1)), ((2, 1, 1, 2, 5), (10, 0, 13, 5, 1))):
        x = torch.arange(float(torch.Size(shape).numel())).as_strided(shape, strides)
        assert x.is_contiguous()
        inner = _layout.inner_rows(x)
        rows, outer, step = _layout.strided_rows(x)
        flat = rows.reshape(-1, shape[-1])
        for r in range(len(flat)):
            at = r // inner * outer + r % inner * step
            assert float(flat[r, 0]) == at
