"""Trains a student on public inputs, or privately on private ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill import _validate, kd_loss
from fastdistill.distill.private.ledger import Ledger
from fastdistill.distill.private.mechanism import Mechanism, count, named
from fastdistill.distill.private.provenance import DPTrained
from fastdistill.privacy import clip_and_noise


@dataclass(frozen=True)
class Training:
    """How to train on public inputs, where nothing needs to be counted.

    Attributes:
        steps: of AdamW, the learning rate falling linearly to 0.
        batch_size: rows per step; all of them where there are fewer.
        learning_rate: at the start.
        weight_decay: of AdamW.
        seed: of the order of the rows.
    """

    steps: int = 150
    batch_size: int = 10_000
    learning_rate: float = 0.01
    weight_decay: float = 3.0
    seed: int = 0


def fit(model: nn.Module, rows: int, loss: Callable[[Tensor], Tensor], recipe: Training) -> None:
    """Train the parameters of `model` that require a gradient, in place.

    Args:
        model: put into training mode meanwhile, and into evaluation mode afterwards.
        rows: number of rows to draw batches from.
        loss: of the rows int64 [b], a scalar.
        recipe: steps and sizes.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, recipe.learning_rate, weight_decay=recipe.weight_decay)
    generator = torch.Generator().manual_seed(recipe.seed)
    batches = _batches(rows, min(recipe.batch_size, rows), generator)
    model.train()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * (1 - step / recipe.steps)
        optimizer.zero_grad()
        loss(next(batches)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.eval()


def _batches(rows: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        order = torch.randperm(rows, generator=generator)
        yield from order[: rows // size * size].split(size)


@dataclass(frozen=True)
class DPSGD:
    """DP-SGD with Poisson sampling, all of it fixed before the data are looked at.

    Sampling rate, steps and expected batch size are yours to give, not taken from the number of
    records: under "add_remove" that number is private, under "zero_out" it is public and the
    expected batch is sampling_rate times it.

    Attributes:
        sampling_rate: probability by which a step includes a record, in (0, 1).
        steps: of SGD with momentum 0.9, the learning rate constant.
        noise_multiplier: standard deviation of the noise over max_grad_norm, > 0.
        max_grad_norm: the clip norm C, of the gradient of one record over all parameters.
        expected_batch_size: what the noisy sum is divided by.
        learning_rate: of SGD.
        seed: None draws the batches from the operating system's generator and the noise from
            ChaCha20: for release. A number makes a reproducible run, not one for release.
    """

    sampling_rate: float
    steps: int
    noise_multiplier: float
    max_grad_norm: float
    expected_batch_size: float
    learning_rate: float
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "noise_multiplier", "max_grad_norm", "expected_batch_size", "learning_rate",
        ):  # fmt: skip
            _validate.positive(name, getattr(self, name))
        count("steps", self.steps)
        self.mechanism("check")

    def mechanism(self, dataset_id: str) -> Mechanism:
        """What the whole training is."""
        return Mechanism(
            "DP-SGD", dataset_id, self.max_grad_norm, self.noise_multiplier * self.max_grad_norm,
            self.sampling_rate, 1, self.steps,
        )  # fmt: skip


def dp_train(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    settings: DPSGD,
    *,
    dataset_id: str,
    ledger: Ledger,
    key: str = "",
    replay: bool = False,
) -> DPTrained:
    """Train `model` in place by DP-SGD (Abadi et al. 2016), debited before the first step.

    Args:
        model: without batch normalisation, which mixes records, and without dropout's own state.
            Its start, architecture and settings must not come from these records.
        inputs: [N, ...], private; row i is record i's.
        targets: [N, ...]: record i's label, or a function of record i and of public or
            differentially private values.
        loss: of one record: (output without the batch dimension, target), a scalar.
        settings: all numbers.
        dataset_id: names the records.
        ledger: is debited, under add_remove or zero_out adjacency.
        key: names the release in the ledger's journal.
        replay: this very training was debited under `key` and is made again from its start, with
            the same data and seed: the same noise and the same model, so no second release.

    Returns:
        The provenance of the trained model.

    Raises:
        ValueError: an argument, or a model with batch normalisation.
        BudgetExceeded: nothing was debited or trained.
    """
    named("dataset_id", dataset_id)
    if len(inputs) != len(targets):
        raise ValueError(f"targets: expected {len(inputs)} rows, got {len(targets)}")
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training is not None:
            if not isinstance(module, nn.modules.instancenorm._InstanceNorm):
                raise ValueError(
                    f"model: {name} is {type(module).__name__}, which mixes the records of a "
                    "batch: no record's gradient can be clipped. Use GroupNorm"
                )
    mechanism = settings.mechanism(dataset_id)
    if not replay:
        ledger.spend(mechanism, key=key)
    elif settings.seed is None or (mechanism, key) not in zip(
        ledger.history, ledger.keys, strict=True
    ):
        raise ValueError(
            "replay: expected a seeded training whose debit the ledger holds under "
            f"key {key!r}, got seed={settings.seed} and the keys {sorted(set(ledger.keys))}"
        )
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), settings.learning_rate, momentum=0.9)
    generator = None if settings.seed is None else torch.Generator().manual_seed(settings.seed)
    model.train()
    for _ in range(settings.steps):
        drawn = _poisson(len(inputs), settings.sampling_rate, generator)
        _private_step(
            model, parameters, inputs[drawn], targets[drawn], loss, settings, optimizer, generator
        )
    model.eval()
    return DPTrained((mechanism,), dataset_id, ledger.adjacency, ledger.delta)


