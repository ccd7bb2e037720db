"""Poisson sampling from the operating system's secure generator, and batches of nobody."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from opacus.data_loader import DPDataLoader
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)
from torch.utils.data._utils.collate import default_collate


class PoissonSampler(UniformWithReplacementSampler):
    """Each of `num_samples` samples in each batch with probability `sample_rate`.

    Without a generator the draws are the operating system's (getrandom; ChaCha20 on Linux), 53 bits
    each, and cannot be repeated or foretold: who can foretell them needs no noise removed. With one
    they are torch's, for reproducible runs.
    """

    def __init__(
        self,
        *,
        num_samples: int,
        sample_rate: float,
        steps: int,
        generator: torch.Generator | None = None,
    ) -> None:
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate: expected a number in (0, 1], got {sample_rate}")
        super().__init__(
            num_samples=num_samples, sample_rate=sample_rate, generator=generator, steps=steps
        )

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps):
            yield (self._uniform() < self.sample_rate).nonzero().flatten().tolist()

    def _uniform(self) -> Tensor:
        """Multiples of 2^-53 in [0, 1), float64 [num_samples]."""
        if self.generator is not None:
            return torch.rand(self.num_samples, generator=self.generator, dtype=torch.float64)
        raw = bytearray(os.urandom(8 * self.num_samples))
        words = torch.frombuffer(raw, dtype=torch.int64)
        return (words >> 11 & (1 << 53) - 1).double() * 2.0**-53


class EmptyAware:
    """A collate function that also makes a batch of no samples: the first sample's, cut to none."""

    def __init__(
        self, collate: Callable[[list[Any]], Any], dataset: Dataset[Any], batch_first: bool
    ) -> None:
        self.collate, self.dataset, self.batch_first = collate, dataset, batch_first

    def __call__(self, batch: list[Any]) -> Any:
        """The batch; for an empty list, tensors of size 0 in the batch's dimension."""
        return self.collate(batch) if batch else self._cut(self.collate([self.dataset[0]]))

    def _cut(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            dim = 0 if self.batch_first or value.ndim < 2 else 1
            return value.narrow(dim, 0, 0)
        if isinstance(value, Mapping):
            return {key: self._cut(item) for key, item in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self._cut(item) for item in value))
        if isinstance(value, list | tuple):
            if len(value) == 1 and not isinstance(value[0], Tensor | Mapping | list | tuple):
                return value[:0]  # such as the samples' texts
            return type(value)(self._cut(item) for item in value)
        raise TypeError(
            "data_loader: expected its collate function to make tensors, or mappings, lists and "
            f"tuples of them, got {type(value).__name__}: an empty batch cannot be made of it"
        )


def check_order(like: DataLoader[Any]) -> None:
    """Refuse a loader whose order means something: Poisson sampling would drop it unsaid."""
    if isinstance(like.dataset, IterableDataset):
        raise ValueError(
            "data_loader: expected a dataset with indices, got an IterableDataset: it cannot "
            "be sampled by Poisson"
        )
    drawn = getattr(like.batch_sampler, "sampler", like.batch_sampler)
    known = isinstance(drawn, SequentialSampler | UniformWithReplacementSampler) or (
        isinstance(drawn, RandomSampler)
        and not drawn.replacement
        and drawn.num_samples == len(like.dataset)  # type: ignore[arg-type]
    )
    if not known or type(like.batch_sampler) not in (BatchSampler, type(drawn)):
        odd = like.batch_sampler if known else drawn
        raise ValueError(
            "data_loader: expected one that takes each sample once (batch_size, shuffle), got "
            f"{type(odd).__name__}: Poisson sampling draws from the whole data set instead; "
            "choose samples by torch.utils.data.Subset"
        )


class PoissonDataLoader(DPDataLoader):
    """A data loader over a `PoissonSampler`."""

    def __init__(
        self,
        like: DataLoader[Any],
        *,
        sample_rate: float,
        steps: int,
        generator: torch.Generator | None,
        batch_first: bool,
    ) -> None:
        dataset = like.dataset
        self.sample_rate, self.distributed = sample_rate, False
        DataLoader.__init__(
            self,
            dataset,
            batch_sampler=PoissonSampler(
                num_samples=len(dataset),  # type: ignore[arg-type]
                sample_rate=sample_rate,
                steps=steps,
                generator=generator,
            ),
            collate_fn=EmptyAware(like.collate_fn or default_collate, dataset, batch_first),
            num_workers=like.num_workers,
            pin_memory=like.pin_memory,
            timeout=like.timeout,
            worker_init_fn=like.worker_init_fn,
            multiprocessing_context=like.multiprocessing_context,
            prefetch_factor=like.prefetch_factor,
            persistent_workers=like.persistent_workers,
            generator=like.generator,  # of the workers' seeds
        )
