"""Criteria of the private engine: per-sample losses, each of its own sample alone."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdistill as fd
from fastdistill.nn import HintLosses, KDLoss
from fastdistill.privacy.engine.criterion import PrivateCriterion, PrivateLoss
from fastdistill.privacy.engine.losses import MODULES, PerSample

B, T, V = 5, 3, 4


@pytest.fixture(autouse=True)
def doubles(one_thread):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


pytestmark = pytest.mark.filterwarnings("ignore:reduction. .mean. divides")


def logits(*shape):
    return torch.randn(*shape)


X, Y = (B, V), torch.tensor([0, 3, 2, 1, 1])
CASES = {
    "cross_entropy": (nn.CrossEntropyLoss(label_smoothing=0.1), lambda: (logits(B, V), Y)),
    "tokens": (nn.CrossEntropyLoss(), lambda: (logits(B, V, T), torch.randint(V, (B, T)))),
    "probabilities": (nn.CrossEntropyLoss(), lambda: (logits(B, V), logits(B, V).softmax(1))),
    "mse": (nn.MSELoss(), lambda: (logits(B, V, T), logits(B, V, T))),
    "mse sum": (nn.MSELoss(reduction="sum"), lambda: (logits(B, V), logits(B, V))),
    "bce": (nn.BCEWithLogitsLoss(), lambda: (logits(B, V), logits(B, V).sigmoid())),
    "kl": (nn.KLDivLoss(), lambda: (logits(B, V).log_softmax(1), logits(B, V).softmax(1))),
    "kl batchmean": (
        nn.KLDivLoss(reduction="batchmean"),
        lambda: (logits(B, V).log_softmax(1), logits(B, V).softmax(1)),
    ),
    "function": (F.smooth_l1_loss, lambda: (logits(B, V), logits(B, V))),
    "partial": (
        functools.partial(F.cross_entropy, label_smoothing=0.2), lambda: (logits(B, V), Y),
    ),
    "kd_loss": (
        functools.partial(fd.kd_loss, temperature=2.0, hard_weight=0.3),
        lambda: (logits(B, V), logits(B, V), Y),
    ),
    "KDLoss": (KDLoss(temperature=3.0), lambda: (logits(B, T, V), logits(B, T, V))),
    "KDLoss batchmean": (
        KDLoss(reduction="batchmean", divergence="reverse_kl"),
        lambda: (logits(B, T, V), logits(B, T, V)),
    ),
    "hint_loss": (fd.hint_loss, lambda: (logits(B, T, V), logits(B, T, V))),
    "HintLosses": (
        HintLosses([{"weight": 0.5}, {"distance": "cosine"}]),
        lambda: ([logits(B, V), logits(B, T, V)], [logits(B, V), logits(B, T, V)]),
    ),
}  # fmt: skip


def cut(value, i):
    return [v[i : i + 1] for v in value] if isinstance(value, list) else value[i : i + 1]


@pytest.mark.parametrize("name", CASES)
def test_losses_are_what_the_criterion_says_of_each_sample_alone(name):
    criterion, make = CASES[name]
    args = make()
    reduction = "sum" if name.endswith(" sum") else "mean"
    got = PerSample(criterion, reduction)(*args)
    want = torch.stack([criterion(*(cut(a, i) for a in args)) for i in range(B)])
    torch.testing.assert_close(got, want)
    whole = criterion(*args)
    torch.testing.assert_close(got.mean() if reduction == "mean" else got.sum(), whole)


def test_losses_of_samples_with_ignored_tokens():
    """A sample's mean is over its own tokens: what another has ignored does not enter."""
    x, y = logits(B, V, T), torch.randint(V, (B, T))
    y[0, 1:], y[1] = -100, -100
    want = F.cross_entropy(x, y, reduction="none").sum(1) / torch.tensor([1, 1, T, T, T])
    torch.testing.assert_close(PerSample(nn.CrossEntropyLoss(), "mean")(x, y), want)
    flat = x.transpose(1, 2).reshape(B * T, V), y.reshape(-1)
    got = PerSample(nn.CrossEntropyLoss(), "mean")(*flat, shape=(B, T, V))
    torch.testing.assert_close(got, want)
    teacher, mask = logits(B, T, V), torch.rand(B, T) < 0.6
    got = PerSample(KDLoss(), "mean")(x.transpose(1, 2), teacher, mask=mask)
    rows = fd.kd_loss(x.transpose(1, 2), teacher, mask=mask, reduction="none")
    torch.testing.assert_close(got, rows.sum(1) / mask.sum(1).clamp(min=1))


