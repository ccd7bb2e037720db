"""A plain training loop: a wide teacher, a student of a fifth of its parameters, and `kd_loss`.

    python examples/plain_loop.py

Two rings of points, cut into ten sectors: the class of a point is its ring and sector. Seconds on
a CPU; nothing is downloaded.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdistill import kd_loss

SECTORS = 5
CLASSES = 2 * SECTORS
TEMPERATURE = 4.0


def points(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(positions [count, 2], classes [count]); one in ten of the classes is drawn at random."""
    angle = 2 * math.pi * torch.rand(count, generator=generator)
    ring = torch.randint(2, (count,), generator=generator)
    radius = 1.0 + ring + 0.25 * torch.randn(count, generator=generator)
    sector = (angle * SECTORS / (2 * math.pi)).long().clamp(max=SECTORS - 1)
    noise = torch.rand(count, generator=generator) < 0.1
    wrong = torch.randint(CLASSES, (count,), generator=generator)
    x = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return x, torch.where(noise, wrong, ring * SECTORS + sector)


def network(width: int) -> nn.Module:
    """Points [N, 2] to logits [N, CLASSES]."""
    return nn.Sequential(
        nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, CLASSES),
    )  # fmt: skip


def train_teacher(x: Tensor, y: Tensor, steps: int) -> nn.Module:
    """A network trained with the labels alone, in evaluation mode."""
    teacher = network(128)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=0.01)
    for _ in range(steps):
        rows = torch.randint(len(x), (256,))
        optimizer.zero_grad()
        F.cross_entropy(teacher(x[rows]), y[rows]).backward()
        optimizer.step()
    return teacher.eval().requires_grad_(False)


def main(steps: int = 300) -> tuple[float, float]:
    """Distil; prints and returns the student's loss before and after."""
    torch.manual_seed(0)
    x, y = points(4096, torch.Generator().manual_seed(1))
    teacher = train_teacher(x, y, steps)
    student = network(16)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)

    teacher_logits = teacher(x)  # once: the data does not change from epoch to epoch

    def loss_of(rows: Tensor) -> Tensor:
        return kd_loss(
            student(x[rows]),
            teacher_logits[rows],
            y[rows],
            temperature=TEMPERATURE,
            hard_weight=0.3,
            soft_weight=0.7,
        )

    everything = torch.arange(len(x))
    before = float(loss_of(everything).detach())
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(torch.randint(len(x), (256,))).backward()
        optimizer.step()
    after = float(loss_of(everything).detach())
    same = student(x).argmax(-1) == teacher_logits.argmax(-1)
    print(f"loss {before:.3f} -> {after:.3f}; the student names the teacher's class on "
          f"{float(same.float().mean()):.0%} of the points")  # fmt: skip
    return before, after


if __name__ == "__main__":
    main()
