"""Writes what a job leaves for people: results.json, CSV, PNG, and one HTML file with all of it."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fastdistill.distill import plots, results, store

if TYPE_CHECKING:
    from fastdistill.distill.job import Outcome

MEANING = {
    "labels_only": "cross-entropy with the visible labels; no teacher",
    "distilled": "the teacher's outputs on all training images; no labels",
    "both": "the teacher's outputs on all training images, and the visible labels",
    "hint_distilled": "its lower layers on the teacher's middle layer (FitNets), then as distilled",
}

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .4rem .7rem; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #222; font-weight: 600; }
td small { color: #666; display: block; }
pre { white-space: pre-wrap; font-size: .8rem; }
img { max-width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; }
dt { color: #666; } dd { margin: 0; overflow-wrap: anywhere; }
"""


def write(outcome: Outcome, figures: dict[str, Any]) -> None:
    """Write every output file; results.json last, so that where it is, the others are too."""
    folder = outcome.directory.path
    pictures = {
        "curves.png": plots.curves(outcome),
        "agreement.png": plots.agreement(outcome),
        "disagreement.png": plots.disagreement(outcome),
    }
    for name, data in pictures.items():
        store.write_atomic(folder / name, data)
    store.write_atomic(folder / "students.csv", results.students_csv(figures).encode())
    store.write_atomic(folder / "curves.csv", results.curves_csv(outcome).encode())
    store.write_atomic(folder / "report.html", page(figures, pictures).encode())
    store.write_json(folder / "results.json", figures)


HEADINGS = (
    "Network", "Labels", "Accuracy", "Agreement", "Params", "Compression", "Speed-up",
)  # fmt: skip


def table(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """The summary as text, one row per network, for the terminal and the page alike."""
    teacher = figures["teacher"]
    rows: list[tuple[str, ...]] = [
        (
            "teacher",
            "" if teacher["labelled"] is None else f"{teacher['labelled']:,}",
            f"{teacher['accuracy']:.1%}",
            "",
            f"{teacher['parameters']:,}",
            "1x",
            "1x",
        )
    ]
    for student in figures["students"]:
        rows.append(
            (
                student["name"],
                f"{student['labelled']:,}",
                _spread(student["accuracy_mean"], student["accuracy_std"]),
                _spread(student["agreement_mean"], student["agreement_std"]),
                f"{student['parameters']:,}",
                f"{student['compression']:.1f}x",
                f"{student['speed_up']:.1f}x",
            )
        )
    return rows


def _spread(mean: float, std: float | None) -> str:
    return f"{mean:.1%}" if std is None else f"{mean:.1%} ± {100 * std:.1f}"


def notes(figures: dict[str, Any]) -> list[str]:
    """What one must know to read the table."""
    data, inference = figures["data"], figures["inference"]
    seeds = len(figures["students"][0]["seeds"])
    over = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    lines = [
        f"Accuracy on {data['test_images']:,} test images, {over}; agreement: share of them on "
        "which student and teacher name the same class.",
        "All students make as many optimiser steps, labels_only from its labelled images alone.",
        f"Speed-up: median forward pass at batch size {inference['batch_size']} on "
        f"{figures['environment']['device']}, {inference['teacher_ms']:.2f} ms for the teacher, "
        f"{inference['student_ms']:.2f} ms for the student.",
    ]
    students = {student["name"]: student for student in figures["students"]}
    if "hint_distilled" in students:
        lines.insert(2, _verdict(students["hint_distilled"], students.get("distilled")))
    return lines


def _verdict(hinted: dict[str, Any], plain: dict[str, Any] | None) -> str:
    """Whether the hint helped, said plainly."""
    spent = hinted["hint_epochs"]
    text = f"hint_distilled spends {spent} of its {spent + hinted['epochs']} epochs on the hint."
    if plain is None:
        return text
    gain = 100 * (hinted["accuracy_mean"] - plain["accuracy_mean"])
    stds = [student["accuracy_std"] for student in (hinted, plain)]
    spread = 100 * max((std for std in stds if std is not None), default=0.0)
    if len(hinted["seeds"]) < 2:
        return f"{text} Against distilled alone: {gain:+.1f} points, of one seed."
    if gain <= 0:
        return f"{text} The hint does not help here: {gain:+.1f} points against distilled alone."
    if gain <= spread:
        return (
            f"{text} Against distilled alone: {gain:+.1f} points, within the spread of the seeds: "
            "no gain can be claimed."
        )
    return f"{text} The hint gains {gain:.1f} points over distilled alone."


CAPTIONS = {
    "curves.png": "Lines are means over the seeds; bands run from the lowest to the highest.",
    "agreement.png": "Left: on the test images, after each epoch. Right: at the end.",
    "disagreement.png": "Green: the answer is the label. Red: it is not.",
}


def page(figures: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """The HTML report: one file that needs no other, its images inside."""
    students = ", ".join(student["name"] for student in figures["students"])
    data = figures["data"]
    given = figures["teacher"]["labelled"] is None
    teacher = "as it was given" if given else "cross-entropy with all labels"
    meaning = {"teacher": teacher, **MEANING}
    return document(
        f"Distillation on {data['name']}",
        "One teacher, and students of one small architecture trained in different ways: "
        f"{students}.",
        html_table(HEADINGS, table(figures), meaning),
        notes(figures),
        images(pictures, CAPTIONS),
        {
            "Settings": figures["settings"],
            "Data and licences": {**data, "networks": figures["models"]},
            "Environment": figures["environment"],
        },
    )


def document(
    title: str,
    lead: str,
    table: str,
    notes: Iterable[str],
    pictures: str,
    facts: Mapping[str, Mapping[str, Any]],
) -> str:
    """A page: text is escaped here, but `table` and `pictures`, which are HTML.

    Args:
        title: heading, and title of the page.
        lead: one paragraph.
        table: see `html_table`.
        notes: one paragraph each.
        pictures: see `images`.
        facts: heading -> names and values.
    """
    sections = "".join(
        f"<h2>{html.escape(heading)}</h2>\n{_facts(entries.items())}\n"
        for heading, entries in facts.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fastdistill: {html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<p>{html.escape(lead)}</p>
{table}
{"".join(f"<p>{html.escape(note)}</p>" for note in notes)}
<h2>Pictures</h2>
{pictures}
{sections}</body>
</html>
"""


def images(pictures: Mapping[str, bytes], captions: Mapping[str, str]) -> str:
    """PNG files inside the page, each with its caption."""
    return "".join(
        f'<p><img alt="{name.removesuffix(".png")}" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}"><br>'
        f"{captions[name]}</p>\n"
        for name, data in pictures.items()
    )


def html_table(
    headings: Iterable[str], rows: Iterable[tuple[str, ...]], meaning: Mapping[str, str]
) -> str:
    """A table; what each row's first cell means stands below it in small letters."""
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = ""
    for name, *cells in rows:
        small = f"<small>{html.escape(meaning[name])}</small>"
        body += f"<tr><td>{html.escape(name)}{small}</td>"
        body += "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>\n"
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"


def _facts(facts: Iterable[tuple[str, Any]]) -> str:
    entries = ""
    for key, value in facts:
        text = value if isinstance(value, str) else json.dumps(value)
        entries += f"<dt>{html.escape(key.replace('_', ' '))}</dt><dd>{html.escape(text)}</dd>\n"
    return f"<dl>\n{entries}</dl>"
