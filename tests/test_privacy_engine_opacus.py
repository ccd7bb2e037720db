"""Opacus's defects that the engine is without, as they are; and Opacus's signatures."""

import inspect
import warnings

import opacus
import pytest
import torch
from opacus.schedulers import LambdaGradClip
from private_models import Transformer, assert_close, ours, theirs
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastdistill as fd

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


@pytest.fixture(autouse=True)
def quietly(one_thread):
    yield


def made(engine, mode):
    model = nn.Linear(3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(TensorDataset(torch.zeros(64, 1)), batch_size=8),
            noise_multiplier=0.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            grad_sample_mode=mode,
        )


def engines():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fd.privacy.PrivacyEngine(accountant="rdp"), opacus.PrivacyEngine(accountant="rdp")


@pytest.mark.parametrize(
    "name",
    ["make_private", "make_private_with_epsilon", "load_checkpoint", "save_checkpoint",
     "get_epsilon", "is_compatible", "validate"],
)  # fmt: skip
def test_engine_signatures(name):
    a, b = (
        inspect.signature(getattr(c, name)).parameters
        for c in (fd.privacy.PrivacyEngine, opacus.PrivacyEngine)
    )
    assert list(a) == list(b)
    assert [p.kind for p in a.values()] == [p.kind for p in b.values()]


def test_engine_returns_as_many_as_opacus():
    ours_, theirs_ = engines()
    assert len(made(ours_, "ghost_fused")) == len(made(theirs_, "ghost")) == 4
    assert len(made(ours_, "hooks")) == len(made(theirs_, "hooks")) == 3


def test_engine_scheduler_of_the_clip_norm():
    """Opacus's ghost goes on clipping to the norm before; ten times what the noise is of."""
    seen = []
    for engine, mode in zip(engines(), ("ghost_fused", "ghost"), strict=True):
        module, optimizer, criterion, _ = made(engine, mode)
        LambdaGradClip(optimizer, scheduler_function=lambda k: 0.1 if k else 1.0).step()
        assert optimizer.max_grad_norm == pytest.approx(0.1)
        optimizer.zero_grad()
        x = 100 * torch.randn(1, 3)
        with torch.no_grad():
            wrong = 1 - module(x).argmax(1)
        criterion(module(x), wrong).backward()
        optimizer.step()
        grads = torch.cat([p.grad.flatten() for p in optimizer.params])
        seen.append(float(grads.norm()) * 8)
    assert seen[0] <= 0.1 < 0.9 < seen[1]


def test_engine_padding_that_opacus_counts():
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        model = Transformer(padding=0)
        x = torch.randint(1, 13, (6, 5))
        x[:, 3:] = 0

        def call(m, c, x, y):
            return c(m(x).transpose(1, 2), y)

        got, hooks = (run(model, [(x, x)], call=call) for run in (ours, theirs))
        assert not got[0][0].any() and hooks[0][0].any()
        with pytest.raises(AssertionError):
            assert_close(got, hooks)
    finally:
        torch.set_default_dtype(torch.float32)


def test_engine_refuses_modules_that_are_wrapped():
    from opacus.grad_sample import GradSampleModule

    engine, _ = engines()
    model = nn.Linear(3, 2)
    wrapped = GradSampleModule(model)
    with pytest.raises(
        (ValueError, TypeError), match="module: expected the plain module, got GradSampleModule"
    ):
        engine.make_private(
            module=wrapped,
            optimizer=torch.optim.SGD(wrapped.parameters(), lr=0.1),
            data_loader=DataLoader(TensorDataset(torch.zeros(64, 1)), batch_size=8),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            grad_sample_mode="ghost_fused",
        )


def test_engine_with_epsilon_refuses_other_sampling():
    engine, _ = engines()
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="poisson_sampling: expected True"):
        engine.make_private_with_epsilon(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(TensorDataset(torch.zeros(64, 1)), batch_size=8),
            target_epsilon=1.0,
            target_delta=1e-5,
            epochs=1,
            max_grad_norm=1.0,
            poisson_sampling=False,
            grad_sample_mode="ghost_fused",
        )
