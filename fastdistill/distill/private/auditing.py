"""A lower bound on epsilon from one run with many canaries, each in the data by a coin of its own.

Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023: Algorithm
1, and the p-value of their appendix D.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdistill import _validate

CONFIDENCE = 0.95


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """How likely so many correct guesses are, at most, if the run is (epsilon, delta)-DP.

    P[K >= v] + 2 m delta max_i P[v > K >= v - i] / i for K ~ Binomial(r, 1 / (1 + e^-epsilon)), of
    m canaries, r guesses and v correct ones.

    Raises:
        ValueError: not 0 <= correct <= guesses <= canaries, or an epsilon below 0.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(
            "correct, guesses, canaries: expected 0 <= correct <= guesses <= canaries, got "
            f"{correct}, {guesses}, {canaries}"
        )
    if epsilon < 0:
        raise ValueError(f"epsilon: expected a number >= 0, got {epsilon}")
    k = torch.arange(guesses + 1, dtype=torch.float64)
    n = torch.tensor(float(guesses), dtype=torch.float64)
    log_odds = -math.log1p(math.exp(-epsilon)), -epsilon - math.log1p(math.exp(-epsilon))
    ways = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    chance = (ways + k * log_odds[0] + (n - k) * log_odds[1]).exp()
    at_least = float(chance[correct:].sum())
    below = chance[:correct].flip(0).cumsum(0) / torch.arange(1, correct + 1)
    return min(1.0, at_least + 2 * canaries * delta * (float(below.max()) if correct else 0.0))


def lower_bound(
    canaries: int, guesses: int, correct: int, delta: float, confidence: float = CONFIDENCE
) -> float:
    """The largest epsilon that the guesses refute at this confidence; 0 if none.

    The number of guesses has to be chosen before the scores are seen.
    """
    allowed = 1 - _validate.positive("confidence", confidence)
    if not 0 < allowed < 1:
        raise ValueError(f"confidence: expected a number in (0, 1), got {confidence}")
    low, high = 0.0, 64.0  # beyond what any number of guesses can show
    if p_value(canaries, guesses, correct, low, delta) > allowed:
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        refuted = p_value(canaries, guesses, correct, middle, delta) <= allowed
        low, high = (middle, high) if refuted else (low, middle)
    return low


def correct_guesses(scores: Tensor, included: Tensor, guesses: int) -> int:
    """Algorithm 1's guesses: the highest half of `guesses` scores were in, the lowest half not.

    Args:
        scores: [canaries], higher for those that the run seems to have seen.
        included: bool [canaries], what the coins said.
        guesses: an even number, at most that of the canaries; the others are abstained from.
    """
    if scores.ndim != 1 or scores.shape != included.shape:
        raise ValueError(
            f"scores, included: expected [canaries] both, got {list(scores.shape)}, "
            f"{list(included.shape)}"
        )
    if guesses % 2 or not 0 < guesses <= len(scores):
        raise ValueError(f"guesses: expected an even number up to {len(scores)}, got {guesses}")
    order = scores.argsort(stable=True)
    half = guesses // 2
    return int(included[order[-half:]].sum() + (~included[order[:half]]).sum())
