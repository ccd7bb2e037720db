"""Private training: the plain loop, and the three lines that make it private.

    python examples/private_training.py

A network learns which of three sources a point comes from, without any single point of its data
showing in the weights: DP-SGD with (epsilon, 1e-5), epsilon printed. Seconds on a CPU.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastdistill.privacy import PrivacyEngine

DELTA = 1e-5


def points(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(positions [count, 2], source of each [count]): three clouds that overlap a little."""
    source = torch.randint(3, (count,), generator=generator)
    centres = torch.tensor([[0.0, 1.5], [1.3, -0.75], [-1.3, -0.75]])
    return centres[source] + 0.6 * torch.randn(count, 2, generator=generator), source


def main(epochs: int = 4) -> tuple[float, float]:
    """Train; prints and returns the loss on points held out, before and after."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(*points(4000, generator))
    x, y = points(1000, generator)

    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    criterion = nn.CrossEntropyLoss()
    loader = DataLoader(data, batch_size=200)

    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, criterion, loader = engine.make_private_with_epsilon(
        module=model, optimizer=optimizer, criterion=criterion, data_loader=loader,
        target_epsilon=2.0, target_delta=DELTA, epochs=epochs, max_grad_norm=0.5,
        grad_sample_mode="ghost_fused",
    )  # fmt: skip

    def held_out() -> float:
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model(x), y))

    before = held_out()
    for _ in range(epochs):
        for inputs, labels in loader:  # Poisson batches: their size varies
            optimizer.zero_grad()
            criterion(model(inputs), labels).backward()
            optimizer.step()
    after = held_out()
    spent = engine.get_epsilon(DELTA)
    with torch.no_grad():
        right = float((model(x).argmax(-1) == y).float().mean())
    print(f"loss {before:.3f} -> {after:.3f}; {right:.0%} right; epsilon {spent:.2f} at delta "
          f"{DELTA:g}, {engine.adjacency} neighbours")  # fmt: skip
    return before, after


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
