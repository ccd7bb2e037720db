"""Small models for the tests of the privacy engine, and one private step of each engine."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import opacus
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastdistill as fd

F64 = torch.float64


def steps(
    engine: Any,
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    mode: str,
    criterion: Any = None,
    call: Callable[[nn.Module, Any, Tensor, Tensor], Any] | None = None,
    **settings: Any,
) -> list[Tensor]:
    """The gradients that one optimizer step over each of the batches would use, all in one list.

    The model is copied; `call(model, criterion, x, y)` makes the loss.
    """
    model = copy.deepcopy(model)
    criterion = nn.CrossEntropyLoss() if criterion is None else criterion
    data = TensorDataset(torch.zeros(64, 1), torch.zeros(64))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    arguments = {
        "noise_multiplier": 0.0,
        "max_grad_norm": 1.0,
        "poisson_sampling": False,
        "loss_reduction": getattr(criterion, "reduction", "mean"),
        **settings,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = engine.make_private(
            module=model,
            optimizer=optimizer,
            criterion=criterion,
            data_loader=DataLoader(data, batch_size=8),
            grad_sample_mode=mode,
            **arguments,
        )
    wrapped, optimizer = out[:2]
    criterion = out[2] if len(out) == 4 else criterion
    released = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = call(wrapped, criterion, x, y) if call else criterion(wrapped(x), y)
        loss.backward()
        optimizer.step()
        released += [p.grad.clone() for p in optimizer.params]
    return released


def ours(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], **settings: Any):
    """By this package."""
    budget = settings.pop("memory_budget", 1 << 28)
    engine = fd.privacy.PrivacyEngine(accountant="rdp", memory_budget=budget)
    return steps(engine, model, batches, "ghost_fused", **settings)


def theirs(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], **settings: Any):
    """By Opacus's hooks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = opacus.PrivacyEngine(accountant="rdp")
    return steps(engine, model, batches, "hooks", **settings)


def assert_close(got: Sequence[Tensor], want: Sequence[Tensor], limit: float = 1e-10) -> None:
    """Joint relative distance."""
    assert len(got) == len(want) > 0
    apart = sum(
        float((a.double() - b.double()).square().sum()) for a, b in zip(got, want, strict=True)
    )
    size = sum(float(b.double().square().sum()) for b in want)
    assert all(a.shape == b.shape for a, b in zip(got, want, strict=True))
    assert apart**0.5 <= limit * size**0.5, (apart**0.5, size**0.5)
