"""Writes what a run leaves for people: results.json, CSV, PNG, and one HTML file with all of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastdistill.distill import report, store
from fastdistill.distill.text import plots, results

if TYPE_CHECKING:
    from fastdistill.distill.text.job import Outcome

OUTPUTS = ("results.json", "curves.csv", "curves.png", "similarity.png", "report.html")
"""Every file that the job writes beside its checkpoints, its manifest and the folder student/."""

CAPTIONS = {
    "curves.png": "Left: 1 would be the teacher itself. Right: sums over the pairs of layers.",
    "similarity.png": "One point per pair of held-out sentences; the dotted line is the teacher.",
}
HEADINGS = ("Encoder", "Layers", "Params", "Correlation", "Top-10", "Speed-up")
MEANING = {
    "teacher": "as it came",
    "student, as cut": "some of the teacher's layers, untrained",
    "student, distilled": "hidden states, attention and sentence embeddings like the teacher's",
}


def write(outcome: Outcome, figures: dict[str, Any]) -> None:
    """Write every output file; results.json last, so that where it is, the others are too."""
    folder = outcome.directory.path
    student = folder / "student"
    outcome.training.student.save_pretrained(student)
    outcome.training.teacher.tokenizer.save_pretrained(student)
    pictures = {"curves.png": plots.curves(outcome), "similarity.png": plots.similarity(outcome)}
    for name, data in pictures.items():
        store.write_atomic(folder / name, data)
    store.write_atomic(folder / "curves.csv", results.curves_csv(outcome).encode())
    store.write_atomic(folder / "report.html", page(figures, pictures).encode())
    store.write_json(folder / "results.json", figures)


def table(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """The summary as text, for the terminal and the page alike."""
    teacher, student = figures["teacher"], figures["student"]
    layers, size = str(len(student["layers"])), f"{student['parameters']:,}"
    rows: list[tuple[str, ...]] = [
        ("teacher", str(teacher["layers"]), f"{teacher['parameters']:,}", "1", "1", "1x"),
    ]
    for name, when in (("student, as cut", "before"), ("student, distilled", "after")):
        found = student[when]
        rows.append(
            (
                name, layers, size, f"{found['correlation']:.3f}", f"{found['overlap']:.3f}",
                f"{figures['inference']['speed_up']:.2f}x",
            )
        )  # fmt: skip
    return rows


def notes(figures: dict[str, Any]) -> list[str]:
    """What one must know to read the table."""
    data, inference, student = figures["data"], figures["inference"], figures["student"]
    return [
        "Correlation: of the cosine similarities of all pairs of "
        f"{data['held_out_sentences']:,} held-out sentences, with the teacher's. Top-10: mean "
        "share of a sentence's ten nearest that are the teacher's ten nearest.",
        f"The student starts from the teacher's layers {', '.join(map(str, student['layers']))}; "
        f"{student['parameters_saved']:.0%} fewer parameters (the embeddings, which it keeps, are "
        f"most of the rest), {inference['time_saved']:.0%} less time. {results.DISTILBERT}",
        f"Speed-up: median forward pass of {inference['batch_size']} sentences on "
        f"{figures['environment']['device']}, {inference['teacher_ms']:.1f} ms for the teacher, "
        f"{inference['student_ms']:.1f} ms for the student.",
    ]


def licences(figures: dict[str, Any]) -> list[str]:
    """Of the teacher and of the text."""
    return [figures["teacher"]["licence"], figures["data"]["licence"]]


def page(figures: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """The HTML report: one file that needs no other, its images inside."""
    teacher, data = figures["teacher"], figures["data"]
    return report.document(
        f"Distillation of {teacher['name']}",
        f"A sentence encoder of {teacher['layers']} layers into one of "
        f"{len(figures['student']['layers'])}, on {data['name']}.",
        report.html_table(HEADINGS, table(figures), MEANING),
        notes(figures),
        report.images(pictures, CAPTIONS),
        {
            "Settings": figures["settings"],
            "Data and licences": {
                **data,
                "teacher": f"{teacher['name']}, sha256 {teacher['sha256']}",
                "teacher's licence": teacher["licence"],
            },
            "Environment": figures["environment"],
        },
    )
