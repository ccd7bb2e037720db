"""`python -m bench compare`, and the one form of all results."""

import copy
import json
from pathlib import Path

import pytest

from bench import __main__ as command
from bench import compare, schema

RESULTS = sorted((Path(__file__).parent.parent / "bench" / "results").glob("*.json"))


def results(**changes):
    row = {
        "op": "kd", "suite": "main", "shape": [512, 32000], "dtype": "fp32", "threads": 2,
        "device": "cpu", "allocator": "default", "isa": "avx512", "pass": "both",
        "ms": {"fastdistill": 10.0, "eager": 200.0, "limit": 8.0},
        "iqr_ms": {"fastdistill": 0.4, "eager": 8.0},
        "right": {"fastdistill": True, "eager": True},
        "peak_mb": {"fastdistill": 60.0, "eager": 300.0},
        "repetitions": 9, "dropped": 0, "disturbed": False, "noisy": [], "environment": 0,
    }  # fmt: skip
    about = dict.fromkeys(schema.ENVIRONMENT, "x")
    return {
        "schema": 1,
        "seconds": 1.0,
        "environments": [about],
        "rows": [{**row, **changes}, {**row, "shape": [4, 5]}],
    }


def verdicts(before, after):
    return {
        x.contender: x.verdict
        for x in compare.changes(before, after)
        if "512x32000" in x.where and x.verdict != "same"
    }


def test_slower_beyond_noise_only():
    before = results()
    assert verdicts(before, before) == {}
    ms = {"fastdistill": 10.45, "eager": 200.0}
    assert verdicts(before, results(ms=ms)) == {}  # 4.5 %
    ms["fastdistill"] = 11.0
    assert verdicts(before, results(ms=ms)) == {"fastdistill": "slower"}
    wide = {"fastdistill": 1.7, "eager": 8.0}
    assert verdicts(before, results(ms=ms, iqr_ms=wide)) == {}  # the quartiles touch
    assert verdicts(before, results(ms=ms, disturbed=True)) == dict.fromkeys(ms, "disturbed")
    ms["fastdistill"] = 9.0
    assert verdicts(before, results(ms=ms)) == {"fastdistill": "faster"}


def test_turns_of_one_case_count_as_one():
    turns = results()
    turns["rows"] += [{**turns["rows"][0], "ms": {"fastdistill": ms, "eager": 200.0}}
                      for ms in (11.0, 12.0)]  # fmt: skip
    assert verdicts(turns, results(ms={"fastdistill": 11.9, "eager": 200.0})) == {}
    slow = results(ms={"fastdistill": 14.0, "eager": 200.0})
    assert verdicts(turns, slow) == {"fastdistill": "slower"}
    turns["rows"][0]["disturbed"] = True
    (found,) = [x for x in compare.changes(turns, slow) if x.verdict == "slower"]
    assert (found.before, found.after) == (11.5, 14.0)


def test_wrong_gone_and_memory():
    before = results()
    wrong = results(right={"fastdistill": False, "eager": True})
    assert verdicts(before, wrong) == {"fastdistill": "wrong"}
    assert verdicts(before, results(ms={"fastdistill": 10.0})) == {"eager": "gone"}
    peaks = results(peak_mb={"fastdistill": 60.5, "eager": 340.0})
    assert verdicts(before, peaks) == {"eager": "more memory"}


def test_other_cases_are_not_compared():
    found = list(compare.changes(results(), results(dtype="bf16")))
    assert {x.where.split()[1] for x in found} == {"4x5"}
    assert schema.key(results()["rows"][0]) == schema.key(results(repetitions=3)["rows"][0])
    assert schema.key(results()["rows"][0]) != schema.key(results(model="resnet")["rows"][0])


def test_the_command(tmp_path, capsys):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(json.dumps(results()))
    b.write_text(json.dumps(results(ms={"fastdistill": 12.0, "eager": 250.0})))
    assert command.main(["compare", str(a), str(a)]) == 0
    capsys.readouterr()
    assert command.main(["compare", str(a), str(b)]) == 1
    text = capsys.readouterr().out
    assert "slower      fastdistill         10 -> 12 ms x 1.20" in text
    assert text.splitlines()[-1].startswith("1 regressions in 2 cases; 0 figures disturbed")
    assert command.main(["compare", str(b), str(a)]) == 0
    assert command.main(["compare", str(a), str(b), "--contenders", "eager"]) == 1
    slower = results(ms={"fastdistill": 10.0, "eager": 250.0})
    b.write_text(json.dumps(slower))
    assert command.main(["compare", str(a), str(b)]) == 0  # a rival alone
    slower["environments"][0] = {**slower["environments"][0], "cpu": "y"}
    b.write_text(json.dumps(slower))
    capsys.readouterr()
    command.main(["compare", str(a), str(b)])
    assert "not the same cpu: x; then y" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"rows": []}, "rows: expected at least one"),
        ({"schema": 7}, "schema: expected 1, got 7"),
        ({"environments": [{}]}, "environments[0]: no torch"),
        ({"ms": {"fastdistill": 0.0, "eager": 1.0}}, "expected times above 0"),
        ({"threads": None}, "rows[0].threads: expected int, got None"),
        ({"right": {}}, "rows[0].right: expected ['eager', 'fastdistill'], got []"),
        ({"environment": 3}, "rows[0].environment: expected one of 1"),
    ],
)
def test_a_file_in_another_form_is_refused(change, complaint, tmp_path, capsys):
    found = copy.deepcopy(results())
    for name, value in change.items():
        (found if name in found else found["rows"][0])[name] = value
    path = tmp_path / "x.json"
    path.write_text(json.dumps(found))
    assert command.main(["compare", str(path), str(path)]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_committed_results_are_in_that_form(path):
    found = schema.load(path)
    keys = [schema.key(row) for row in found["rows"] if row["suite"] != "isa"]  # in turns
    assert len(set(keys)) == len(keys)  # a case is found again by its key
    assert not compare.regressions(list(compare.changes(found, found)))
