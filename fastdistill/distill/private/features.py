"""A representation learnt from public unlabelled images: the warm start of teachers and students.

One convolution whose filters are the spherical k-means centres of whitened patches, local contrast
normalisation, a threshold and average pooling (Coates and Ng 2012, "Learning Feature
Representations with K-Means"). No label and no private record takes part, so that every private
part of a network is the linear classifier on top: few parameters for the noise to fall on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONTRAST = 0.05  # of pixels in 0..1: what is flatter than this is not blown up
THRESHOLD = 0.5
WHITENING = 0.05
PATCHES, IMAGES, ITERATIONS = 50_000, 1000, 10
BATCH = 500


class PatchFeatures(nn.Module):
    """Images [N, C, H, W] in 0..1 to standardised features [N, filters pool^2].

    Features are grouped by filter: the first m pool^2 of them are those of a network with the first
    m filters alone.

    Args:
        filters: [filters, C, size, size].
        pool: cells a side.
        mean: of each feature over the public images.
        std: the same.
    """

    filters: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, filters: Tensor, pool: int, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.pool = pool
        self.register_buffer("filters", filters)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, images: Tensor) -> Tensor:
        """Features, without gradient for the filters."""
        return (_pooled(images, self.filters, self.pool) - self.mean) / self.std

    def first(self, filters: int) -> PatchFeatures:
        """The network of the first filters alone."""
        cells = filters * self.pool**2
        return PatchFeatures(self.filters[:filters], self.pool, self.mean[:cells], self.std[:cells])

    @property
    def parameters_learnt(self) -> int:
        """Values of the filters."""
        return self.filters.numel()


def learn(
    public_images: Tensor, filters: int, seed: int, size: int = 6, pool: int = 3
) -> PatchFeatures:
    """Learn the filters from public images [N, C, H, W] in 0..1; labels are not needed."""
    generator = torch.Generator().manual_seed(seed)
    channels = public_images.shape[1]
    size = min(size, *public_images.shape[2:])
    patches = F.unfold(public_images[:IMAGES], size).transpose(1, 2).reshape(-1, channels * size**2)
    patches = patches[torch.randperm(len(patches), generator=generator)[:PATCHES]]
    patches = patches - patches.mean(1, keepdim=True)
    patches = patches / (patches.square().mean(1, keepdim=True) + CONTRAST**2).sqrt()
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    whiten = vectors @ torch.diag((values.clamp(min=0) + WHITENING).rsqrt()) @ vectors.T
    patches = patches @ whiten
    start = torch.randperm(len(patches), generator=generator)[:filters]
    centres = F.normalize(patches[start], eps=1e-6)
    for _ in range(ITERATIONS):
        value, nearest = (patches @ centres.T).max(1)
        centres = torch.zeros_like(centres).index_add_(0, nearest, patches * value[:, None])
        centres = F.normalize(centres, eps=1e-6)
    found = (centres @ whiten).view(-1, channels, size, size)
    found = found - found.mean((1, 2, 3), keepdim=True)  # the patch's mean drops out
    raw = torch.cat([_pooled(part, found, pool) for part in public_images.split(BATCH)])
    return PatchFeatures(found, pool, raw.mean(0), raw.std(0) + 1e-3)


def apply(features: PatchFeatures, images: Tensor) -> Tensor:
    """Features of all images, in batches."""
    return torch.cat([features(part) for part in images.split(BATCH)])


def _pooled(images: Tensor, filters: Tensor, pool: int) -> Tensor:
    size = filters.shape[-1]
    mean = F.avg_pool2d(images, size, 1).mean(1, keepdim=True)
    square = F.avg_pool2d(images.square(), size, 1).mean(1, keepdim=True)
    contrast = ((square - mean.square()).clamp(min=0) + CONTRAST**2).sqrt()
    found = F.relu(F.conv2d(images, filters) / contrast - THRESHOLD)
    return F.adaptive_avg_pool2d(found, pool).flatten(1)


class Head(nn.Module):
    """A linear classifier of the first `width` features.

    Args:
        width: how many of them it sees.
        classes: number of logits.
        seed: of its start.
    """

    def __init__(self, width: int, classes: int, seed: int) -> None:
        super().__init__()
        self.width = width
        generator = torch.Generator().manual_seed(seed)
        weight = 0.01 * torch.randn(classes, width, generator=generator)
        self.linear = nn.Linear(width, classes)
        with torch.no_grad():
            self.linear.weight.copy_(weight)
            self.linear.bias.zero_()

    def forward(self, features: Tensor) -> Tensor:
        """Logits [N, classes]."""
        logits: Tensor = self.linear(features[:, : self.width])
        return logits