def test_losses_own_criterion():
    class Own(nn.Module):
        reduction = "none"

        def forward(self, x, y):
            return (x - y).square().sum(1)

    x, y = logits(B, V), logits(B, V)
    assert PerSample(Own(), "mean")(x, y).shape == (B,)
    with pytest.raises(ValueError, match=r"criterion: expected losses \[B\]"):
        PerSample(nn.MSELoss(reduction="none"), "mean")(x, y)


@pytest.mark.parametrize("criterion", [
    lambda x, y: (x - y).mean(), nn.CTCLoss(), fd.nn.DistilBertLoss(),
    HintLosses([{"student_width": 3, "teacher_width": 4}]), functools.partial(F.mse_loss, 1),
])  # fmt: skip
def test_losses_refuse_what_is_not_known(criterion):
    with pytest.raises(TypeError, match="criterion: .*cannot be told apart"):
        PerSample(criterion, "mean")


def test_losses_refuse_what_couples_samples():
    with pytest.raises(ValueError, match="normalizer: expected None"):
        PerSample(KDLoss(normalizer=3.0), "mean")
    with pytest.raises(ValueError, match="return_parts"):
        PerSample(KDLoss(return_parts=True), "mean")
    with pytest.raises(ValueError, match="normalizer: expected it in make_private"):
        PerSample(KDLoss(), "mean")(logits(B, V), logits(B, V), normalizer=3)
    weight = nn.Parameter(logits(V, V))
    with pytest.raises(ValueError, match="proj_weight: .*make the regressor a layer"):
        PerSample(fd.hint_loss, "mean")(logits(B, V), logits(B, V), proj_weight=weight)
    assert len(MODULES) == len(set(MODULES)) > 15


def test_losses_add_up():
    """Several criteria and one backward pass (Opacus #249): as their sum in one criterion."""
    import warnings

    from private_models import by_samples
    from torch.utils.data import DataLoader, TensorDataset

    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, V))
    x, y, t = logits(B, 6), Y, logits(B, V)
    engine = fd.privacy.PrivacyEngine(accountant="rdp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module, optimizer, criterion, _ = engine.make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
            data_loader=DataLoader(TensorDataset(torch.zeros(64, 1)), batch_size=8),
            noise_multiplier=0.0, max_grad_norm=0.3, grad_sample_mode="ghost_fused",
        )  # fmt: skip
    distil = PrivateCriterion(module, optimizer, KDLoss(temperature=2.0))
    z = module(x)
    loss = 0.3 * criterion(z, y) + distil(z, t) / 2 - (-distil(z, t)) * 0.2 + 1 - 1
    assert isinstance(loss, PrivateLoss) and "PrivateLoss(5 samples" in repr(loss)
    assert loss.item() == float(loss) == pytest.approx(float(loss.loss_per_sample.detach().mean()))
    loss.backward()
    optimizer.step()

    def both(z, yt):
        y, t = tuple(yt)
        return 0.3 * F.cross_entropy(z, y) + 0.7 * fd.kd_loss(z, t, temperature=2.0)

    class Pair(tuple):
        def __getitem__(self, key):
            return Pair(v[key] for v in self)

    model = module.to_standard_module()
    want = by_samples(model, (x, Pair((y, t))), norm=0.3, loss=both)
    for p, w in zip(optimizer.params, want, strict=True):
        torch.testing.assert_close(p.grad, w, rtol=1e-9, atol=1e-12)
    for wrong in ("loss", torch.ones(B)):
        with pytest.raises(TypeError, match="expected a number or a loss"):
            loss + wrong
    with pytest.raises(TypeError, match="got a loss"):
        loss * loss
