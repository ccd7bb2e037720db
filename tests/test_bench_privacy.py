"""The benchmark of clip_and_noise: its rows, and that a wrong contender shows."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as command
from bench import curves, privacy, run, schema
from fastdistill import _native

pytestmark = pytest.mark.skipif(_native.cpu().module is None, reason=str(_native.cpu().reason))


@pytest.fixture(autouse=True)
def small(monkeypatch, one_thread):
    monkeypatch.setattr(privacy, "NOISE_SHAPES", [(5000,)])
    monkeypatch.setattr(privacy, "CLIP_SHAPES", [(4, 3000)])
    monkeypatch.setattr(curves, "PARAMETERS", [(4, 10), (4, 70), (4, 500)])
    monkeypatch.setattr(
        privacy, "in_turn", lambda steps, *_: privacy_in_turn(steps, seconds=0.01, least=2, most=3)
    )


privacy_in_turn = privacy.in_turn


def test_rows_and_verdicts(capsys, tmp_path):
    path = tmp_path / "rows.json"
    assert command.main(["clip_and_noise", "--quick", "--threads", "1", "--json", str(path)]) == 0
    text = capsys.readouterr().out
    assert "noise 5000 fp32" in text and "clip 4x3000 bf16" in text and "WRONG" not in text
    assert "bar 4: " in text and "bar 1: " in text and "x reading twice (bar 1.3: " in text
    rows = json.loads(path.read_text())["rows"]
    points = [(r["axis"], r["at"], r["shape"]) for r in rows if r["suite"] == "curves"]
    assert points == [("parameters", 10, [4, 10]), ("parameters", 500, [4, 500])]
    assert "clip 4x500 fp32" in text and text.count("bar 1.3") == 2  # of the clip cases alone


def processes(run_it):
    """What bench.run has of `subprocess`, with another `run`."""
    return SimpleNamespace(run=run_it, CalledProcessError=subprocess.CalledProcessError)


def test_allocators_are_measured_in_fresh_processes(monkeypatch, capsys, tmp_path):
    """Each with its variable, and the bars of both beside each other."""
    seen = []

    def run_it(command, *, cwd, env):
        options = dict(zip(command, command[1:], strict=False))
        seen.append((options["--allocator"], env["THP_MEM_ALLOC_ENABLE"], "--threads" in command))
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", env["THP_MEM_ALLOC_ENABLE"])
        path = Path(options["--json"])
        results = privacy.measure([1], ["fp32"], True, lambda text: None)
        path.write_text(json.dumps(results))
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(run, "subprocess", processes(run_it))
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    path = tmp_path / "rows.json"
    assert command.main(["clip_and_noise", "--threads", "1", "--json", str(path)]) == 0
    assert seen == [("default", "0", True), ("thp", "1", True)]
    results = json.loads(path.read_text())
    assert not list(schema.problems(results)) and len(results["environments"]) == 2
    places = {(r["allocator"], r["environment"]) for r in results["rows"]}
    assert places == {("default", 0), ("thp", 1)}
    text = capsys.readouterr().out
    for allocator in ("default", "thp"):
        assert f"clip 4x3000 fp32, 1 threads, {allocator}: of reading twice" in text
        assert f"noise 5000 fp32 philox, 1 threads, {allocator}: x normal_" in text


def test_a_failed_process_ends_the_run(monkeypatch):
    failed = subprocess.CompletedProcess(["bench"], 3)
    monkeypatch.setattr(run, "subprocess", processes(lambda *_, **__: failed))
    with pytest.raises(subprocess.CalledProcessError):
        command.main(["clip_and_noise", "--threads", "1"])


def test_a_wrong_contender_shows(monkeypatch, capsys):
    def unclipped(generator):
        return lambda x, sigma: x.double().mean(0) if len(x) else torch.randn(x.shape[1])

    monkeypatch.setattr(privacy, "_fastdistill", unclipped)
    assert command.main(["clip_and_noise", "--quick", "--threads", "1", "--dtypes", "fp32"]) == 1
    assert "WRONG" in capsys.readouterr().out
