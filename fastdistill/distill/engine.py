"""The training loop. One seed gives the same network, interrupted or not."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdistill.distill.errors import JobError
from fastdistill.distill.objectives import Loss
from fastdistill.distill.snapshot import Curve, Snapshot

EVALUATION_BATCH = 256  # fixed: another batch size may round logits differently
WARM_UP = 0.2  # of all steps
WEIGHT_DECAY = 0.01

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Recipe:
    """How to train one network.

    Attributes:
        epochs: each draws as many images as the training set has.
        batch_size: images per step; an incomplete last batch is left out.
        learning_rate: peak of the schedule.
        seed: of the order of the images and of the shifts.
        shift: augmentation, up to so many pixels in each direction.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    shift: int = 0


def train(
    model: nn.Module,
    images: Tensor,
    rows: Tensor,
    loss: Loss,
    recipe: Recipe,
    *,
    snapshot: Snapshot,
    measure: Callable[[nn.Module], dict[str, float]],
    after_epoch: Callable[[Curve], None],
) -> Curve:
    """Train `model` in place, from the last snapshot on if there is one.

    Args:
        model: on the device of `images`.
        images: [N, C, H, W] network input.
        rows: int64 [R], the images that may be drawn. An epoch draws N images whatever R is, so
            that students with few labels make as many steps as the others.
        loss: see `objectives`.
        recipe: epochs, steps and seed.
        snapshot: written after each epoch, so a kill loses at most one.
        measure: figures of the model after an epoch, such as its accuracy.
        after_epoch: told of the curve so far, also of a restored one.

    Returns:
        One entry per epoch.

    Raises:
        JobError: the loss is no longer finite.
    """
    count = len(images)
    batch = min(recipe.batch_size, count)
    steps = count // batch

    def batches(generator: torch.Generator, _: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = _draw(rows, steps * batch, generator).to(images.device)
        for drawn in order.split(batch):
            inputs = images[drawn]
            yield (_shift(inputs, recipe.shift, generator) if recipe.shift else inputs), drawn

    return loop(
        model,
        batches,
        lambda drawn: loss(model(drawn[0]), drawn[1]),
        recipe,
        steps,
        snapshot=snapshot,
        measure=measure,
        after_epoch=after_epoch,
    )


def loop(
    model: nn.Module,
    batches: Callable[[torch.Generator, int], Iterable[Batch]],
    loss: Callable[[Batch], Tensor],
    recipe: Recipe,
    steps: int,
    *,
    snapshot: Snapshot,
    measure: Callable[[Any], dict[str, float]],
    after_epoch: Callable[[Curve], None],
) -> Curve:
    """Train the parameters of `model` that require a gradient, whatever the batches are.

    Args:
        model: in training mode while `loss` is called.
        batches: the `steps` batches of an epoch, given a generator and the number of epochs that
            are done. All that is random in them must come from one of the two.
        loss: of one batch, a scalar.
        recipe: epochs, learning rate and seed.
        steps: per epoch.
        snapshot: see `train`.
        measure: see `train`.
        after_epoch: see `train`.

    Returns:
        One entry per epoch.

    Raises:
        JobError: the loss is no longer finite.
    """
    # All that is random here comes from this generator, on the CPU whatever the device: its state
    # is in the snapshot, and a seed means the same order everywhere.
    generator = torch.Generator().manual_seed(recipe.seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, recipe.learning_rate, weight_decay=WEIGHT_DECAY, fused=True
    )
    curve = snapshot.load(model, optimizer, generator)
    after_epoch(curve)
    while len(curve) < recipe.epochs:
        start = time.perf_counter()
        model.train()
        total = torch.zeros((), device=trained[0].device)
        for step, drawn in enumerate(batches(generator, len(curve))):
            done = (len(curve) * steps + step) / (recipe.epochs * steps)
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * schedule(done)
            value = loss(drawn)
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += value.detach()
        mean = float(total) / steps
        if not math.isfinite(mean):
            raise JobError(
                "The training diverged.",
                f"The loss of epoch {len(curve) + 1} is {mean}.",
                f"Choose a smaller learning_rate than {recipe.learning_rate:g}.",
            )
        entry = {"epoch": len(curve) + 1, "loss": mean, **measure(model)}
        curve.append(entry | {"seconds": time.perf_counter() - start})
        snapshot.save(model, optimizer, generator, curve)
        after_epoch(curve)
    return curve


def schedule(done: float) -> float:
    """Learning rate over its peak, `done` in [0, 1) being the share of all steps: 1 - cosine.

    A function of the step alone, so a resumed training needs no scheduler's state.
    """
    if done < WARM_UP:
        return 0.04 + 0.96 * done / WARM_UP  # not from 0: the first step would be lost
    return 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits [N, classes] in evaluation mode, without gradient."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part) for part in torch.split(images, EVALUATION_BATCH)])


def _draw(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of `rows`, all of them once before any of them twice."""
    passes = -(-count // len(rows))
    orders = [rows[torch.randperm(len(rows), generator=generator)] for _ in range(passes)]
    return torch.cat(orders)[:count]


def _shift(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each image [C, H, W] moved by -most..most pixels in both directions, its border repeated."""
    count, _, height, width = images.shape
    padded = F.pad(images, (most,) * 4, mode="replicate")
    down, right = torch.randint(0, 2 * most + 1, (2, count, 1), generator=generator)
    ys = (down + torch.arange(height)).to(images.device)[:, :, None]
    xs = (right + torch.arange(width)).to(images.device)[:, None, :]
    which = torch.arange(count, device=images.device)[:, None, None]
    # the advanced indices around ":" put [count, height, width] first, channels last
    return padded[which, :, ys, xs].movedim(3, 1).contiguous()
