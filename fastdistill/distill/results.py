"""The figures of a job: results.json, and the two tables students.csv and curves.csv."""

from __future__ import annotations

import csv
import io
import statistics
from typing import TYPE_CHECKING, Any

from fastdistill.distill.models import parameters
from fastdistill.distill.workbench import HINT_DISTILLED, Network, hint_epochs, share

if TYPE_CHECKING:
    import torch

    from fastdistill.distill.job import Outcome


def figures(outcome: Outcome) -> dict[str, Any]:
    """The content of results.json.

    Accuracies and agreements are fractions; spreads are standard deviations over the seeds with
    ddof = 1, null for one seed. Agreement: share of test images on which student and teacher name
    the same class. compression: teacher's parameters over the student's. epochs and seconds_mean
    of a student are without those of its hint.
    """
    import torch

    truth = torch.from_numpy(outcome.data.test.labels)
    teacher = outcome.teacher
    size = parameters(teacher.model)
    students = [
        _student(name, outcome, truth, size)
        for name in dict.fromkeys(student.name for student in outcome.students)
    ]
    return {
        "teacher": {
            "accuracy": accuracy(teacher, truth),
            "parameters": size,
            "labelled": teacher.labelled,
            "epochs": sum(entry["epoch"] > 0 for entry in teacher.curve),
            "seconds": _seconds(teacher),
        },
        "students": students,
        "inference": outcome.inference,
        "data": {
            **outcome.data.source.describe(),
            "classes": outcome.data.source.classes,
            "train_images": len(outcome.data.train),
            "test_images": len(outcome.data.test),
            "image_shape": list(outcome.data.train.pixels.shape[1:]),
        },
        "models": _origin(outcome),
        "settings": outcome.config.settings(),
        "environment": outcome.environment,
    }


def accuracy(network: Network, truth: torch.Tensor) -> float:
    """Share of test images whose class the network names."""
    return share(network.test_logits.argmax(1), truth)


def _student(name: str, outcome: Outcome, truth: torch.Tensor, size: int) -> dict[str, Any]:
    runs = [student for student in outcome.students if student.name == name]
    says = outcome.teacher.test_logits.argmax(1)
    accuracies = [accuracy(run, truth) for run in runs]
    agreements = [share(run.test_logits.argmax(1), says) for run in runs]
    mine = parameters(runs[0].model)
    return {
        "name": name,
        "accuracy_mean": statistics.fmean(accuracies),
        "accuracy_std": _spread(accuracies),
        "accuracies": accuracies,
        "agreement_mean": statistics.fmean(agreements),
        "agreement_std": _spread(agreements),
        "agreements": agreements,
        "seeds": [run.seed for run in runs],
        "labelled": runs[0].labelled,
        "parameters": mine,
        "compression": size / mine,
        "speed_up": outcome.inference["speed_up"],  # all students have one architecture
        "epochs": len(runs[0].curve),
        "hint_epochs": hint_epochs(outcome.config)[0] if name == HINT_DISTILLED else 0,
        "seconds_mean": statistics.fmean(_seconds(run) for run in runs),
    }


def _origin(outcome: Outcome) -> str:
    """Where the networks' weights come from, a sentence."""
    config = outcome.config
    given = [
        f"the {who}'s start from {path}"
        for who, path in (
            ("teacher", config.teacher_checkpoint),
            ("students", config.student_checkpoint),
        )
        if path is not None
    ]
    if not given:
        return "Trained from scratch by this job; no pretrained weights are used."
    return f"Weights of the user's own: {' and '.join(given)}; their licence is not known here."


def _spread(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _seconds(network: Network) -> float:
    return sum(entry["seconds"] for entry in network.curve)


def students_csv(figures: dict[str, Any]) -> str:
    """One row per trained student."""
    rows = [
        {
            "name": student["name"],
            "seed": seed,
            "labelled": student["labelled"],
            "accuracy": student["accuracies"][i],
            "agreement": student["agreements"][i],
            "parameters": student["parameters"],
            "compression": student["compression"],
            "speed_up": student["speed_up"],
        }
        for student in figures["students"]
        for i, seed in enumerate(student["seeds"])
    ]
    return csv_text(rows)


def curves_csv(outcome: Outcome) -> str:
    """One row per network and epoch; no agreement for the teacher."""
    return csv_text(
        [
            {"name": network.name, "seed": network.seed, **{"agreement": None}, **entry}
            for network in (outcome.teacher, *outcome.students)
            for entry in network.curve
        ]
    )


def csv_text(rows: list[dict[str, Any]]) -> str:
    """A table with one heading per key of the first row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
