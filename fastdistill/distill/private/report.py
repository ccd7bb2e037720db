"""Writes what a run leaves for people: results.json, CSV, PNG, the defence sheet, one HTML file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastdistill.distill import report, store
from fastdistill.distill.private import plots, results
from fastdistill.distill.private.sheet import sheet

if TYPE_CHECKING:
    from fastdistill.distill.private.job import Outcome

OUTPUTS = ("results.json", "runs.csv", "epsilon.png", "queries.png", "sheet.md", "report.html")
"""Every file that the job writes beside its checkpoints, its manifest, its ledger and answers/."""

CAPTIONS = {
    "epsilon.png": "Mean over the seeds; bars are one standard deviation.",
    "queries.png": "R3 with random queries: one factor varied, the other as in the central row.",
}
HEADINGS = ("Row", "Teachers", "Queries", "epsilon", "Accuracy")
MEANING = {
    "labels": "the public labels alone; nothing private takes part",
    "non_private": "a teacher on all private records, asked without noise",
    "as_released": "the same with noise on the value of the loss: gradients do not change",
    "R1": "teacher by DP-SGD, distilled on public images",
    "R2": "teacher by DP-SGD on one half of the records, student by DP-SGD on the other",
    "R3": "teachers on disjoint parts, noise on the sum of what they say",
    "R3 gradient": "the same with the noise on the student's gradients",
}


def write(outcome: Outcome, figures: dict[str, Any]) -> None:
    """Write every output file; results.json last, so that where it is, the others are too."""
    folder = outcome.directory.path
    pictures = {"epsilon.png": plots.epsilon(figures), "queries.png": plots.queries(figures)}
    for name, data in pictures.items():
        store.write_atomic(folder / name, data)
    store.write_atomic(folder / "runs.csv", results.runs_csv(figures).encode())
    page_of_claims = sheet(figures)
    store.write_atomic(folder / "sheet.md", page_of_claims.encode())
    store.write_atomic(folder / "report.html", page(figures, pictures).encode())
    store.write_json(folder / "results.json", figures)


def table(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """The summary as text, for the terminal and the page alike."""
    return [
        (
            run["recipe"] + ("" if run["strategy"] in (None, "random") else f", {run['strategy']}"),
            "" if run["k"] is None else f"{run['k']:,}",
            "" if run["queries"] is None else f"{run['queries']:,}",
            "infinity" if run["epsilon"] is None else f"{run['epsilon']:.2f}",
            _spread(run["accuracy_mean"], run["accuracy_std"]),
        )
        for run in figures["runs"]
    ]


def _spread(mean: float, std: float | None) -> str:
    return f"{mean:.1%}" if std is None else f"{mean:.1%} ± {100 * std:.1f}"


def notes(figures: dict[str, Any]) -> list[str]:
    """What one must know to read the table."""
    data, size, cifar = figures["data"], figures["compression"], figures["cifar"]
    seeds = len(figures["runs"][0]["seeds"])
    over = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    adjacent = sorted({run["adjacency"] for run in figures["runs"] if run["mechanisms"]})
    delta = figures["settings"]["delta"]
    lines = [
        f"Accuracy on {data['test_images']:,} test images, {over}. epsilon at delta = {delta:g}, "
        f"for one student released alone; unit: {figures['unit']}; adjacency "
        f"{' and '.join(adjacent)}, by row in results.json. infinity: none is claimed.",
        f"{data['private_images']:,} private images, {data['public_images']:,} public ones, "
        f"{data['public_labels']} of these with a label. Teachers and students share a "
        "representation learnt from the public images.",
        "as_released: RONA's program adds its noise to the value of the loss; the gradients are "
        "those without noise, so epsilon is infinite.",
        f"Student {size['student_parameters']:,} parameters, teacher "
        f"{size['teacher_parameters']:,}: {size['compression']:.1f}x smaller, "
        f"{size['speed_up']:.1f}x faster. Networks of the sizes of RONA's for CIFAR "
        f"({cifar['teacher_parameters'] / 1e6:.2f}M and "
        f"{cifar['student_parameters'] / 1e6:.3f}M): {cifar['compression']:.0f}x smaller, "
        f"{cifar['speed_up']:.1f}x faster.",
        "Settings were tried on public images alone ("
        + ", ".join(f"{name}: {count}" for name, count in figures["tried"].items())
        + ") and are the same for all rows.",
    ]
    if figures["settings"]["noise"] != "secure":
        lines.append("Noise from the seed: reproducible, not for release.")
    if figures["settings"]["data"] == "mnist5k":
        lines.insert(
            0,
            "A smoke test: on so few images knowledge perturbation is useless, and its accuracies "
            "mean nothing. The published figures are on Fashion-MNIST (--data).",
        )
    return lines


def page(figures: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """The HTML report: one file that needs no other, its images inside."""
    import html

    rows = table(figures)
    meaning = {
        row[0]: MEANING[run["recipe"]] for row, run in zip(rows, figures["runs"], strict=True)
    }
    return report.document(
        f"Private distillation on {figures['data']['name']}",
        "Students of teachers that saw private records, and the epsilon of each.",
        report.html_table(HEADINGS, rows, meaning),
        notes(figures),
        report.images(pictures, CAPTIONS)
        + f"<h2>Defence sheet</h2>\n<pre>{html.escape(sheet(figures))}</pre>\n",
        {
            "Settings": figures["settings"],
            "Data and licences": figures["data"],
            "Compression": figures["compression"],
            "Environment": figures["environment"],
        },
    )
