"""Attention transfer and attention KL against the formulas of their papers, written out."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastdistill.hint import attention_kl, attention_transfer


def maps(channels=(5, 3), dtype=torch.float64):
    return [torch.randn(4, c, 6, 5, dtype=dtype, requires_grad=True) for c in channels]


def written_out(student, teacher, power):
    """Zagoruyko and Komodakis 2017, equations 1 and 2, image by image and position by position."""
    norms = []
    for a_s, a_t in zip(student, teacher, strict=True):
        vectors = []
        for a in (a_s, a_t):
            q = torch.stack(
                [sum(abs(c[y, x]) ** power for c in a) for y in range(6) for x in range(5)]
            )
            vectors.append(q / q.square().sum().sqrt())
        norms.append((vectors[0] - vectors[1]).square().sum().sqrt())
    return sum(norms) / len(norms)


@pytest.mark.parametrize("power", [1, 2, 4])
def test_attention_transfer_is_the_papers(power):
    student, teacher = maps()
    found = attention_transfer(student, teacher, power=power)
    wanted = written_out(student, teacher.detach(), power)
    torch.testing.assert_close(found, wanted)
    (ours,) = torch.autograd.grad(found, student)
    (theirs,) = torch.autograd.grad(wanted, student)
    torch.testing.assert_close(ours, theirs)


def test_attention_transfer_squared_is_the_published_codes():
    student, teacher = maps()

    def at(x):
        return F.normalize(x.pow(2).mean(1).view(x.size(0), -1))

    wanted = (at(student) - at(teacher)).pow(2).mean()
    torch.testing.assert_close(attention_transfer(student, teacher, squared=True), wanted)


def test_attention_transfer_edges():
    student, teacher = maps((3, 3))
    attention_transfer(student, teacher).backward()
    assert teacher.grad is None
    same = attention_transfer(student, 7 * student.detach())  # the scale of a map does not count
    (gradient,) = torch.autograd.grad(same, student)
    assert float(same.detach()) < 1e-12 and gradient.isfinite().all()
    nothing = torch.zeros(2, 3, 4, 4, requires_grad=True)
    loss = attention_transfer(nothing, nothing.detach())
    assert float(loss.detach()) == 0 and torch.autograd.grad(loss, nothing)[0].isfinite().all()
    half, other = (x.detach().bfloat16() for x in maps())
    found = attention_transfer(half, other)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, attention_transfer(half.float(), other.float()))
    tokens = [x.detach().flatten(2) for x in maps()]
    assert attention_transfer(*tokens).ndim == 0


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("shape", [(0, 3, 6, 5), (4, 3, 0, 5), (4, 0, 6, 5)])
def test_attention_transfer_of_nothing_is_0(shape, squared):
    """As with every loss here, no rows give 0, not 0 / 0, and a gradient of nothing."""
    student = torch.randn(shape, requires_grad=True)
    loss = attention_transfer(student, torch.randn(shape), squared=squared)
    assert float(loss.detach()) == 0
    assert torch.autograd.grad(loss, student)[0].shape == shape


@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_attention_transfer_of_any_size(scale, power):
    """The norms take the size out; its powers neither overflow nor vanish before."""
    student, teacher = (x.detach().float() for x in maps())
    want = student.requires_grad_(), attention_transfer(student, teacher, power=power)
    sized = (student.detach() * scale).requires_grad_()
    got = attention_transfer(sized, teacher / scale, power=power)
    torch.testing.assert_close(got, want[1], rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(y, x)[0] for x, y in (want, (sized, got))]
    torch.testing.assert_close(gradients[1] * scale, gradients[0], rtol=1e-4, atol=1e-6)


def test_attention_transfer_bad_input():
    student, teacher = maps()
    with pytest.raises(ValueError, match=r"teacher_features: expected shape \[4, C, 6, 5\]"):
        attention_transfer(student, teacher[..., :4])
    with pytest.raises(ValueError, match=r"expected \[N, C, H, W\], got shape \[4, 5\]"):
        attention_transfer(student[..., 0, 0], teacher)
    with pytest.raises(ValueError, match="power: expected a number >= 1, got 0.5"):
        attention_transfer(student, teacher, power=0.5)
    with pytest.raises(TypeError, match="student_features: expected dtype"):
        attention_transfer(student.long(), teacher)


# ---- Attention KL -------------------------------------------------------------------------------


def attentions(dtype=torch.float64, padding=True):
    """Two [2, 3, 5, 5], the second sequence with two keys of padding; and the mask of queries."""
    bias = torch.zeros(2, 1, 1, 5, dtype=dtype)
    mask = torch.ones(2, 5, dtype=torch.bool)
    if padding:
        bias[1, ..., 3:] = -math.inf
        mask[1, 3:] = False
    logits = [torch.randn(2, 3, 5, 5, dtype=dtype, requires_grad=True) for _ in range(2)]
    return logits, [(x + bias).softmax(-1) for x in logits], mask


def kl(p, q):
    return sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True) if a)


@pytest.mark.parametrize("padding", [False, True])
def test_attention_kl_is_the_papers(padding):
    """MiniLM, equation 6, one head and one query after the other."""
    _, (student, teacher), mask = attentions(padding=padding)
    rows = [
        kl(teacher[b, a, t].detach(), student[b, a, t].detach())
        for b in range(2) for a in range(3) for t in range(5) if mask[b, t]
    ]  # fmt: skip
    found = attention_kl(student, teacher, mask=mask)
    assert float(found.detach()) == pytest.approx(sum(rows) / len(rows), rel=1e-12)
    if not padding:
        torch.testing.assert_close(found, attention_kl(student, teacher))


def test_attention_kl_gradient():
    (logits, _), (student, teacher), mask = attentions()
    found = attention_kl(student, teacher, mask=mask)
    (gradient,) = torch.autograd.grad(found, logits, retain_graph=True)
    count = 3 * int(mask.sum())  # of a softmax: (q - p) / rows
    wanted = torch.where(mask[:, None, :, None], student - teacher, 0).detach() / count
    torch.testing.assert_close(gradient, wanted)
    assert not torch.autograd.grad(found, teacher, allow_unused=True)[0]


def test_dropped_queries_are_not_looked_at():
    _, (student, teacher), mask = attentions()
    wanted = attention_kl(student, teacher, mask=mask)
    student, teacher = student.detach().clone(), teacher.detach().clone()
    student[1, :, 3:] = math.nan
    teacher[1, :, 4] = 17.0
    student.requires_grad_()
    found = attention_kl(student, teacher, mask=mask)
    torch.testing.assert_close(found, wanted)
    assert torch.autograd.grad(found, student)[0].isfinite().all()
    none = attention_kl(student, teacher, mask=torch.zeros_like(mask))
    assert float(none.detach()) == 0
    teacher[1, :, 4] = teacher[1, :, 0]
    assert attention_kl(student, teacher).isnan()  # whereas a NaN that counts is told


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_probabilities_of_every_type_pass(dtype):
    logits = [torch.randn(2, 4, 64, 512) for _ in range(2)]
    student, teacher = (x.softmax(-1).to(dtype) for x in logits)
    wanted = attention_kl(*(x.softmax(-1) for x in logits))
    torch.testing.assert_close(attention_kl(student, teacher), wanted, rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("who", ["student_attention", "teacher_attention"])
def test_attention_after_dropout_is_refused(who, dtype):
    _, (student, teacher), mask = attentions()
    student, teacher = student.detach().to(dtype), teacher.detach().to(dtype)
    dropped = {"student_attention": student, "teacher_attention": teacher}
    attention_kl(**dropped, mask=mask)
    dropped[who] = F.dropout(dropped[who], 0.1)
    with pytest.raises(ValueError, match=f"{who}: .* sum to 1 .* after dropout"):
        attention_kl(**dropped, mask=mask)


def test_dropout_of_transformers_is_seen():
    """The case it is meant for: a student in training mode with attention dropout."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.BertModel(config)
    tokens = torch.randint(30, (2, 9))

    def attention(mode):
        return model.train(mode)(input_ids=tokens, output_attentions=True).attentions[0]

    clean = attention(False)
    with pytest.raises(ValueError, match="after dropout"):
        attention_kl(attention(True), clean)
    assert float(attention_kl(clean, clean).detach()) == 0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert float(attention_kl(attention(True), clean).detach()) == 0


