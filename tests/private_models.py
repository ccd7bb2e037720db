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


def by_samples(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    norm: float = 1.0,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    divide: float = 8,
) -> list[Tensor]:
    """Micro-batches of one."""
    x, y = batch
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    for i in range(len(x)):
        value = loss(model(x[i : i + 1]), y[i : i + 1])
        grads = torch.autograd.grad(value, parameters)
        size = torch.cat([g.flatten() for g in grads]).norm()
        for t, g in zip(total, grads, strict=True):
            t += g * (norm / (size + 1e-6)).clamp(max=1)
    return [t / divide for t in total]


class Attention(nn.Module):
    """Causal attention over Linear layers, as Opacus can take it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A small language model; `tied`: the output layer is the embedding."""

    def __init__(
        self,
        vocabulary: int = 13,
        width: int = 8,
        layers: int = 2,
        heads: int = 2,
        length: int = 5,
        tied: bool = False,
        padding: int | None = None,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width, padding_idx=padding)
        self.places = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, 2 * width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        h = self.tokens(x) + self.places(places)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


class CNN(nn.Module):
    """Convolutions with a group, a stride, a dilation and a reflected border."""

    def __init__(self, padding_mode: str = "zeros", padding: Any = 1) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=padding, padding_mode=padding_mode),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
            nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), groups=2, bias=False),
            nn.Tanh(),
            nn.Conv2d(6, 3, 1),
        )
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))
