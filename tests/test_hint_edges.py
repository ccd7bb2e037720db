"""hint_loss at the edges: NaN, dropped rows, empty batches, zero vectors, what is not computed."""

import pytest
import torch
import torch.nn.functional as F
from test_hint_values import BF16, DISTANCES, F16, F32, F64, features, regressor, run

import fastdistill as fd
from fastdistill.hint import blocks, native

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("projected", [True, False])
def test_hint_a_bad_row_stays_alone(backend, distance, dtype, projected):
    s, t = features(70, 20, dtype=dtype), features(70, 20, dtype=dtype)
    weight, bias = regressor(20, 20, dtype) if projected else (None, None)
    ones = torch.ones(70)
    settings = {"distance": distance, "reduction": "none"}
    clean = run(backend, s, t, weight, bias, ones, **settings)
    s[3, 5], t[40, 7] = NAN, NAN
    got = run(backend, s, t, weight, bias, ones, **settings)
    assert got[0][[3, 40]].isnan().all() and got[1][[3, 40]].isnan().any(-1).all()
    good = torch.ones(70, dtype=torch.bool)
    good[[3, 40]] = False
    torch.testing.assert_close(got[0][good], clean[0][good], rtol=1e-5, atol=1e-6)
    tolerance = 1e-5 if dtype in (F32, F64) else 1e-2
    torch.testing.assert_close(got[1][good], clean[1][good], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("how", ["mask", "row_weight"])
@pytest.mark.parametrize("poison", [NAN, INF])
def test_hint_dropped_rows_reach_no_gradient(backend, dtype, how, poison):
    s, t = features(90, 12, dtype=dtype), features(90, 20, dtype=dtype)
    weight, bias = regressor(20, 12, dtype)
    keep = torch.rand(90) > 0.3
    scale = torch.tensor(128.0)
    want = run(backend, s[keep], t[keep], weight, bias, scale)
    s[~keep], t[~keep] = poison, poison
    dropped = {"mask": keep} if how == "mask" else {"row_weight": keep.float()}
    got = run(backend, s, t, weight, bias, scale, **dropped)
    tolerance = 1e-5 if dtype is F32 else 1e-2
    for g, w in zip((got[0], got[1][keep], *got[2:]), want, strict=True):
        torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance)
    assert (got[1][~keep] == 0).all()
    alone = run(backend, t, t.flip(1), None, None, **dropped)
    assert alone[0].isfinite() and (alone[1][~keep] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_hint_nothing_kept_is_a_differentiable_zero(backend, reduction, dtype):
    weight, bias = regressor(20, 12, dtype)
    for rows, mask in ((0, None), (5, torch.zeros(5, dtype=torch.bool))):
        s, t = torch.full((rows, 12), NAN, dtype=dtype), torch.full((rows, 20), NAN, dtype=dtype)
        ones = torch.ones(rows) if reduction == "none" else None
        got = run(backend, s, t, weight, bias, ones, mask=mask, reduction=reduction)
        assert all((x == 0).all() for x in got)
        assert got[2].shape == weight.shape
        got = run(backend, s, s.clone(), None, None, ones, mask=mask, reduction=reduction)
        assert all((x == 0).all() for x in got)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("norm", [None, "l2", "layer_norm"])
def test_hint_zero_and_tiny_vectors(backend, distance, norm):
    """Below its eps a norm is a constant, as in torch's functions."""
    s, t = features(6, 40), features(6, 40)
    s[0], t[1], s[2], t[2] = 0, 0, 0, 0
    s[3] *= 1e-14
    t[4] *= 1e-14
    got = run(backend, s, t, None, None, torch.ones(6), distance=distance, feature_norm=norm,
              reduction="none")  # fmt: skip
    want = run("reference", s.double(), t.double(), None, None, torch.ones(6), distance=distance,
               feature_norm=norm, reduction="none")  # fmt: skip
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-6)
    for g, w in zip(got[1].double(), want[1], strict=True):
        assert (g - w).norm() <= 1e-5 * w.norm() + 1e-7
    if distance == "cosine" and norm is None:
        x = s.clone().requires_grad_()
        row = 1 - F.cosine_similarity(x, t, -1)
        torch.testing.assert_close(got[0], row.detach(), rtol=1e-5, atol=1e-6)
        row.sum().backward()
        others = [1, 4, 5]  # torch has no gradient at 0
        torch.testing.assert_close(got[1][others], x.grad[others], rtol=1e-4, atol=1e-6)


