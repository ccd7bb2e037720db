"""A causal language model: shifted labels, padding, gradient accumulation over micro-batches.

    python examples/causal_lm.py

The text is drawn from a table in which two tokens decide the next one. Seconds on a CPU; nothing
is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdistill import kd_loss

VOCABULARY = 16
LENGTH = 24
IGNORED = -100
"""The label of padding: `ignore_index` of `kd_loss` and of torch's cross_entropy."""


def sentences(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(tokens, labels), both int64 [count, LENGTH]: of unequal lengths, padded at the end."""
    table = 2 * torch.randn(
        VOCABULARY, VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(7)
    )
    tokens = torch.randint(VOCABULARY, (count, LENGTH), generator=generator)
    for i in range(2, LENGTH):
        chances = table[tokens[:, i - 2], tokens[:, i - 1]].softmax(-1)
        tokens[:, i] = torch.multinomial(chances, 1, generator=generator)[:, 0]
    lengths = torch.randint(4, LENGTH + 1, (count, 1), generator=generator)
    padding = torch.arange(LENGTH) >= lengths
    return tokens.masked_fill(padding, 0), tokens.masked_fill(padding, IGNORED)


class LanguageModel(nn.Module):
    """Tokens [batch, length] to the logits of the token after each, [batch, length, V]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.recurrence = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.recurrence(self.embedding(tokens))[0])


def predicted_tokens(labels: Tensor) -> float:
    """How many positions have a token to predict: what the loss of a step is divided by."""
    return float((labels[:, 1:] != IGNORED).sum())


def distillation_loss(
    student: nn.Module, teacher: nn.Module, tokens: Tensor, labels: Tensor, normalizer: float
) -> Tensor:
    """The sum over the positions of this micro-batch, over `normalizer`."""
    student_logits = student(tokens)
    with torch.no_grad():
        teacher_logits = teacher(tokens)
    # Position i predicts token i + 1. These are views: the kernels read strided rows.
    return kd_loss(
        student_logits[:, :-1],
        teacher_logits[:, :-1],
        labels[:, 1:],
        temperature=2.0,
        hard_weight=0.5,
        soft_weight=0.5,
        ignore_index=IGNORED,
        normalizer=normalizer,
    )


def backward(
    student: nn.Module, teacher: nn.Module, tokens: Tensor, labels: Tensor, micro_batches: int
) -> float:
    """Accumulate the gradient of one step in `micro_batches` parts; returns the step's loss.

    Each part divides by the tokens of the whole step, so the parts add up to the gradient of one
    batch, however unevenly the padding lies.
    """
    normalizer = predicted_tokens(labels)
    total = 0.0
    for part in zip(tokens.chunk(micro_batches), labels.chunk(micro_batches), strict=True):
        loss = distillation_loss(student, teacher, *part, normalizer)
        loss.backward()
        total += float(loss.detach())
    return total


def train(model: nn.Module, steps: int, accumulate: Callable[[Tensor, Tensor], object]) -> None:
    """`accumulate(tokens, labels)` leaves the gradient of each step in the parameters."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        accumulate(*sentences(64, generator))
        optimizer.step()


def main(steps: int = 150) -> tuple[float, float]:
    """Distil; prints and returns the student's loss on unseen text before and after."""
    torch.manual_seed(0)
    teacher, student = LanguageModel(64), LanguageModel(16)

    def cross_entropy(tokens: Tensor, labels: Tensor) -> None:
        logits = teacher(tokens)[:, :-1].flatten(0, 1)
        F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED).backward()

    train(teacher, steps, cross_entropy)
    teacher.eval().requires_grad_(False)

    unseen = sentences(256, torch.Generator().manual_seed(2))

    def held_out() -> float:
        with torch.no_grad():
            return float(distillation_loss(student, teacher, *unseen, predicted_tokens(unseen[1])))

    before = held_out()
    train(student, steps, lambda tokens, labels: backward(student, teacher, tokens, labels, 4))
    after = held_out()
    print(f"loss on unseen text {before:.3f} -> {after:.3f}")
    return before, after


if __name__ == "__main__":
    main()
