"""The figures of a run: results.json and runs.csv."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from fastdistill.distill.private.config import RECIPE, TRIED
from fastdistill.distill.private.experiment import SALT, UNIT, Row
from fastdistill.distill.private.mechanism import Mechanism
from fastdistill.distill.results import csv_text

if TYPE_CHECKING:
    from fastdistill.distill.private.job import Outcome, Run


def figures(outcome: Outcome) -> dict[str, Any]:
    """The content of results.json.

    runs: one entry per configuration. epsilon: the largest over its seeds of what may be claimed
    for one student, at delta under adjacency; null: none. mechanisms: all that was debited for
    that student, of the sum, before division: from them anyone can compute epsilon again.
    disjoint: no record is in two of the data sets that they name, so that epsilon is the largest
    of those of each dataset_id; else all of them compose.
    accuracy_std: over the seeds, ddof = 1; null for one seed.
    """
    from dataclasses import asdict

    config, sizes = outcome.config, outcome.sizes
    teacher, student = outcome.parameters
    return {
        "runs": [
            _row(row, [run for run in outcome.runs if run.row == row], config.delta)
            for row in dict.fromkeys(run.row for run in outcome.runs)
        ],
        "unit": UNIT,
        "compression": {
            "teacher_parameters": teacher,
            "student_parameters": student,
            "compression": teacher / student,
            **outcome.inference,
        },
        "cifar": outcome.cifar,
        "data": {
            **outcome.data.source.describe(),
            "classes": outcome.data.source.classes,
            "private_images": sizes.private,
            "public_images": sizes.public,
            "public_labels": config.labelled,
            "test_images": len(outcome.data.test),
        },
        "public_constants": {**asdict(RECIPE), "salt": SALT},
        "tried": TRIED,
        "settings": config.settings(),
        "environment": outcome.environment,
    }


def _row(row: Row, runs: list[Run], delta: float) -> dict[str, Any]:
    accuracies = [run.accuracy for run in runs]
    worst = max(runs, key=lambda run: run.epsilon or 0.0)
    return {
        "name": row.name,
        "recipe": row.recipe,
        "k": row.k,
        "queries": row.queries,
        "strategy": row.strategy,
        "target_epsilon": row.target,
        "epsilon": worst.epsilon,
        "delta": None if worst.epsilon is None else delta,
        "adjacency": None if worst.epsilon is None else worst.ledger.adjacency,
        "accountant": None if worst.epsilon is None else worst.ledger.accountants(),
        "disjoint": None if worst.epsilon is None else worst.ledger.disjoint,
        "accuracy_mean": statistics.fmean(accuracies),
        "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "accuracies": accuracies,
        "seeds": [run.seed for run in runs],
        "mechanisms": [m.to_json() for m in worst.ledger.history],
    }


def histories(entry: dict[str, Any]) -> list[list[Mechanism]]:
    """The mechanisms of an entry of `runs` that compose; epsilon is the largest of the lists'."""
    groups: dict[str | None, list[Mechanism]] = {}
    for values in entry["mechanisms"]:
        key = values["dataset_id"] if entry["disjoint"] else None
        groups.setdefault(key, []).append(Mechanism.from_json(values))
    return list(groups.values())


def runs_csv(figures: dict[str, Any]) -> str:
    """One row per student."""
    names = ("recipe", "k", "queries", "strategy", "epsilon", "delta", "adjacency")
    return csv_text(
        [
            {**{name: entry[name] for name in names}, "seed": seed, "accuracy": accuracy}
            for entry in figures["runs"]
            for seed, accuracy in zip(entry["seeds"], entry["accuracies"], strict=True)
        ]
    )
