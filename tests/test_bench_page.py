"""docs/benchmarks.md and README's figures are what the results say."""

import json
import re

import pytest

from bench import __main__ as command
from bench import page, plots, schema

REMEDY = "`python -m bench page` makes it anew"


def test_the_page_is_made_from_the_results():
    assert page.PAGE.read_text() == page.page(page.RESULTS), REMEDY


def test_readme_has_the_measured_figures():
    text = page.README.read_text()
    assert text == page.with_figures(text, schema.load(page.README_RESULTS)), REMEDY


def test_pictures_of_the_page_are_there():
    found = re.findall(r"\]\((\.\./bench/results/[^)]*\.png)\)", page.PAGE.read_text())
    assert found
    assert all((page.PAGE.parent / name).exists() for name in found)


def test_a_changed_figure_shows():
    results = schema.load(page.README_RESULTS)
    text = page.with_figures(page.README.read_text(), results)
    for row in results["rows"]:
        if row["suite"] == "main" and row["pass"] == "both":
            row["ms"]["fastdistill"] *= 1.5
            break
    assert page.with_figures(text, results) != text
    with pytest.raises(ValueError, match="README: expected <!-- bench:begin -->"):
        page.with_figures("no marks", results)


def row(**changes):
    base = {
        "op": "new", "suite": "main", "kind": "thing", "shape": [4, 5], "dtype": "fp32",
        "threads": 2, "device": "cpu", "pass": "both", "ms": {"mine": 2.0, "limit": 1.0},
        "iqr_ms": {"mine": 0.1}, "right": {"mine": True}, "repetitions": 9, "disturbed": False,
        "environment": 0,
    }  # fmt: skip
    return {**base, **changes}


def write(folder, rows):
    about = {**dict.fromkeys(schema.ENVIRONMENT, "x"), "cores": 2}
    results = {"schema": 1, "seconds": 1.0, "environments": [about], "rows": rows}
    (folder / "new.json").write_text(json.dumps(results))
    return results


def test_any_op_in_the_common_form_has_its_place(tmp_path):
    rows = [
        row(),
        row(model="resnet", disturbed=True, skipped={"peer": "peer is not installed"}),
        row(dtype="bf16", right={"mine": False}, error={"mine": {"loss": 1.0, "gradient": 2.0}}),
        row(dtype="bf16", suite="curves", axis="rows", at=4),
    ]
    write(tmp_path, rows)
    text = page.page(tmp_path)
    assert "## new thing (CPU)" in text and "## new thing: curves over rows (CPU)" in text
    assert "| 4 × 5 | fp32 | 2 |  | **2** ±0.1 | 0.50 |" in text
    assert "| 4 × 5 (d) | fp32 | 2 | resnet | **2** ±0.1 | 0.50 |" in text
    assert "**2** ±0.1 WRONG" in text and "| 1.0e+00 | 2.0e+00 |" in text
    assert "- skipped in 1 rows: peer: peer is not installed" in text
    assert "1 of 4" in text


def test_pictures_of_any_op(tmp_path):
    pytest.importorskip("matplotlib")
    points = [row(suite="curves", axis="rows", at=at, peak_mb={"mine": at}) for at in (4, 8)]
    results = write(tmp_path, [row(kind=None), row(), *points])
    names = {path.name for path in plots.draw(results, tmp_path)}
    assert names == {
        "new-cpu-fp32-time.png", "new-thing-cpu-fp32-time.png", "new-thing-cpu-rows-fp32-curve.png"
    }  # fmt: skip
    assert "(../bench/results/new-thing-cpu-rows-fp32-curve.png)" in page.page(tmp_path)


def test_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(page, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text(f"a\n{page.BEGIN}\nold\n{page.END}\nb\n")
    assert command.main(["page", "--no-pictures"]) == 0
    assert "written:" in capsys.readouterr().out
    assert (tmp_path / "page.md").read_text() == page.page(page.RESULTS)
    text = (tmp_path / "README.md").read_text()
    assert "old" not in text and text.startswith("a\n<!--") and text.endswith("-->\nb\n")
