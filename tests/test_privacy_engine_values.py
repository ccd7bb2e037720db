"""PrivacyEngine without noise: the gradients of Opacus's hooks, in float64 to 1e-10."""

import pytest
import torch
from private_models import CNN, F64, Transformer, assert_close, by_samples, ours, theirs
from torch import nn

from fastdistill.privacy.engine.module import PrivateModule

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


@pytest.fixture(autouse=True)
def doubles(one_thread):
    torch.manual_seed(0)
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


def mlp():
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 11, bias=False), nn.Linear(11, 4))


def batch(n, *shape, classes=4, scale=3.0):
    size = torch.logspace(-2, 1, max(n, 1))[:n].view(-1, *(1,) * len(shape))
    return scale * size * torch.randn(n, *shape), torch.randint(classes, (n,))


@pytest.mark.parametrize("n", [1, 2, 16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_engine_mlp(n, reduction):
    model, x = mlp(), [batch(n, 7), batch(n, 7)]
    arguments = dict(criterion=nn.CrossEntropyLoss(reduction=reduction), max_grad_norm=0.7)
    assert_close(ours(model, x, **arguments), theirs(model, x, **arguments))


def sequences(n, length=5, vocabulary=13):
    x = torch.randint(vocabulary, (n, length + 1))
    return x[:, :-1], x[:, 1:]


def next_token(model, criterion, x, y):
    """Per sample the mean over its tokens, for either engine."""
    return criterion(model(x).transpose(1, 2), y)


def assert_same(model, batches, limit=1e-10, **arguments):
    """Ours with every method of the cost rule against the hooks."""
    want = theirs(model, batches, **arguments)
    assert_close(ours(model, batches, **arguments), want, limit)
    return want


@pytest.mark.parametrize("n", [1, 3, 16])
@pytest.mark.parametrize("padding", [1, "same", "valid", "reflect"])
def test_engine_cnn(n, padding):
    model = CNN("reflect") if padding == "reflect" else CNN(padding=padding)
    batches = [batch(n, 2, 7, 6)]
    want = theirs(model, batches) if padding != "reflect" else None
    for budget in (1 << 28, 0):
        got = ours(model, batches, memory_budget=budget)
        if want is not None:
            assert_close(got, want)
        else:
            assert_close(got, by_samples(model, batches[0]))


def test_engine_conv1d():
    model = nn.Sequential(
        nn.Conv1d(3, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(16, 4)
    )
    assert_same(model, [batch(5, 3, 8)])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("budget", [1 << 28, 0])
@pytest.mark.parametrize("length", [1, 5, 40])
def test_engine_transformer(tied, budget, length):
    """Lengths for each line of the cost rule; the tied embedding has its cross term."""
    model = Transformer(tied=tied, length=length)
    x, y = sequences(4, length)
    y[:, :1] = x[:, :1]  # what goes in comes out: the two uses of the table have much in common
    arguments = dict(call=next_token, max_grad_norm=0.05)
    got = ours(model, [(x, y)], memory_budget=budget, **arguments)
    assert_close(got, theirs(model, [(x, y)], **arguments))


def test_engine_padding_gets_nothing():
    """As in torch; Opacus counts it."""
    model = Transformer(padding=0)
    x, y = sequences(6)
    x[:, 3:] = 0
    got = ours(model, [(x, y)], call=next_token)

    def loss(logits, labels):
        return nn.functional.cross_entropy(logits.transpose(1, 2), labels)

    assert_close(got, by_samples(model, (x, y), loss=loss))
    assert not got[0][0].any()


def test_engine_frozen():
    model = mlp()
    for p in (model[0].weight, model[3].bias, *model[2].parameters()):
        p.requires_grad_(False)
    assert_same(model, [batch(6, 7)])
    model = Transformer()
    for p in (*model.tokens.parameters(), *model.blocks[0].parameters()):
        p.requires_grad_(False)
    assert_same(model, [sequences(6)], call=next_token)


def test_engine_inputs_of_four_dimensions():
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm([4, 5]), nn.Linear(5, 4))
    assert_same(
        model,
        [(torch.randn(6, 2, 4, 3), torch.randint(4, (6, 2, 4)))],
        call=lambda m, c, x, y: c(m(x).permute(0, 3, 1, 2), y),
        max_grad_norm=0.1,
    )


def test_engine_batch_in_the_second_dimension():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 4))
    x, y = torch.randint(9, (5, 6)), torch.randint(4, (6,))  # [T, B]
    assert_same(model, [(x, y)], call=lambda m, c, x, y: c(m(x).sum(0), y), batch_first=False)


def test_engine_layers_without_a_rule():
    """Opacus's samplers and functorch, and a line that says which."""

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(6))
            self.inner = nn.Linear(6, 6)

        def forward(self, x):
            return self.inner(x) * self.scale

    model = nn.Sequential(
        nn.Conv3d(2, 3, 2), nn.InstanceNorm3d(3, affine=True), nn.Flatten(), nn.Linear(24, 6),
        Scale(), nn.RMSNorm(6), nn.Linear(6, 4),
    )  # fmt: skip
    assert_same(model, [batch(5, 2, 3, 3, 3)])
    wrapped = PrivateModule(model)
    samplers = wrapped.samplers
    assert samplers["3"] == "ghost_fused" and "compute_conv_grad_sample" in samplers["0"]
    assert "functorch" in samplers["4"] and "4.inner" not in samplers
    plain = wrapped.to_standard_module()
    assert plain is model and "forward" not in vars(model[0]) and not hasattr(model[0], "weight_x")
    assert not hasattr(model[4], "ft_compute_sample_grad")