def _private_step(
    model: nn.Module,
    parameters: dict[str, Any],
    inputs: Tensor,
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    settings: DPSGD,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator | None,
) -> None:
    """One step: the records' gradients, clipped, summed and noised by `privacy.clip_and_noise`.

    An empty batch is a step of noise alone: nothing tells that it was empty.
    """

    def of_one(values: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        output = torch.func.functional_call(model, values, (x[None],))
        return loss(output[0], target)

    values = {name: p.detach() for name, p in parameters.items()}
    if len(inputs):
        found = torch.func.vmap(torch.func.grad(of_one), (None, 0, 0), randomness="different")(
            values, inputs, targets
        )
        samples = [found[name] for name in parameters]
    else:
        samples = [p.detach().new_empty(0, *p.shape) for p in parameters.values()]
    released = clip_and_noise(
        samples,
        settings.max_grad_norm,
        settings.noise_multiplier,
        expected_batch_size=settings.expected_batch_size,
        generator=generator,
    )
    for p, gradient in zip(parameters.values(), released, strict=True):
        p.grad = gradient.to(p.dtype)
    optimizer.step()


def _poisson(n: int, rate: float, generator: torch.Generator | None) -> Tensor:
    """Each of n rows with probability `rate`, independently: int64, ascending."""
    if generator is not None:
        return (torch.rand(n, generator=generator, dtype=torch.float64) < rate).nonzero()[:, 0]
    # 53 bits, as torch.rand's; the operating system's generator cannot be replayed
    bits = torch.frombuffer(bytearray(os.urandom(8 * max(n, 1))), dtype=torch.int64)[:n]
    return (((bits >> 11) & ((1 << 53) - 1)).double() * 2.0**-53 < rate).nonzero()[:, 0]


def loss_value_noise(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    noise_std: float,
    generator: torch.Generator,
) -> Tensor:
    """RONA's loss as its authors released it, for comparison: NOT private, whatever noise_std is.

    The noise is added to the value of the loss, whose gradient it does not change: epsilon is
    infinite. A scalar.
    """
    value = kd_loss(student_logits, teacher_logits, temperature=temperature)
    assert isinstance(value, Tensor)
    return value + noise_std * torch.randn((), generator=generator)
