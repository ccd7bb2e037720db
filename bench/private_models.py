"""The models of `python -m bench private`, and one training step of each contender.

A step is zero_grad, forward, backward, optimizer.step (SGD), on one batch that stays the same.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from typing import NamedTuple

import opacus
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastdistill
from bench.bookkeeping import BookKeeping
from fastdistill.distill import models

MAX_NORM, NOISE_MULTIPLIER = 1.0, 1.0
RATE = 1e-6  # of learning: the model hardly moves

Step = Callable[[], list[Tensor]]  # does one step; gives the gradients it used


class CrossEntropy(nn.Module):
    """One loss a sample at reduction "none", which is how Opacus's ghost mode asks for them."""

    reduction = "mean"

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        each = nn.functional.cross_entropy(logits, labels, reduction="none")
        each = each.flatten(1).mean(1) if each.ndim > 1 else each
        return each if self.reduction == "none" else each.mean()


class Attention(nn.Module):
    """Causal self-attention of Linear layers."""

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
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A language model; logits [B, V, T], as cross_entropy takes them."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1]).repeat(len(x), 1)
        h = self.blocks(self.tokens(x) + self.places(places))
        return self.head(self.norm(h)).transpose(1, 2)


class Case(NamedTuple):
    """A model with its batch, and what is promised of ours: with noise, without."""

    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    bars: tuple[float, float]


def _mlp(width: int = 1024) -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


def _cnn() -> nn.Module:
    """The main job's teacher, with GroupNorm where it has BatchNorm, as Opacus replaces it."""
    plain = models.build(models.teacher(1, 28, 28, 10), 0)
    return opacus.validators.ModuleValidator.fix(plain)


CASES = {
    "mlp": Case(
        _mlp,
        lambda: (torch.randn(256, 784), torch.randint(10, (256,))),
        (1.10, 1.07),
    ),
    "transformer": Case(
        lambda: Transformer(vocabulary=1000, length=128, width=128, layers=2, heads=4),
        lambda: (torch.randint(1000, (16, 128)), torch.randint(1000, (16, 128))),
        (1.08, 1.05),
    ),
    "cnn": Case(
        _cnn,
        lambda: (torch.randn(256, 1, 28, 28), torch.randint(10, (256,))),
        (1.3, 1.3),
    ),
}


def contenders(case: Case, sigma: float = NOISE_MULTIPLIER) -> dict[str, Callable[[], Step]]:
    """name -> what builds its step; all from the same start, on the same batch."""
    torch.manual_seed(0)
    model, (x, y) = case.model(), case.batch()

    def plain() -> Step:
        own = copy.deepcopy(model)
        optimizer = torch.optim.SGD(own.parameters(), lr=RATE)
        criterion = nn.CrossEntropyLoss()

        def step() -> list[Tensor]:
            optimizer.zero_grad()
            criterion(own(x), y).backward()
            optimizer.step()
            return [p.grad for p in own.parameters() if p.grad is not None]

        return step

    def private(mode: str, sigma: float, engine: Callable[[], object]) -> Callable[[], Step]:
        def build() -> Step:
            own = copy.deepcopy(model)
            criterion = CrossEntropy() if mode == "ghost" else nn.CrossEntropyLoss()
            data = TensorDataset(torch.zeros(4 * len(x)))
            logging.getLogger("fastdistill").setLevel(logging.ERROR)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = engine().make_private(  # type: ignore[attr-defined]
                    module=own,
                    optimizer=torch.optim.SGD(own.parameters(), lr=RATE),
                    criterion=criterion,
                    data_loader=DataLoader(data, batch_size=len(x)),
                    noise_multiplier=sigma,
                    max_grad_norm=MAX_NORM,
                    poisson_sampling=False,
                    grad_sample_mode=mode,
                )
            wrapped, optimizer = made[:2]
            loss = made[2] if len(made) == 4 else criterion
            optimizer.step_hook = None  # the accountant's time is not the step's

            def step() -> list[Tensor]:
                optimizer.zero_grad()
                loss(wrapped(x), y).backward()
                optimizer.step()
                return [p.grad for p in optimizer.params]

            return step

        return build

    def eager() -> Step:
        own = BookKeeping(copy.deepcopy(model), MAX_NORM, sigma, len(x))
        optimizer = torch.optim.SGD(own.parameters, lr=RATE)

        def step() -> list[Tensor]:
            optimizer.zero_grad()
            own.backward(CrossEntropy()(own.model(x), y) * len(x))
            optimizer.step()
            return [p.grad for p in own.parameters if p.grad is not None]

        return step

    def ours() -> object:
        return fastdistill.privacy.PrivacyEngine(accountant="rdp")

    def theirs() -> object:
        return opacus.PrivacyEngine(accountant="rdp")

    return {
        "non-private": plain,
        "fastdistill": private("ghost_fused", sigma, ours),
        "fastdistill (no noise)": private("ghost_fused", 0.0, ours),
        "eager": eager,
        "opacus ghost": private("ghost", sigma, theirs),
        "opacus hooks": private("hooks", sigma, theirs),
    }


def truth(case: Case) -> list[Tensor]:
    """The clipped mean in float64, by micro-batches of one sample."""
    torch.manual_seed(0)
    model, (x, y) = case.model(), case.batch()
    model = model.double()
    x = x.double() if x.is_floating_point() else x
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for i in range(len(x)):
        loss = CrossEntropy()(model(x[i : i + 1]), y[i : i + 1])
        grads = torch.autograd.grad(loss, parameters)
        norm = torch.stack([g.norm() for g in grads]).norm()
        for t, g in zip(total, grads, strict=True):
            t += g * (MAX_NORM / (norm + 1e-6)).clamp(max=1)
    return [t / len(x) for t in total]
