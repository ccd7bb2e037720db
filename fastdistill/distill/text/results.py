"""The figures of a run: results.json and curves.csv."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastdistill.distill.models import parameters
from fastdistill.distill.results import csv_text
from fastdistill.distill.text import measures

if TYPE_CHECKING:
    from fastdistill.distill.text.job import Outcome

DISTILBERT = "DistilBERT reports 40 % fewer parameters, 39 % less time and 97 % kept (GLUE)."


def figures(outcome: Outcome) -> dict[str, Any]:
    """The content of results.json.

    correlation: Pearson's, of the cosine similarities of all pairs of held-out sentences, student
    against teacher. overlap: mean share of the teacher's ten nearest held-out sentences that are
    among the student's ten. before: the student as cut from the teacher, untrained.
    parameters_saved and time_saved: shares of the teacher's.
    """
    training = outcome.training
    teacher, student = training.teacher.model, training.student
    wanted = training.wanted
    kept = parameters(student) / parameters(teacher)

    def agreement(similarities: Any) -> dict[str, float]:
        return {
            "correlation": measures.correlation(similarities, wanted),
            "overlap": measures.overlap(similarities, wanted),
        }

    last = outcome.curve[-1]
    terms = {name: last[name] for name in ("hidden", "attention", "pooled") if name in last}
    return {
        "teacher": {
            "name": training.teacher.name,
            "layers": training.teacher.layers,
            "parameters": parameters(teacher),
            "sha256": training.teacher.sha256,
            "licence": training.teacher.licence,
        },
        "student": {
            "layers": list(training.layers),
            "parameters": parameters(student),
            "parameters_saved": 1 - kept,
            "before": agreement(training.before),
            "after": agreement(outcome.after),
            "losses": terms,
            "epochs": len(outcome.curve),
            "seconds": sum(entry["seconds"] for entry in outcome.curve),
        },
        "inference": {**outcome.inference, "time_saved": 1 - 1 / outcome.inference["speed_up"]},
        "distilbert": DISTILBERT,
        "data": outcome.corpus.describe(),
        "settings": outcome.config.settings(),
        "environment": outcome.environment,
    }


def curves_csv(outcome: Outcome) -> str:
    """One row per epoch."""
    return csv_text([dict(entry) for entry in outcome.curve])
