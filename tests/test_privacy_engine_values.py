"""PrivacyEngine without noise: the gradients of Opacus's hooks, in float64 to 1e-10."""

import pytest
import torch
from private_models import F64, assert_close, ours, theirs
from torch import nn


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
