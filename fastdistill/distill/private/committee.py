"""The k teachers of knowledge perturbation: raw answers, which must not leave this process."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class Committee(Protocol):
    """Teachers that share nothing computed from private records."""

    k: int

    def logits(self, queries: Tensor) -> Tensor:
        """[k, n, classes] of n queries. Not private: nothing may be chosen or tuned by it."""

    def fingerprint(self) -> str:
        """Hex digest of all their parameters: answers are kept under it."""


class Modules:
    """Any networks, one per part, in evaluation mode.

    Args:
        teachers: each maps queries [n, ...] to logits [n, classes].

    Raises:
        ValueError: none, or two that share what was trained: a record would change both, and
            their sum by more than the noise is scaled to. A part that is public may be shared,
            with requires_grad False.
    """

    def __init__(self, teachers: Sequence[nn.Module]) -> None:
        if not teachers:
            raise ValueError("teachers: expected at least one")
        owners: dict[int, int] = {}
        for i, teacher in enumerate(teachers):
            trained = [id(p) for p in teacher.parameters() if p.requires_grad]
            for one in {id(teacher), *trained}:
                if owners.setdefault(one, i) != i:
                    raise ValueError(
                        f"teachers[{i}]: expected nothing trained that teachers[{owners[one]}] "
                        "has, too: one record would change both"
                    )
        self.teachers = [teacher.eval() for teacher in teachers]
        self.k = len(self.teachers)

    def logits(self, queries: Tensor) -> Tensor:
        """As `Committee.logits`."""
        with torch.no_grad():
            return torch.stack([teacher.eval()(queries) for teacher in self.teachers])

    def fingerprint(self) -> str:
        """As `Committee.fingerprint`."""
        return digest(*(fingerprint(teacher).encode() for teacher in self.teachers))


class Linear:
    """k linear classifiers [k, features + 1, classes] of one public representation, in two GEMMs.

    Args:
        weights: the last row is the bias.
        scale: factor of the logits, public.
    """

    def __init__(self, weights: Tensor, scale: float = 1.0) -> None:
        self.weights = weights.detach()
        self.scale = scale
        self.k = len(weights)

    def logits(self, queries: Tensor) -> Tensor:
        """As `Committee.logits`, of features [n, features]."""
        k, rows, classes = self.weights.shape
        flat = self.weights[:, :-1].transpose(0, 1).reshape(rows - 1, k * classes)
        out = (queries @ flat).view(-1, k, classes).transpose(0, 1)
        return (out + self.weights[:, -1:]) * self.scale

    def fingerprint(self) -> str:
        """As `Committee.fingerprint`."""
        return digest(_raw(self.weights), str(self.scale).encode())


def fit_linear(
    features: Tensor, labels: Tensor, parts: Sequence[Tensor], classes: int, ridge: float
) -> Tensor:
    """Ridge regression on one-hot labels, part by part.

    Args:
        features: [N, d], a public representation: nothing in it may come from private records.
        labels: int64 [N].
        parts: rows of each part, as `shards.assign` gives them. An empty part's weights are 0.
        classes: number of classes.
        ridge: penalty > 0 on the squared weights, public.

    Returns:
        [k, d + 1, classes], the last row the bias. A part's weights depend on its own rows alone,
        to the last bit: parts that are padded to one size for a batched solver would not.

    Raises:
        ValueError: a row is in two parts, or in one twice: its record would change two teachers.
    """
    rows = torch.cat(list(parts))
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(features):
        raise ValueError(f"parts: expected rows in [0, {len(features) - 1}]")
    if len(rows.unique()) != len(rows):
        raise ValueError("parts: expected each row in one part at most, or one record is in two")
    width = features.shape[1] + 1
    weights = []
    for part in parts:
        x = torch.cat([features[part], torch.ones(len(part), 1)], 1)
        y = torch.nn.functional.one_hot(labels[part], classes).to(x.dtype)
        if len(part) < width:
            gram = x @ x.T + ridge * torch.eye(len(part))
            weights.append(x.T @ torch.linalg.solve(gram, y))
        else:
            gram = x.T @ x + ridge * torch.eye(width)
            weights.append(torch.linalg.solve(gram, x.T @ y))
    return torch.stack(weights)


def fingerprint(model: nn.Module) -> str:
    """Hex digest of all parameters and buffers."""
    state: Mapping[str, Tensor] = model.state_dict()
    return digest(*(name.encode() + _raw(value) for name, value in state.items()))


def digest(*parts: bytes) -> str:
    """Sha256 of parts, each with its length."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "big"))
        found.update(part)
    return found.hexdigest()


def raw_digest(x: Tensor) -> str:
    """Of a tensor's values, shape and dtype."""
    return digest(_raw(x))


def _raw(x: Tensor) -> bytes:
    plain = x.detach().cpu().contiguous()
    about = f"{plain.dtype} {list(plain.shape)}".encode()
    return about + plain.view(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else about
