"""`python -m bench private`: its rows on small models, and that a wrong contender shows."""

import json

import pytest
import torch

from bench import __main__ as command
from bench import bars, private, private_models, schema
from fastdistill import _native
from fastdistill.privacy.engine import gradients

pytestmark = [
    pytest.mark.skipif(_native.cpu().module is None, reason=str(_native.cpu().reason)),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:.*ForkProcess|.*fork"),
]


@pytest.fixture(autouse=True)
def small(monkeypatch, one_thread):
    cases = {
        "mlp": private_models.CASES["mlp"]._replace(
            model=lambda: private_models._mlp(16),
            batch=lambda: (torch.randn(6, 784), torch.randint(10, (6,))),
        ),
        "transformer": private_models.CASES["transformer"]._replace(
            model=lambda: private_models.Transformer(11, 40, 8, 1, 2),
            batch=lambda: (torch.randint(11, (4, 40)), torch.randint(11, (4, 40))),
        ),
        "cnn": private_models.CASES["cnn"]._replace(
            batch=lambda: (torch.randn(3, 1, 28, 28), torch.randint(10, (3,)))
        ),
    }
    monkeypatch.setattr(private, "CASES", cases)
    monkeypatch.setattr(private_models, "CASES", cases)
    in_turn = private.in_turn
    monkeypatch.setattr(private, "in_turn", lambda steps, *_: in_turn(steps, 0.01, 2, 3))
    monkeypatch.setattr(private.memory, "rise", lambda build: 1.0)


def test_rows_and_verdicts(capsys, tmp_path):
    path = tmp_path / "rows.json"
    assert command.main(["private", "--quick", "--threads", "1", "--json", str(path)]) == 0
    text = capsys.readouterr().out
    assert "mlp 6x784" in text and "transformer 4x40" in text and "cnn 3x1x28x28" in text
    assert "WRONG" not in text and "(bar 1.1: " in text and "(bar 1.05: " in text
    results = json.loads(path.read_text())
    assert not list(schema.problems(results))
    lines = [line for line in bars.lines(results) if ": of non-private" in line]
    assert len(lines) == 6 and "mlp fastdistill, 1 threads, default: of non-private" in lines[0]
    assert sum(": memory " in line for line in bars.lines(results)) == 2  # peaks of 1 and 1
    assert all(len(row["ms"]) == 6 for row in results["rows"])


def test_a_wrong_contender_shows(monkeypatch, capsys):
    monkeypatch.setattr(gradients.Dense, "square", lambda self: torch.zeros(self.samples).double())
    arguments = ["private", "--quick", "--threads", "1", "--models", "mlp"]
    assert command.main([*arguments, "--contenders", "non-private,fastdistill"]) == 1
    assert "WRONG" in capsys.readouterr().out
    assert command.main(["private", "--models", "rnn"]) == 2
