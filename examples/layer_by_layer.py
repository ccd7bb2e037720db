"""Layer by layer: a narrow student of two blocks learns from a wide teacher of four.

    python examples/layer_by_layer.py

`Distiller` runs both networks, reads the named layers by hooks and returns the losses by name; a
regressor maps the student's 16 features to the teacher's 96. Two spirals of points, cut into four
classes. Seconds on a CPU; nothing is downloaded.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdistill.distill import Distiller, Hint
from fastdistill.nn import KDLoss

CLASSES = 4


def points(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(positions [count, 2], classes [count]): two arms, each with an inner and an outer half."""
    along = torch.rand(count, generator=generator)
    arm = torch.randint(2, (count,), generator=generator)
    angle = 3 * math.pi * along + math.pi * arm
    radius = 0.3 + along + 0.05 * torch.randn(count, generator=generator)
    x = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return x, 2 * arm + (along > 0.5).long()


class Block(nn.Module):
    """x -> x + a small network of x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def network(width: int, depth: int) -> nn.Sequential:
    """Points [N, 2] to logits [N, CLASSES]; its blocks are the layers 1 to `depth`."""
    blocks = [Block(width) for _ in range(depth)]
    return nn.Sequential(nn.Linear(2, width), *blocks, nn.Linear(width, CLASSES))


def train_teacher(x: Tensor, y: Tensor, steps: int) -> nn.Module:
    teacher = network(96, 4)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=0.003)
    for _ in range(steps):
        rows = torch.randint(len(x), (256,))
        optimizer.zero_grad()
        F.cross_entropy(teacher(x[rows]), y[rows]).backward()
        optimizer.step()
    return teacher


def main(steps: int = 300) -> tuple[float, float]:
    """Distil; prints and returns the sum of the losses before and after."""
    torch.manual_seed(0)
    x, y = points(2048, torch.Generator().manual_seed(1))
    distiller = Distiller(
        network(16, 2),
        train_teacher(x, y, steps),
        logits=KDLoss(temperature=2.0),
        hints=[
            Hint("1", "2", widths=(16, 96)),  # layers by name, as named_modules() gives them
            Hint("2", "4", widths=(16, 96)),
        ],
    )
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=0.01)  # student and regressors

    def total() -> float:
        with torch.no_grad():
            return float(distiller(x).losses.total)

    before = total()
    for _ in range(steps):
        _, losses = distiller(x[torch.randint(len(x), (256,))])
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    after = total()
    with torch.no_grad():
        output, losses = distiller(x)
        parts = ", ".join(f"{name} {float(value):.3f}" for name, value in losses.items())
        same = output.argmax(-1) == distiller.teacher(x).argmax(-1)
    print(f"losses {before:.3f} -> {after:.3f} ({parts}); the student names the teacher's class on "
          f"{float(same.float().mean()):.0%} of the points")  # fmt: skip
    return before, after


if __name__ == "__main__":
    main()
