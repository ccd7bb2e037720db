"""The committed figures of private distillation, and what docs/privacy.md says of them."""

import json
import re
from pathlib import Path

import pytest

from fastdistill.distill.private import accounting
from fastdistill.distill.private.results import histories

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "privacy.md").read_text()
FIGURES = json.loads((ROOT / "docs" / "private" / "results.json").read_text())


def test_every_test_that_the_page_names_exists():
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    code = "".join(path.read_text() for path in (ROOT / "tests").glob("test_private_*.py"))
    assert len(named) > 12
    assert {name for name in named if f"def {name}(" not in code} == set()


def test_every_committed_epsilon_follows_from_its_mechanisms():
    """By another accountant than the run's where there is one: Renyi bounds them all from above."""
    for run in FIGURES["runs"]:
        if run["recipe"] in ("non_private", "as_released"):
            assert run["epsilon"] is None
            continue
        assert run["disjoint"] is (run["recipe"] == "R2")
        parts = histories(run)
        renyi = max((accounting.epsilon(part, run["delta"], "rdp") for part in parts), default=0.0)
        assert run["epsilon"] <= renyi <= 1.15 * run["epsilon"] + 1e-9
        if run["recipe"].startswith("R3"):
            exact = accounting.gaussian_epsilon(accounting.mu(sum(parts, [])), run["delta"])
            assert run["epsilon"] == pytest.approx(exact, rel=1e-6)
        if run["target_epsilon"] is not None:
            assert 0.99 * run["target_epsilon"] < run["epsilon"] <= run["target_epsilon"]


def test_the_committed_figures_reach_those_of_the_trial():
    found = {run["name"]: run["accuracy_mean"] for run in FIGURES["runs"]}
    for name, wanted in (
        ("R3-k250-n1000-random", (0.744, 0.771, 0.778)),
        ("R1", (0.836, 0.834, 0.833)),
    ):
        for target, least in zip((2, 4, 8), wanted, strict=True):
            assert found[f"{name}-eps{target}"] >= least
    assert found["labels"] >= 0.685 and found["non_private"] >= 0.856
    assert found["as_released"] == found["non_private"]  # to the last image


def test_the_page_quotes_the_committed_figures():
    found = {run["name"]: run for run in FIGURES["runs"]}
    for name, label in (
        ("R1", "R1, DP teacher"),
        ("R2", "R2, DP student"),
        ("R3-k250-n1000-random", "R3, 250 teachers, 1000 queries, random"),
        ("R3-k250-n1000-margin", "the same, margin"),
        ("R3-k250-n1000-diverse", "the same, diverse"),
        ("R3-k250-n1000-k-center", "the same, k-center"),
        ("R3-k250-n1000-entropy", "the same, entropy"),
        ("R3_gradient-k250-n1000-random", "R3, noisy gradients"),
    ):
        (line,) = re.findall(rf"^\| {re.escape(label)}.*$", TEXT, re.MULTILINE)
        cells = [cell.strip() for cell in line.split("|")[2:5]]
        for cell, target in zip(cells, (2, 4, 8), strict=True):
            run = found[f"{name}-eps{target}"]
            mean, std = 100 * run["accuracy_mean"], 100 * run["accuracy_std"]
            assert cell == f"{mean:.1f} % ± {std:.1f}", (label, target)
