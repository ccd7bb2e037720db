"""The teacher and the student: one family of small convolutional networks, two sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.distill.factories import Factory


@dataclass(frozen=True)
class Architecture:
    """All that is needed to build the network again.

    Attributes:
        channels: of the images.
        height: of the images, pixels.
        width: of the images, pixels.
        classes: number of logits.
        stages: output channels of each stage (3x3 convolution, 2x2 max pool, batch norm, ReLU).
        hidden: units of the fully connected layer after the stages; 0: average over the pixels
            and go straight to the logits.
    """

    channels: int
    height: int
    width: int
    classes: int
    stages: tuple[int, ...]
    hidden: int

    def to_json(self) -> dict[str, Any]:
        """As JSON values, for the checkpoint."""
        return {**asdict(self), "stages": list(self.stages)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Architecture:
        """The inverse of `to_json`. KeyError or TypeError if `values` is something else."""
        return cls(**{**values, "stages": tuple(values["stages"])})


def teacher(channels: int, height: int, width: int, classes: int) -> Architecture:
    """241,770 parameters for 28 x 28 grey images and 10 classes."""
    return Architecture(channels, height, width, classes, (32, 64, 128), 128)


def student(channels: int, height: int, width: int, classes: int) -> Architecture:
    """6,274 parameters for grey images and 10 classes: 39 times fewer than the teacher."""
    return Architecture(channels, height, width, classes, (8, 16, 32), 0)


class ConvNet(nn.Module):
    """Images [N, channels, height, width] float32 -> logits [N, classes]."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        layers: list[nn.Module] = []
        channels, sides = architecture.channels, (architecture.height, architecture.width)
        for out in architecture.stages:
            # No bias: batch normalisation would subtract it again. The pool comes before it, so
            # that it and ReLU see a quarter of the pixels: 0.3 s, not 0.4 s, for a student's epoch.
            layers.append(nn.Conv2d(channels, out, 3, padding=1, bias=False))
            sides = _shrink(layers, nn.MaxPool2d, sides)
            layers += [nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        if architecture.hidden:
            while max(sides) > 7:  # large images: keep the fully connected layer small
                sides = _shrink(layers, nn.AvgPool2d, sides)
            flat = channels * sides[0] * sides[1]
            layers += [nn.Flatten(), nn.Linear(flat, architecture.hidden), nn.ReLU()]
            channels = architecture.hidden
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(channels, architecture.classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes]."""
        features: Tensor = self.body(images)
        if features.ndim == 4:
            features = features.mean((2, 3))
        logits: Tensor = self.head(features)
        return logits


def _shrink(
    layers: list[nn.Module], pool: type[nn.MaxPool2d] | type[nn.AvgPool2d], sides: tuple[int, int]
) -> tuple[int, int]:
    """Append a pool that halves each side of at least 4 pixels; return the sides after it."""
    kernel = (2 if sides[0] >= 4 else 1, 2 if sides[1] >= 4 else 1)
    layers.append(pool(kernel))
    return sides[0] // kernel[0], sides[1] // kernel[1]


HINT_LAYER = "body.7"
"""Of both networks: the ReLU that ends the second of three stages. FitNets takes the middle layer
of each network for its hint."""


def from_json(values: Mapping[str, Any]) -> Architecture | Factory:
    """The inverse of both `to_json`. KeyError or TypeError if `values` is something else."""
    return (Factory if "where" in values else Architecture).from_json(values)


def build(architecture: Architecture | Factory, seed: int) -> nn.Module:
    """A network on the CPU, initialised from `seed`; the caller's random state is left as it was.

    On the CPU whatever the device of the job, so that a seed means the same start everywhere.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return architecture() if isinstance(architecture, Factory) else ConvNet(architecture)


def parameters(model: nn.Module) -> int:
    """Number of trained numbers (the running statistics of batch normalisation are not)."""
    return sum(p.numel() for p in model.parameters())
