"""`fastdistill distill-private` on tiny images: its rows, figures, sheet, resume; and its audit."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from test_distill_data import npz, refusal
from test_distill_job import Links, Recorder

from fastdistill import cli
from fastdistill.distill.private import (
    Mechanism,
    accounting,
    audit,
    auditing,
    epsilon,
    experiment,
    features,
    job,
    report,
    training,
)
from fastdistill.distill.private import config as settings
from fastdistill.distill.private.config import PrivateConfig, Recipe
from fastdistill.distill.private.experiment import Row, Sizes, rows

pytestmark = pytest.mark.usefixtures("quick")


def blobs(count, seed=0, classes=3, side=8):
    """Noisy images of three patterns."""
    generator = np.random.default_rng(seed)
    patterns = np.random.default_rng(9).random((classes, side, side))
    y = generator.integers(0, classes, count)
    x = patterns[y] * 140 + generator.random((count, side, side)) * 110
    return x.astype(np.uint8), y.astype(np.int64)


SMALL = {"labelled": 6, "queries": 16, "parts": 12, "epsilons": (8.0,), "seeds": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    x, y = blobs(500)
    test_x, test_y = blobs(150, seed=1)
    path = tmp_path_factory.mktemp("data") / "blobs.npz"
    return npz(path, x=x, y=y, x_test=test_x, y_test=test_y)


@pytest.fixture(scope="module")
def small(quick):
    """Few filters and steps: nothing is learnt well, everything is counted."""
    quick.setattr(experiment, "FILTERS", 8)
    quick.setattr(job, "STUDENT_FILTERS", 4)
    quick.setattr(experiment, "STUDENT_FILTERS", 4)
    quick.setattr(experiment, "RECIPE", Recipe(steps=20, dp_steps=6, sampling_rate=0.1))
    quick.setattr(experiment, "GRADIENT_STEPS", 3)
    quick.setattr(experiment, "STRATEGIES", ("random", "margin"))
    quick.setattr(features, "PATCHES", 2000)
    quick.setattr(job, "CIFAR", tuple(job.models.student(3, 8, 8, 10) for _ in range(2)))
    return quick


@pytest.fixture(scope="module")
def finished(data, small, tmp_path_factory):
    """A finished run: (folder, figures)."""
    out = tmp_path_factory.mktemp("private") / "out"
    return out, job.run(PrivateConfig(out=str(out), data=str(data), **SMALL))


def test_one_factor_is_varied_at_a_time():
    sizes = Sizes.of(PrivateConfig(data="x"), 60_000)
    assert (sizes.private, sizes.public) == (50_000, 10_000)
    assert (sizes.parts, sizes.all_parts) == (250, (1, 100, 250, 500))
    assert (sizes.queries, sizes.all_queries) == (1000, (250, 1000, 4000))
    found = rows(PrivateConfig(data="x"), sizes)
    strategies = len(experiment.STRATEGIES) - 1
    assert len(found) == len(set(found)) == 3 + 3 * (2 + 6 + strategies + 1)
    for row in found:
        if row.recipe == "R3":
            centre = (row.k == 250, row.queries == 1000, row.strategy == "random")
            assert sum(centre) >= 2
    assert PrivateConfig(data="x").count == 5 and PrivateConfig().count == 1
    assert settings.RECIPE == Recipe()  # the same for every row


def test_results_json_allows_anyone_to_compute_epsilon_again(finished):
    out, figures = finished
    assert json.loads((out / "results.json").read_text()) == figures
    assert {run["recipe"] for run in figures["runs"]} == set(report.MEANING)
    for run in figures["runs"]:
        history = [Mechanism(**values) for values in run["mechanisms"]]
        if run["recipe"] in ("non_private", "as_released"):
            assert run["epsilon"] is None and run["delta"] is None and not history
            continue
        if run["recipe"] == "labels":
            assert run["epsilon"] == 0.0 and not history
            continue
        assert run["epsilon"] <= run["target_epsilon"] and run["delta"] == 1e-5
        assert run["epsilon"] > 0.97 * run["target_epsilon"]
        names = {m.dataset_id for m in history}
        parts = [[m for m in history if m.dataset_id == name] for name in names]
        accountant = "gaussian" if run["recipe"].startswith("R3") else "prv"
        found = max(epsilon(part, 1e-5, accountant) for part in parts)
        assert run["epsilon"] == pytest.approx(found)
        if run["recipe"] == "R3":
            (whole,) = {m.sensitivity for m in history}
            assert whole == math.sqrt(2) and run["adjacency"] == "replace"
            assert sum(m.releases for m in history) == run["queries"]
            assert accounting.mu(history) == pytest.approx(
                math.sqrt(2 * run["queries"]) / history[0].noise_std
            )
            assert len(history) == (1 if run["strategy"] == "random" else experiment.ROUNDS)
        if run["recipe"] == "R2":
            assert len(names) == 2
            assert run["adjacency"] == "zero_out"


def test_files_and_pages(finished):
    out, figures = finished
    names = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    assert names == {*report.OUTPUTS, "job.json", "checkpoints", "ledger.jsonl", "answers"}
    table = list(csv.DictReader((out / "runs.csv").open()))
    assert len(table) == len(figures["runs"])
    for name in ("epsilon.png", "queries.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG\r\n")
    page = Links()
    page.feed((out / "report.html").read_text())
    assert len(page.found) == 2 and all(x.startswith("data:image/png;") for x in page.found)
    assert "Defence sheet" in page.text and "gradients do not change" in page.text
    for row in report.table(figures):
        assert all(cell in page.text for cell in row)
    unsafe = [row for row in report.table(figures) if row[0] in ("as_released", "non_private")]
    assert {row[3] for row in unsafe} == {"infinity"}


def test_the_defence_sheet_says_what_a_reviewer_asks(finished):
    out, figures = finished
    text = (out / "sheet.md").read_text()
    for part in (
        "one image with its label", "`zero_out`", "`replace`", figures["data"]["sha256"],
        "ridge = ", "salt = fastdistill", f"Opacus {figures['environment']['opacus']}", "PLD",
        "NOT FOR RELEASE", "public grid", "R3 and the students: ", "run times, the logs",
        "aggregate release on private: Gaussian, noise ",
    ):  # fmt: skip
        assert part in text, part
    assert "secure" in text and "as_released" in text


def test_a_killed_job_goes_on_and_pays_only_for_what_is_lost(data, small, tmp_path, finished):
    """An answer that was kept serves again; one that was lost is released, and debited, again.

    A seeded training is made again bit by bit: one release.
    """
    config = PrivateConfig(out=str(tmp_path / "out"), data=str(data), **SMALL)
    stop = Recorder("R3-k1-n16-random-eps8, seed 0", 1)
    with pytest.raises(KeyboardInterrupt):
        job.run(config, (), stop)
    kept, lost = "R3-k1-n16-random-eps8", "R3-k12-n16-random-eps8"
    for name in (kept, lost, "R1-eps8", "R2-eps8"):  # killed before the student was kept
        (tmp_path / "out" / "checkpoints" / f"{name}-seed0.safetensors").unlink()
    (answers,) = (tmp_path / "out" / "answers").glob(f"*/{lost}-seed0/answers-*")
    answers.unlink()
    again = Recorder()
    figures = job.run(
        PrivateConfig(out=config.out, data=str(data), resume=True), {"out", "data", "resume"}, again
    )
    assert not any("Starting over" in line for line in again.said)
    for ours, theirs in zip(figures["runs"], finished[1]["runs"], strict=True):
        assert ours["accuracies"] == theirs["accuracies"], ours["name"]
        if ours["name"] == lost:
            assert ours["mechanisms"] == 2 * theirs["mechanisms"] and 8 < ours["epsilon"] < 16
        else:
            assert ours["mechanisms"] == theirs["mechanisms"], ours["name"]
            assert ours["epsilon"] == theirs["epsilon"]


def test_secure_noise_differs_from_run_to_run(data, small, tmp_path):
    x = {}
    for number in range(2):
        config = PrivateConfig(
            out=str(tmp_path / f"{number}"), data=str(data), noise="secure", **SMALL
        )
        (tmp_path / f"{number}").mkdir()
        made_by = experiment.Experiment(config, job.load(str(data), 0), "run", lambda text: None)
        x[number] = made_by.make(Row("R1", target=8.0), 0).student.linear.weight
    assert not torch.equal(x[0], x[1])
    with pytest.raises(job.JobError, match="interrupted after its debit"):
        job._make(made_by, Row("R1", target=8.0), 0)  # fresh noise would be a second release


def test_no_statistic_of_private_images_is_shared(data, small, tmp_path):
    """Other private images leave the representation, and the public features, as they were."""
    config = PrivateConfig(out=str(tmp_path / "out"), data=str(data), **SMALL)
    ours = experiment.Experiment(config, job.load(str(data), 0), "a", lambda text: None)
    with np.load(data) as file:
        arrays = {name: file[name].copy() for name in file.files}
    changed = ours.private_rows.numpy()
    arrays["x"][changed] = 255 - arrays["x"][changed]
    other = npz(tmp_path / "other.npz", **arrays)
    theirs = experiment.Experiment(config, job.load(str(other), 0), "b", lambda text: None)
    assert torch.equal(ours.representation.filters, theirs.representation.filters)
    assert torch.equal(ours.public, theirs.public)
    assert not torch.equal(ours.private, theirs.private)


def test_the_student_sees_the_first_filters_alone():
    images = torch.rand(60, 1, 10, 10, generator=torch.Generator().manual_seed(0))
    whole = features.learn(images, 6, seed=0, size=4, pool=2)
    assert whole(images).shape == (60, 24)
    assert torch.allclose(whole.first(2)(images), whole(images)[:, :8], atol=1e-5)
    x = features.apply(whole, images)
    assert float(x.mean(0).abs().max()) < 1e-3 and float((x.std(0) - 1).abs().max()) < 0.05
    brighter = whole(0.5 * images + 0.2)  # contrast is normalised, as far as it is not noise
    assert float((brighter - x).abs().mean()) < 0.2
    head = features.Head(8, 3, seed=0)
    assert torch.equal(head(x), head(torch.cat([x[:, :8], torch.randn(60, 16)], 1)))


def test_refusals(data, tmp_path, capsys):
    def ran(**values):
        return lambda: job.run(
            PrivateConfig(
                **{"out": str(tmp_path / "o"), "data": str(data), "labelled": 6, **values}
            )
        )

    refusal(ran(parts=10_000), "parts: 10000 of 417 private images")
    refusal(ran(labelled=80), "too few")
    for values, wanted in (
        ({"epsilons": (4.0, 2.0)}, "ascending"),
        ({"epsilons": 2.0}, "a list"),
        ({"delta": 1.0}, "(0, 1)"),
        ({"noise": "none"}, "reproducible, secure"),
    ):
        refusal(lambda values=values: PrivateConfig(**values), wanted)
    assert cli.main(["distill-private", "--data", "nowhere", "--out", str(tmp_path / "n")]) == 2
    assert "nowhere cannot be used" in capsys.readouterr().err


def test_the_bundled_run_says_that_it_is_a_smoke_test(finished):
    _, figures = finished
    bundled = {**figures, "settings": {**figures["settings"], "data": "mnist5k"}}
    assert report.notes(bundled)[0].startswith("A smoke test")
    assert not any(line.startswith("A smoke test") for line in report.notes(figures))
    assert any("not for release" in line for line in report.notes(figures))


# The audit


def test_lower_bounds_by_hand():
    """With delta 0, all of r guesses right: (e^eps / (1 + e^eps))^r = 0.05."""
    for r in (50, 200):
        q = 0.05 ** (1 / r)
        assert auditing.lower_bound(r, r, r, 0.0) == pytest.approx(math.log(q / (1 - q)), rel=1e-6)
    assert auditing.lower_bound(200, 200, 100, 1e-5) == 0.0
    assert auditing.p_value(200, 200, 150, 1.0, 0.0) < auditing.p_value(200, 200, 150, 1.0, 1e-4)
    bounds = [auditing.lower_bound(300, 200, right, 1e-5) for right in (120, 150, 180, 200)]
    assert bounds == sorted(bounds) and bounds[0] > 0


def test_a_lower_bound_holds_for_a_mechanism_that_is_as_private_as_it_says():
    """Randomised response of epsilon = 1: in 95 % of runs, at least, it is not refuted."""
    generator = torch.Generator().manual_seed(0)
    right = torch.binomial(
        torch.full((1000,), 200.0), torch.full((1000,), 1 / (1 + math.exp(-1.0))),
        generator=generator,
    )  # fmt: skip
    known = {int(v): auditing.lower_bound(200, 200, int(v), 0.0) for v in right.unique()}
    refuted = sum(known[int(v)] > 1.0 for v in right) / 1000
    assert 0.005 < refuted <= 0.05 + 5 * math.sqrt(0.05 * 0.95 / 1000)


def test_an_attack_counts_both_sides():
    member = torch.arange(90) % 2 == 0
    found = audit.attack(member.float() + 0.001 * torch.arange(90), member, 1e-5)
    assert (found["guesses"], found["right"], found["auc"]) == (60, 60, 1.0)
    worst = audit.attack(-member.float() + 0.001 * torch.arange(90), member, 1e-5)
    assert worst["right"] == 0 and worst["auc"] == 0.0 and worst["epsilon_lower"] == 0.0


@pytest.fixture(scope="module")
def stage():
    """Records of random features: whatever is known of one was memorised."""
    generator = torch.Generator().manual_seed(0)

    def normal(rows):
        return torch.randn(rows, 200, generator=generator)

    def coins(rows):
        return torch.rand(rows, generator=generator) < 0.5

    def labels(rows):
        return torch.randint(3, (rows,), generator=generator)

    return audit.Scene(
        normal(100), labels(100), coins(100), normal(90), labels(90), coins(90), 3, 0, 1e-5
    )


@pytest.mark.parametrize("recipe", ["non_private", "as_released"])
def test_a_student_without_privacy_gives_its_canaries_away(stage, recipe):
    found = audit.examine(stage, recipe, None)
    assert found["claimed"] is None and found["canaries"]["epsilon_lower"] >= 1.0
    assert found["canaries"]["auc"] > 0.9


@pytest.mark.parametrize("recipe", ["R1", "R2", "R3", "R3 gradient"])
def test_private_students_are_consistent_with_their_claim(stage, recipe, monkeypatch):
    monkeypatch.setattr(audit, "STEPS", 6)
    found = audit.examine(stage, recipe, 8.0)
    assert 7.9 < found["claimed"] <= 8.0
    assert found["canaries"]["epsilon_lower"] <= found["claimed"]
    assert found["verdict"].startswith("consistent with")


def test_the_audit_refutes_a_claim_that_is_false(stage, monkeypatch):
    """R3 whose noise is forgotten, its debit not."""
    real = audit.Answers._draw

    def quiet(self, rows, generator):
        self.noise_std, loud = 1e-3, self.noise_std
        try:
            return real(self, rows, generator)
        finally:
            self.noise_std = loud

    monkeypatch.setattr(audit.Answers, "_draw", quiet)
    monkeypatch.setattr(audit, "PARTS", 1)
    found = audit.examine(stage, "R3", 0.5)
    assert found["verdict"].startswith("REFUTED: claimed 0.50")


def test_the_audit_command(data, small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(audit, "STEPS", 6)
    monkeypatch.setattr(audit, "STUDENT", training.Training(20, 1000, 0.02, 0.0))
    arguments = ["audit", "--data", str(data), "--out", str(tmp_path / "a")]
    few = tmp_path / "few.yaml"
    few.write_text("epsilons: [8.0]\n")
    arguments += ["--config", str(few)]
    assert cli.main([*arguments, "--canaries", "40", "--records", "150"]) == 0
    shown = capsys.readouterr().out
    figures = json.loads((tmp_path / "a" / "audit.json").read_text())
    assert [run["recipe"] for run in figures["runs"][:2]] == ["non_private", "as_released"]
    assert len(figures["runs"]) == 2 + 4
    page = (tmp_path / "a" / "audit.md").read_text()
    for row in audit.table(figures):
        assert all(cell in page for cell in row)
    assert "consistent with" in shown and "by a fair coin" in shown.replace("\n", " ")
    assert cli.main([*arguments, "--canaries", "4000"]) == 2
    assert "4000 of 83 public images" in capsys.readouterr().err
