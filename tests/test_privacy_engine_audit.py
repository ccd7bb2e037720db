"""A whole training run, audited: Steinke et al. 2023, with canaries in the data by coins.

The bound itself is tested in every run; the audits, of a training each, with -m audit.
"""

import math
import warnings

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastdistill as fd
from fastdistill.distill.private.auditing import correct_guesses, lower_bound, p_value

CANARIES, GUESSES, RECORDS, FEATURES, CLASSES = 1000, 500, 500, 20, 5
RATE, STEPS, SIGMA, DELTA = 0.5, 64, 6.0, 1e-5


@pytest.mark.parametrize("guesses, most", [(1000, 5.8), (3000, 6.9), (10_000, 8.1)])
def test_audit_most_that_guesses_can_show(guesses, most):
    got = lower_bound(guesses, guesses, guesses, 0.0)
    assert math.isclose(got, most, abs_tol=0.05)
    assert math.isclose(p_value(guesses, guesses, guesses, got, 0.0), 0.05, rel_tol=1e-6)


def test_audit_p_value_by_hand():
    """Of three guesses with two correct, at epsilon = log 3: K ~ Binomial(3, 3/4)."""
    chance = [1 / 64, 9 / 64, 27 / 64, 27 / 64]
    pure = chance[2] + chance[3]
    assert math.isclose(p_value(8, 3, 2, math.log(3), 0.0), pure)
    worst = max(chance[1], (chance[1] + chance[0]) / 2)
    assert math.isclose(p_value(8, 3, 2, math.log(3), 0.001), pure + 2 * 8 * 0.001 * worst)
    assert p_value(8, 3, 0, 0.0, 0.1) == 1.0
    assert lower_bound(1000, 100, 55, 1e-5) == 0.0
    bounds = [lower_bound(1000, 500, v, 1e-5) for v in (300, 400, 450, 500)]
    assert bounds == sorted(bounds) and bounds[0] > 0
    assert lower_bound(1000, 500, 450, 1e-4) < bounds[2]
    assert lower_bound(1000, 500, 450, 1e-5, confidence=0.999) < bounds[2]


def test_audit_guesses():
    scores = torch.tensor([0.1, 5.0, -3.0, 2.0, 0.0])
    included = torch.tensor([True, True, False, False, True])
    assert correct_guesses(scores, included, 2) == 2
    assert correct_guesses(scores, included, 4) == 2
    for bad in (3, 6, 0):
        with pytest.raises(ValueError, match="guesses: expected an even number up to 5"):
            correct_guesses(scores, included, bad)
    with pytest.raises(ValueError, match="scores, included: expected"):
        correct_guesses(scores, included[:3], 2)
    with pytest.raises(ValueError, match="correct, guesses, canaries: expected"):
        p_value(3, 4, 2, 1.0, 0.0)
    with pytest.raises(ValueError, match="confidence: expected"):
        lower_bound(4, 4, 4, 0.0, confidence=1.5)


def audited(*, weaken: float = 1.0, autocast: bool = False, virtual: bool = False, **settings):
    """(claimed epsilon, its lower bound) of a run in which the noise is `weaken` times too small.

    A canary is a record with a feature and a label of its own, which the trained model's loss on it
    shows.
    """
    included = torch.rand(CANARIES) < 0.5
    canaries = torch.zeros(CANARIES, CANARIES + FEATURES)
    canaries[:, :CANARIES] = 30 * torch.eye(CANARIES)
    labels = torch.randint(CLASSES, (CANARIES,))
    others = torch.cat([torch.zeros(RECORDS, CANARIES), torch.randn(RECORDS, FEATURES)], 1)
    x = torch.cat([canaries[included], others])
    y = torch.cat([labels[included], torch.randint(CLASSES, (RECORDS,))])
    model = nn.Linear(CANARIES + FEATURES, CLASSES)
    with torch.no_grad():
        model.weight.zero_()
    engine = fd.privacy.PrivacyEngine(accountant="prv")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        private, optimizer, criterion, loader = engine.make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.25),
            data_loader=DataLoader(TensorDataset(x, y), batch_size=8),
            noise_multiplier=SIGMA, max_grad_norm=1.0, grad_sample_mode="ghost_fused",
            sample_rate=RATE, steps=STEPS, expected_batch_size=500, **settings,
        )  # fmt: skip
    hook = optimizer.step_hook

    def as_claimed(optimizer):
        optimizer.noise_multiplier = SIGMA
        hook(optimizer)
        optimizer.noise_multiplier = SIGMA / weaken

    optimizer.noise_multiplier = SIGMA / weaken
    optimizer.attach_step_hook(as_claimed)

    def train(batches):
        for inputs, targets in batches:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = criterion(private(inputs), targets)
            loss.backward()
            optimizer.step()

    if virtual:
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=100, optimizer=optimizer
        ) as batches:
            train(batches)
    else:
        train(loader)
    assert engine.accountant.history == [(SIGMA, RATE, STEPS)]
    with torch.no_grad():
        scores = -nn.functional.cross_entropy(model(canaries), labels, reduction="none")
    correct = correct_guesses(scores, included, GUESSES)
    return engine.get_epsilon(DELTA), lower_bound(CANARIES, GUESSES, correct, DELTA)


@pytest.mark.audit
@pytest.mark.parametrize(
    "settings", [{}, dict(clipping="per_layer"), dict(autocast=True), dict(virtual=True)], ids=str
)
def test_audit_is_consistent_with_the_claim(settings):
    claimed, shown = audited(**settings)
    print(f"epsilon: claimed {claimed:.2f}, shown {shown:.2f}")
    assert 0 < shown <= claimed


@pytest.mark.audit
def test_audit_has_power():
    """With a tenth of the noise the claim is refuted."""
    claimed, shown = audited(weaken=10)
    print(f"epsilon: claimed {claimed:.2f}, shown {shown:.2f}")
    assert shown > claimed