def test_attention_kl_bad_input():
    _, (student, teacher), mask = attentions()
    with pytest.raises(ValueError, match="teacher_attention: expected shape"):
        attention_kl(student, teacher[:, :2])
    with pytest.raises(ValueError, match=r"mask: expected shape \[2, 5\]"):
        attention_kl(student, teacher, mask=mask[:, :3])
    with pytest.raises(TypeError, match="mask: expected dtype torch.bool"):
        attention_kl(student, teacher, mask=mask.long())
    with pytest.raises(ValueError, match=r"expected \[..., heads, queries, keys\]"):
        attention_kl(student[0, 0], teacher[0, 0])
    with pytest.raises(ValueError, match="student_attention: expected at least one key"):
        attention_kl(student[..., :0], teacher[..., :0])
    minus = torch.tensor([[[1.5, -0.5]]])  # sums to 1, and is no distribution
    with pytest.raises(ValueError, match="teacher_attention: expected probabilities, >= 0; 1 of 1"):
        attention_kl(torch.full((1, 1, 2), 0.5), minus)
    with pytest.raises(ValueError, match="student_attention: .*before the softmax"):
        attention_kl(minus, torch.full((1, 1, 2), 0.5))


def test_attention_kl_of_nothing_is_0():
    for shape in ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)):
        student = torch.full(shape, 0.25, requires_grad=True)
        loss = attention_kl(student, torch.full(shape, 0.25))
        assert float(loss.detach()) == 0
        assert torch.autograd.grad(loss, student)[0].shape == shape


@pytest.mark.parametrize("loss", ["kl", "at"])
def test_gradcheck(loss):
    if loss == "at":
        student, teacher = maps()
        assert torch.autograd.gradcheck(lambda s: attention_transfer(s, teacher), student)
    else:
        (logits, _), (_, teacher), _ = attentions(padding=False)
        assert torch.autograd.gradcheck(lambda s: attention_kl(s.softmax(-1), teacher), logits)
