"""kd_loss with one temperature for each row: learned and adaptive temperatures."""

import pytest
import torch
from test_kd_values import DIVERGENCES, F32, F64, logits

import fastdistill as fd


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("scale_t2", [True, False])
def test_kd_row_temperatures_are_those_of_each_row(divergence, scale_t2):
    s, t, y = logits((2, 3, 20)), logits((2, 3, 20)), torch.randint(20, (2, 3))
    y[0, 1] = -100
    temperature = torch.rand(2, 3) * 3 + 0.3
    settings = dict(hard_weight=0.3, divergence=divergence, scale_t2=scale_t2, reduction="none")
    student = s.clone().requires_grad_()
    rows = fd.kd_loss(student, t, y, temperature=temperature, **settings)
    rows.sum().backward()
    for i in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        at = tuple(i)
        one = s[at].clone().requires_grad_()
        loss = fd.kd_loss(one, t[at], y[at], temperature=float(temperature[at]), **settings)
        loss.backward()
        torch.testing.assert_close(rows[at].detach(), loss.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(student.grad[at], one.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("scale_t2", [True, False])
def test_kd_temperature_gradcheck(divergence, scale_t2):
    """First and second order, T^2 and the teacher's side included, with masked classes."""
    s, t = logits((3, 6), F64, 1.0), logits((3, 6), F64, 1.0)
    s[0, 2] = t[0, 2] = -float("inf")
    finite = s.isfinite()

    def loss(values, temperature):
        student = torch.full_like(s, -float("inf")).masked_scatter(finite, values)
        return fd.kd_loss(
            student, t, temperature=temperature, divergence=divergence, scale_t2=scale_t2,
            row_weight=torch.tensor([1.0, 2.0, 0.5]), reduction="none",
        )  # fmt: skip

    inputs = (s[finite].requires_grad_(), (torch.rand(3, dtype=F64) + 0.5).requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)


def test_kd_dropped_rows_temperatures_are_not_looked_at():
    s, t = logits((4, 9)), logits((4, 9))
    mask = torch.tensor([True, False, True, False])
    temperature = torch.tensor([2.0, -1.0, 3.0, float("nan")]).requires_grad_()
    loss = fd.kd_loss(s, t, temperature=temperature, mask=mask)
    loss.backward()
    assert loss.isfinite() and (temperature.grad[~mask] == 0).all()
    assert (temperature.grad[mask] != 0).all()


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), float("nan")])
def test_kd_bad_temperatures(bad):
    s, t, temperature = logits((3, 5)), logits((3, 5)), torch.tensor([1.0, bad, 2.0])
    with pytest.raises(ValueError, match=f"temperature: expected finite values > 0, got {bad}"):
        fd.kd_loss(s, t, temperature=temperature)
    rows = torch.func.vmap(lambda a, b, c: fd.kd_loss(a, b, temperature=c))(s, t, temperature)
    assert rows.isnan().tolist() == [False, True, False]  # nothing can be looked at: a NaN row


REFUSED = [
    (torch.tensor(2.0), ValueError, r"temperature: expected shape \[4\] .*got \[\]; nothing"),
    (torch.ones(4, 1), ValueError, r"temperature: .*got \[4, 1\]; nothing is broadcast"),
    (torch.ones(4).long(), TypeError, "temperature: expected dtype float32"),
    (torch.ones(4).to("meta"), ValueError, "temperature: expected device cpu"),
]


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_kd_refuses_temperatures(case):
    with pytest.raises(case[1], match=case[2]):
        fd.kd_loss(torch.zeros(4, 6), torch.zeros(4, 6), temperature=case[0])


def test_kd_compiled_backends_say_that_they_take_a_number(cpu):
    s, t = logits((3, 5)), logits((3, 5))
    with pytest.raises(RuntimeError, match="its temperature is one number .*reference"):
        fd.kd_loss(s, t, temperature=torch.ones(3))
    with fd.backend("auto"):
        got = fd.kd_loss(s, t, temperature=torch.full((3,), 2.0))
    torch.testing.assert_close(got, fd.kd_loss(s, t, temperature=2.0))


def test_kd_learns_a_temperature():
    """The student's logits are the teacher's, halved at T = 1: a learned scalar, expanded."""
    teacher = logits((50, 8), F32, 1.0)
    raw = torch.zeros((), requires_grad=True)
    loss = fd.kd_loss(teacher / 2, teacher, temperature=raw.exp().expand(50), scale_t2=False)
    (slope,) = torch.autograd.grad(loss, raw)
    step = 1e-2
    up, down = (
        fd.kd_loss(teacher / 2, teacher, temperature=float(torch.tensor(v).exp()), scale_t2=False)
        for v in (step, -step)
    )
    torch.testing.assert_close(slope, (up - down) / (2 * step), rtol=1e-3, atol=1e-6)


def test_kd_row_temperatures_compile_whole():
    torch._dynamo.reset()
    s, t = logits((4, 9)), logits((4, 9))

    def loss(temperature):
        return fd.kd_loss(s, t, temperature=temperature)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = []
    for f in (loss, compiled):
        temperature = torch.tensor([1.0, 2.0, 3.0, 4.0]).requires_grad_()
        f(temperature).backward()
        grads.append(temperature.grad)
    torch.testing.assert_close(*grads)
