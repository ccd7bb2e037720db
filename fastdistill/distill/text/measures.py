"""How alike two encoders see the same sentences: what is near what, not the vectors themselves."""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = 10


def similarities(embeddings: Tensor) -> Tensor:
    """Cosine similarity [N, N] of embeddings [N, D] of length 1, in float64."""
    x = embeddings.double()
    return x @ x.T


def pairs(matrix: Tensor) -> Tensor:
    """The entries above the diagonal of [N, N]: each pair of sentences once."""
    rows, columns = torch.triu_indices(len(matrix), len(matrix), offset=1)
    return matrix[rows, columns]


def correlation(ours: Tensor, theirs: Tensor) -> float:
    """Pearson's, between the similarities [N, N] of all pairs of different sentences."""
    return float(torch.corrcoef(torch.stack([pairs(ours), pairs(theirs)]))[0, 1])


def overlap(ours: Tensor, theirs: Tensor, count: int = NEIGHBOURS) -> float:
    """Mean share of a sentence's `count` nearest other sentences that are the same in both."""
    first, second = (_nearest(matrix, count) for matrix in (ours, theirs))
    return float((first & second).sum()) / (count * len(ours))


def _nearest(matrix: Tensor, count: int) -> Tensor:
    """Bool [N, N]: column j is one of the `count` nearest of row i, which is not i itself."""
    others = matrix.clone().fill_diagonal_(-float("inf"))
    return torch.zeros_like(others, dtype=torch.bool).scatter_(
        1, others.topk(count, 1).indices, True
    )