def test_hint_dropped_rows_stay_zero_whatever_comes_from_outside(backend):
    s, t = features(4, 9).requires_grad_(), features(4, 9)
    mask = torch.tensor([True, False, True, True])
    weight = features(9, 9).requires_grad_()
    for w in (None, weight):
        s.grad = None
        rows = fd.hint_loss(s, t, proj_weight=w, mask=mask, reduction="none")
        rows.sqrt().sum().backward()  # d sqrt(0) = inf
        assert (s.grad[1] == 0).all() and s.grad[mask].isfinite().all()
    assert weight.grad.isfinite().all()
    s.grad = None
    (fd.hint_loss(s, t, mask=mask) * INF).backward()
    assert (s.grad[1] == 0).all()


def test_hint_computes_what_is_needed(cpu, monkeypatch):
    """A frozen regressor costs no dW, a frozen student no dF, and neither needs no residual."""
    done = []
    for name in ("project", "student_gradient", "add_weight_gradient"):
        real = getattr(blocks.Products, name)

        def spy(self, *args, name=name, real=real):
            done.append(name)
            return real(self, *args)

        monkeypatch.setattr(blocks.Products, name, spy)
    s, t = features(10, 12), features(10, 20)
    weight, bias = regressor(20, 12)
    for which, want in (
        ((True, False, False), ["project", "student_gradient"]),
        ((False, True, False), ["project", "add_weight_gradient"]),
        ((False, False, True), ["project"]),
        ((False, False, False), ["project"]),
    ):
        done.clear()
        a, b, c = (
            x.clone().requires_grad_(need) for x, need in zip((s, weight, bias), which, strict=True)
        )
        loss = fd.hint_loss(a, t, proj_weight=b, proj_bias=c)
        assert sorted(done) == sorted(want)
        if any(which):
            loss.backward()
        assert [x.grad is not None for x in (a, b, c)] == list(which)


def test_hint_the_projection_is_never_whole(cpu, monkeypatch):
    """No tensor of the projection's size is made: block after block through one of a block's."""
    made = []
    real = torch.empty

    def empty(*args, **kwargs):
        out = real(*args, **kwargs)
        made.append(out.numel())
        return out

    s, t = features(8192, 32).requires_grad_(), features(8192, 256)
    weight, bias = (x.requires_grad_() for x in regressor(256, 32))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        fd.hint_loss(s, t, proj_weight=weight, proj_bias=bias).backward()
    assert made and max(made) <= 8192 * 256 // 8
    assert blocks.block_rows(4096, 768, True) == 256 and blocks.block_rows(4096, 768, False) == 512


def test_hint_inputs_stay_as_they_are(backend):
    for dtype in (F32, BF16, F16):
        s, t = features(40, 12, dtype=dtype), features(40, 20, dtype=dtype)
        weight, bias = regressor(20, 12, dtype)
        mask, w = torch.rand(40) > 0.5, torch.rand(40)
        before = [x.clone() for x in (s, t, weight, bias, mask, w)]
        run(backend, s, t, weight, bias, mask=mask, row_weight=w, feature_norm="layer_norm")
        after = (s, t, weight, bias, mask, w)
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_hint_rows_beyond_32_bits(cpu):
    """Row offsets past 2^31 elements, without the memory: the rows of an expanded tensor."""
    row, other = features(1, 4, 70_000, dtype=BF16), features(1, 4, 70_000, dtype=BF16)
    wide = row.expand(8000, 4, 70_000)
    mask = torch.zeros(8000, 4, dtype=torch.bool)
    mask[7999, 3] = mask[0, 0] = True
    rows = fd.hint_loss(wide, other.expand_as(wide), mask=mask, reduction="none")
    want = fd.hint_loss(row, other, reduction="none")
    assert rows[7999, 3] == want[0, 3] and rows[0, 0] == want[0, 0]
    assert rows[~mask].eq(0).all()


def test_hint_blocks_cover_every_row_once():
    x = torch.arange(5 * 7 * 3.0).view(5, 7, 3)
    for view in (x, x.transpose(0, 1), x[:, :-1], x[:, None].expand(5, 2, 7, 3), x[0], x[0, 0]):
        rows = blocks.Rows(view)
        for size in (1, 2, 7, 20, 1000):
            seen, next_row = [], 0
            for first, where in rows.blocks(size):
                block = rows.nested[where].reshape(-1, 3)
                assert first == next_row
                next_row += len(block)
                seen.append(block)
                assert torch.equal(native._slice(rows, first, len(block)), block)
            assert torch.equal(torch.cat(seen), view.reshape(-1, 3))