def test_engine_recurrent_layers():
    from opacus.layers import DPLSTM

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = DPLSTM(3, 4, batch_first=True), nn.Linear(4, 4)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    assert_same(Recurrent(), [batch(5, 6, 3)])


def test_engine_attention_of_opacus():
    from opacus.layers import DPMultiheadAttention

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = DPMultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0].mean(1))

    assert_same(Model(), [batch(5, 6, 8)])


def test_engine_layer_used_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(7, 7), nn.Linear(7, 4)
            self.norm = nn.LayerNorm(7)

        def forward(self, x):
            return self.head(self.norm(self.layer(self.norm(self.layer(x)).tanh())))

    assert_same(Twice(), [batch(5, 7)])


@pytest.mark.parametrize("norms", [0.3, [0.1, 0.2, 0.3, 0.4, 0.5]])
def test_engine_per_layer(norms):
    """A number is the joint norm, C / sqrt(L) each; a list is Opacus's."""
    x = [batch(8, 7)]
    want = norms if isinstance(norms, list) else [norms / 5**0.5] * 5
    got = ours(mlp(), x, clipping="per_layer", max_grad_norm=norms)
    torch.manual_seed(0)
    model, x = mlp(), [batch(8, 7)]
    got = ours(model, x, clipping="per_layer", max_grad_norm=norms)
    assert_close(got, theirs(model, x, clipping="per_layer", max_grad_norm=want))


def test_engine_empty_batch():
    """Nothing, and a step like any other."""
    for model, x in ((mlp(), batch(0, 7)), (CNN(), batch(0, 2, 7, 6))):
        got = ours(model, [x, (torch.randn(3, *x[0].shape[1:]), torch.randint(4, (3,)))])
        half = len(got) // 2
        assert not any(g.any() for g in got[:half]) and all(g.any() for g in got[half:])
    got = ours(Transformer(), [sequences(0)], call=next_token)
    assert not any(g.any() for g in got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_engine_in_single_and_half_precision(dtype):
    """Close to float64; half types are added up in float32."""
    for model, x, call in (
        (mlp(), batch(16, 7), None),
        (CNN(), batch(16, 2, 7, 6), None),
        (Transformer(length=40), sequences(4, 40), next_token),
    ):
        want = theirs(model, [x], call=call)
        inputs = x[0].to(dtype) if x[0].is_floating_point() else x[0]
        got = ours(model.to(dtype), [(inputs, x[1])], call=call)
        assert all(g.dtype is dtype for g in got)
        assert_close(got, want, 1e-4 if dtype is torch.float32 else 0.1)


def test_engine_under_autocast():
    model, x = mlp().float(), batch(16, 7)

    def call(m, c, x, y):
        with torch.autocast("cpu", torch.bfloat16):
            return c(m(x), y)

    want = theirs(model, [(x[0].float(), x[1])])
    got = ours(model, [(x[0].float(), x[1])], call=call)
    assert all(g.dtype is torch.float32 for g in got)
    assert_close(got, want, 0.03)


def test_engine_expanded_indices_and_inputs():
    """Views without memory of their own; Opacus's ghost fails on such indices."""
    model = Transformer()
    x, y = sequences(1)
    x, y = x.expand(4, -1), y.expand(4, -1)
    assert not x.is_contiguous()

    def loss(logits, labels):
        return nn.functional.cross_entropy(logits.transpose(1, 2), labels)

    got = ours(model, [(x, y)], call=next_token, max_grad_norm=0.1)
    assert_close(got, by_samples(model, (x.contiguous(), y.contiguous()), 0.1, loss))
    model, (x, y) = mlp(), batch(1, 7)
    assert_close(
        ours(model, [(x.expand(5, -1), y.expand(5))]),
        by_samples(model, (x.repeat(5, 1), y.repeat(5))),
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_engine_layers_that_run_again(reentrant):
    """Activation checkpoints: each layer is counted once."""
    from torch.utils.checkpoint import checkpoint

    class Model(nn.Module):
        def __init__(self, again):
            super().__init__()
            self.again = again
            self.first, self.head = nn.Linear(7, 9), nn.Linear(9, 4)
            self.middle = nn.Sequential(nn.Linear(9, 9), nn.Tanh(), nn.LayerNorm(9))

        def forward(self, x):
            x = self.first(x)
            if self.again:
                x = checkpoint(self.middle, x, use_reentrant=reentrant)
            else:
                x = self.middle(x)
            return self.head(x)

    model, x = Model(True), batch(6, 7)
    want = Model(False)
    want.load_state_dict(model.state_dict())
    assert_close(ours(model, [x]), by_samples(want, x))


def test_engine_two_forward_passes_before_one_backward():
    """Losses of two passes over the same samples (Opacus #249), of different sizes."""
    model, (x, y) = CNN(), batch(5, 2, 7, 6)
    other = torch.randn_like(x)

    def both(m, c, x, y):
        return c(m(x), y) + 0.5 * c(m(other), y)

    got = ours(model, [(x, y)], call=both, max_grad_norm=0.1)
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for i in range(5):
        value = sum(
            f * nn.functional.cross_entropy(model(v[i : i + 1]), y[i : i + 1])
            for f, v in ((1.0, x), (0.5, other))
        )
        grads = torch.autograd.grad(value, parameters)
        size = torch.cat([g.flatten() for g in grads]).norm()
        for t, g in zip(total, grads, strict=True):
            t += g * (0.1 / (size + 1e-6)).clamp(max=1) / 8
    assert_close(got, total)
