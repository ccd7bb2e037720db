"""PrivacyEngine: what is refused, and in which words."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastdistill as fd


def private(engine=None, model=None, optimizer=None, **settings):
    model = nn.Linear(3, 2) if model is None else model
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    data = TensorDataset(torch.randn(40, 3), torch.randint(2, (40,)))
    arguments = dict(noise_multiplier=1.0, max_grad_norm=1.0, grad_sample_mode="ghost_fused")
    engine = engine or fd.privacy.PrivacyEngine(accountant="rdp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return engine.make_private(
            module=model,
            optimizer=optimizer,
            data_loader=DataLoader(data, batch_size=8),
            **{**arguments, **settings},
        )


REFUSED = [
    (dict(clipping="adaptive"), ValueError, "clipping: .*adaptive.*sensitivity"),
    (dict(clipping="nearly"), ValueError, "clipping: expected one of flat, per_layer"),
    (dict(rand_on_empty=True), ValueError, "rand_on_empty: expected False"),
    (dict(wrap_model=False), ValueError, "wrap_model: expected True"),
    (dict(model=nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))), Exception, "BatchNorm"),
    (dict(criterion=len), TypeError, "criterion: .*got len, whose samples cannot be told"),
    (dict(criterion=nn.CTCLoss()), TypeError, "criterion: expected a loss of torch.*got CTCLoss"),
    (dict(criterion=nn.MSELoss(reduction="sum")), ValueError, "criterion: .*reduction=.mean."),
    (dict(loss_reduction="max", criterion=nn.MSELoss()), ValueError, "criterion|loss_reduction"),
    (dict(max_grad_norm=[1.0, 1.0]), ValueError, "max_grad_norm: expected a number with clipping"),
    (
        dict(max_grad_norm=[1.0], clipping="per_layer"), ValueError,
        "max_grad_norm: expected 2 numbers, .* got 1",
    ),
    (dict(max_grad_norm=0.0), ValueError, "max_grad_norm|max_norm: expected a number > 0"),
    (dict(noise_multiplier=-1.0), ValueError, "noise_multiplier: expected a number >= 0"),
    (dict(noise_generator=3), TypeError, "generator: expected a torch.Generator"),
    (dict(sample_rate=0.1), ValueError, "steps, expected_batch_size: expected with sample_rate"),
    (
        dict(sample_rate=1.5, steps=3, expected_batch_size=4), ValueError,
        r"sample_rate: expected a number in \(0, 1\], got 1.5",
    ),
    (dict(batches=3), TypeError, "make_private: expected sample_rate, .*got batches"),
    (
        dict(optimizer=torch.optim.SGD(nn.Linear(3, 2).parameters())), ValueError,
        "optimizer: expected parameters of the module",
    ),
    (dict(grad_sample_mode="hooks", steps=3), TypeError, "steps: expected with grad_sample_mode"),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=lambda c: ",".join(c[0]))
def test_engine_refuses(case):
    arguments, kind, words = case
    with pytest.raises(kind, match=words):
        private(**arguments)


def test_engine_refuses_a_central_limit_accountant():
    with pytest.raises(ValueError, match="accountant: .*central limit .*below the true epsilon"):
        fd.privacy.PrivacyEngine(accountant="gdp")
    with pytest.raises(ValueError, match="accountant: expected one of prv, rdp"):
        fd.privacy.PrivacyEngine(accountant="moments")


def test_engine_in_secure_mode_refuses_what_is_not():
    engine = fd.privacy.PrivacyEngine(accountant="rdp", secure_mode=True)
    with pytest.raises(ValueError, match="noise_generator: expected None"):
        private(engine, noise_generator=torch.Generator())
    with pytest.raises(ValueError, match="secure_mode: .*torch.normal"):
        private(engine, grad_sample_mode="hooks")
    assert len(private(engine)) == 4


def test_engine_warns_of_reproducible_noise():
    engine = fd.privacy.PrivacyEngine(accountant="rdp")
    model = nn.Linear(3, 2)
    data = TensorDataset(torch.randn(40, 3), torch.randint(2, (40,)))
    with pytest.warns(UserWarning, match="reproducible; not for release"):
        engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters()),
            data_loader=DataLoader(data, batch_size=8),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            grad_sample_mode="ghost_fused",
            noise_generator=torch.Generator().manual_seed(1),
        )


def test_engine_refuses_a_step_without_sums_and_two_backward_passes():
    model, optimizer, criterion, _ = private()
    x, y = torch.randn(4, 3), torch.randint(2, (4,))
    with pytest.raises(ValueError, match="step: expected a backward"):
        optimizer.step()
    criterion(model(x), y).backward()
    with pytest.raises(ValueError, match="grad accumulation"):
        criterion(model(x), y).backward()
    optimizer.step()
    with pytest.raises(ValueError, match="zero_grad"):
        criterion(model(x), y).backward()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="call the criterion that make_private returned"):
        nn.functional.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="batch of 80 samples is too large"):
        criterion(model(torch.randn(80, 3)), torch.randint(2, (80,))).backward()


def test_engine_refuses_what_it_cannot_tell_apart():
    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return nn.functional.linear(self.layer(x), self.layer.weight)

    x, y = torch.randn(4, 3), torch.randint(3, (4,))
    model, _, criterion, _ = private(model=Outside())
    with pytest.raises(RuntimeError, match="layer.weight: used outside the layer"):
        criterion(model(x), y).backward()
    model, _, criterion, _ = private(model=nn.Sequential(nn.Flatten(0, 0), nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="1 .Linear.: expected an input with 2 samples"):
        (criterion(model(x)[::2], y[::2])).backward()
    model, _, criterion, _ = private(model=nn.Linear(3, 3))
    loss = criterion(model(x), y)
    with pytest.raises(TypeError, match="not be clipped sample by sample"):
        loss + next(model.parameters()).sum()
    with pytest.raises(RuntimeError, match="evaluation mode"):
        model.eval()
        criterion(model(x), y).backward()


@pytest.mark.parametrize("layer", [nn.Conv1d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)], ids=repr)
def test_engine_refuses_an_image_without_a_batch(layer):
    """As many channels as losses: channels would be clipped in place of samples."""
    model, _, criterion, _ = private(model=nn.Sequential(layer))
    x = torch.randn(4, *(4,) * len(layer.kernel_size))
    with pytest.raises(ValueError, match="Conv.d: expected an input with . dimensions, the batch"):
        criterion(model(x).flatten(1), torch.zeros(4, dtype=torch.int64)).backward()


def test_engine_refuses_what_is_distributed():
    from opacus.distributed import DifferentiallyPrivateDistributedDataParallel

    class Wrapped(DifferentiallyPrivateDistributedDataParallel):
        def __init__(self):  # without a process group
            nn.Module.__init__(self)
            self.module = nn.Linear(3, 2)

    with pytest.raises(ValueError, match="module: expected one that is not distributed, got Wrap"):
        private(model=Wrapped())
