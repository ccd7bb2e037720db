"""Which public queries to spend budget on: chosen from the student's outputs, never a teacher's.

The student has seen noisy answers only, so that choosing by it is post-processing; choosing by raw
answers of the teachers would be a release of its own. Nothing of n x n is ever made.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastdistill import _validate
from fastdistill.distill import extras
from fastdistill.distill.private.mechanism import count as _count

BLOCK = 1 << 22
"""Values of a block of distances."""

PREFILTER = 10
"""`diverse` clusters so many times as many rows as it is to choose: those of the least margin."""


def select(
    strategy: str,
    logits: Tensor,
    count: int,
    *,
    seed: int,
    exclude: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Rows to query.

    Args:
        strategy: "random"; "margin", the least distance between the two likeliest classes;
            "entropy", the largest; "diverse", k-means over ten times as many rows of the least
            margin, weighted by 1 - margin, and of each cluster the row next to its centre (Zhdanov
            2019, "Diverse mini-batch Active Learning"); "k-center", each time the row that is
            farthest from all chosen and excluded ones (Gonzalez 1985; Sener and Savarese 2018).
        logits: [n, classes], the student's on the public pool.
        count: how many rows.
        seed: decides everything that is random, and ties.
        exclude: int64, rows already answered: never chosen again, and centers for "k-center".
        temperature: T > 0 of the softmax that softens the logits.

    Returns:
        int64 [count] on the CPU: different rows, in the order of choice where there is one.

    Raises:
        TypeError, ValueError: an argument, or fewer than `count` rows are left.
    """
    _validate.choice("strategy", strategy, STRATEGIES)
    logits = _validate.floating("logits", logits).detach()
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits: expected a shape [n, classes >= 2], got {list(logits.shape)}")
    _count("count", count)
    temperature = _validate.positive("temperature", temperature)
    free = torch.ones(len(logits), dtype=torch.bool)
    if exclude is not None:
        if exclude.dtype is not torch.int64 or exclude.ndim != 1:
            raise TypeError(
                f"exclude: expected int64 [m], got {exclude.dtype} {list(exclude.shape)}"
            )
        if len(exclude) and not 0 <= int(exclude.min()) <= int(exclude.max()) < len(logits):
            raise ValueError(f"exclude: expected rows in [0, {len(logits) - 1}]")
        free[exclude.cpu()] = False
    # Shuffled once: whoever takes the first of equals takes one at random, and the same one again.
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    order = order[free[order]]
    if count > len(order):
        raise ValueError(f"count: expected at most {len(order)} rows that are left, got {count}")
    probabilities = torch.softmax(logits.cpu().float() / temperature, 1)
    if not bool(probabilities.isfinite().all()):
        raise ValueError("logits: expected finite values")
    if strategy == "k-center":
        chosen = _k_center(probabilities, order, torch.arange(len(free))[~free], count)
        return chosen
    return order[_BY_NAME[strategy](probabilities[order], count, seed)]


def _random(probabilities: Tensor, count: int, seed: int) -> Tensor:
    return torch.arange(count)  # they come shuffled


def _margins(probabilities: Tensor) -> Tensor:
    best = probabilities.topk(2, 1).values
    return best[:, 0] - best[:, 1]


def _margin(probabilities: Tensor, count: int, seed: int) -> Tensor:
    return _margins(probabilities).argsort(stable=True)[:count]


def _entropy(probabilities: Tensor, count: int, seed: int) -> Tensor:
    entropy = torch.special.entr(probabilities).sum(1)
    return entropy.argsort(descending=True, stable=True)[:count]


def _diverse(probabilities: Tensor, count: int, seed: int) -> Tensor:
    extras.require("The strategy diverse", "sklearn")
    from sklearn.cluster import MiniBatchKMeans

    margins = _margins(probabilities)
    kept = margins.argsort(stable=True)[: PREFILTER * count]
    points = probabilities[kept].numpy().astype(np.float32)
    weights = (1 - margins[kept]).clamp(min=1e-6).double().numpy()
    batch = max(1024, 2 * count)
    fitted = MiniBatchKMeans(
        count, batch_size=batch, n_init=1, max_iter=20, random_state=seed,
        reassignment_ratio=0.0,
    ).fit(points, sample_weight=weights)  # fmt: skip
    return kept[_nearest(probabilities[kept], torch.from_numpy(fitted.cluster_centers_).float())]


def _nearest(points: Tensor, centers: Tensor) -> Tensor:
    """A different point for each center: the nearest that an earlier center did not take."""
    taken = torch.zeros(len(points), dtype=torch.bool)
    chosen = torch.empty(len(centers), dtype=torch.int64)
    rows = max(BLOCK // len(points), 1)
    for first in range(0, len(centers), rows):
        distances = _distances(centers[first : first + rows], points)
        for i, row in enumerate(distances, first):
            row[taken] = float("inf")
            chosen[i] = row.argmin()
            taken[chosen[i]] = True
    return chosen


def _distances(some: Tensor, points: Tensor) -> Tensor:
    """Euclidean, by differences: by products, equal points are up to 1e-3 apart."""
    return torch.cdist(some, points, compute_mode="donot_use_mm_for_euclid_dist")


def _k_center(probabilities: Tensor, order: Tensor, centers: Tensor, count: int) -> Tensor:
    """Greedy farthest points of `order` from `centers` and from each other."""
    points = probabilities[order]
    distance = torch.full((len(points),), float("inf"))
    rows = max(BLOCK // len(points), 1)
    for some in probabilities[centers].split(rows) if len(centers) else ():
        distance = torch.minimum(distance, _distances(some, points).amin(0))
    chosen = []
    next_one = int(distance.argmax()) if len(centers) else 0  # the first of a shuffled order
    for _ in range(count):
        chosen.append(next_one)
        to_it = _distances(points[next_one : next_one + 1], points)[0]
        distance = torch.minimum(distance, to_it)
        distance[chosen[-1]] = -1.0
        next_one = int(distance.argmax())
    return order[torch.tensor(chosen)]


_BY_NAME: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "random": _random,
    "margin": _margin,
    "entropy": _entropy,
    "diverse": _diverse,
}
STRATEGIES = (*_BY_NAME, "k-center")
