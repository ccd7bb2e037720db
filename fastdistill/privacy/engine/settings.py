"""Noise multiplier, clip norm and batch size of a private run: one object, read by all.

Opacus keeps the clip norm in the module and in the optimizer; a scheduler then changes one of them,
and a sample contributes ten times what the noise assumes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastdistill import _validate
from fastdistill.privacy import mechanism, release
from fastdistill.privacy.engine import gradients

_LOST = 0.01
"""What the rounding of float32 sums may cost of the clip norm before sums are taken in chunks."""


SMALLEST = 2.0**-32
"""The smallest clip norm: what float32's smallest numbers are rounded by (`gradients.FAR`) is then
inside the bound for sums."""


def most_samples(expected: float) -> int:
    """A size that a logical batch of `expected` samples exceeds with probability below 1e-15.

    By Bernstein's inequality, exp(-x^2 / (2 (m + x / 3))) for m + x with x = 9 sqrt(m) + 30.
    """
    return math.ceil(expected + 9 * math.sqrt(expected) + 30)


class Settings:
    """What a step is made with; `plan` turns it into the numbers of the release."""

    def __init__(
        self,
        noise_multiplier: float,
        max_grad_norm: float | Sequence[float],
        expected_batch_size: float,
        loss_reduction: str,
        per_layer: bool,
    ) -> None:
        self.per_layer = per_layer
        self.shares: list[float] | None = None  # of the joint norm, one for each parameter
        self.noise_multiplier = noise_multiplier
        if isinstance(max_grad_norm, Sequence):
            if not per_layer:
                raise ValueError(
                    'max_grad_norm: expected a number with clipping="flat", got a list; a list is '
                    'for clipping="per_layer"'
                )
            norms = [release.clip_norm(c) for c in max_grad_norm]
            joint = math.sqrt(math.fsum(c * c for c in norms))
            self.shares = [c / joint for c in norms]
            max_grad_norm = joint
        self.max_grad_norm = max_grad_norm
        self.loss_reduction = _validate.choice("loss_reduction", loss_reduction, ("mean", "sum"))
        self.expected_batch_size = _validate.positive("expected_batch_size", expected_batch_size)
        self.most = most_samples(self.expected_batch_size)
        self.chunk = max(int(_LOST / (2.0**-24 * self.most)), 16)

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the noise over the clip norm."""
        return self._noise_multiplier

    @noise_multiplier.setter
    def noise_multiplier(self, value: float) -> None:
        self._noise_multiplier = release.noise("noise_multiplier", value)

    @property
    def max_grad_norm(self) -> float:
        """The norm of a sample's whole clipped gradient, over all parameters."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        norm = release.clip_norm(value)
        if norm < SMALLEST:
            raise ValueError(f"max_grad_norm: expected a number >= 2^-32, got {norm}")
        self._max_grad_norm = norm

    def norms(self, parameters: int) -> list[float]:
        """With clipping per layer: what each parameter is clipped to, as shares of 1."""
        if self.shares is None:
            return [1 / math.sqrt(parameters)] * parameters
        if len(self.shares) != parameters:
            raise ValueError(
                f"max_grad_norm: expected {parameters} numbers, one for each trainable parameter "
                f"of the optimizer, got {len(self.shares)}"
            )
        return self.shares

    def plan(self, coordinates: int, single: bool) -> mechanism.Mechanism:
        """The numbers of a step's release of so many coordinates, some of them float32."""
        lost = gradients.rounding(self.most, self.chunk) if single else 0.0
        if lost > 0.5:
            raise ValueError(
                f"expected_batch_size: expected a size whose float32 sums are exact enough, got "
                f"{self.expected_batch_size:g}; use float64 parameters"
            )
        return mechanism.plan(
            self.max_grad_norm,
            self.noise_multiplier,
            self.expected_batch_size if self.loss_reduction == "mean" else 1.0,
            coordinates,
            single,
            lost,
        )
