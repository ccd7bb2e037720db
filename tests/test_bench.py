"""The benchmark suite: what it writes, that it tells right from wrong, how it takes time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import bars, cases, errors, limits, plots, report, timing, worker
from fastdistill import _native

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))

ROW = {
    "op": str,
    "suite": str,
    "shape": list,
    "dtype": str,
    "threads": int,
    "device": str,
    "allocator": str,
    "pass": str,
    "ms": dict,
    "iqr_ms": dict,
    "repetitions": int,
    "dropped": int,
    "disturbed": bool,
    "gb_per_s": dict,
    "error": dict,
    "right": dict,
    "peak_mb": dict,
    "skipped": dict,
    "noisy": list,
    "environment": int,
}
ENVIRONMENT = ("torch", "cpu", "isa", "threads", "allocator", "date", "commit", "load_average")

needs_kernels = pytest.mark.skipif(
    _native.cpu().module is None, reason=f"no CPU kernels: {_native.cpu().reason}"
)


def assert_schema(results):
    assert results["schema"] == 1 and results["rows"]
    for environment in results["environments"]:
        assert set(ENVIRONMENT) <= set(environment)
    for row in results["rows"]:
        for key, kind in ROW.items():
            assert isinstance(row[key], kind), f"{key}: expected {kind}, got {row[key]!r}"
        assert row["pass"] in timing.PASSES
        assert 0 <= row["environment"] < len(results["environments"])
        assert set(row["ms"]) - {"limit"} == set(row["error"]) == set(row["right"])
        assert all(ms > 0 for ms in row["ms"].values())
        for error in row["error"].values():
            assert set(error) == {"loss", "gradient"}


def spec(**changes):
    base = {
        "op": "kd",
        "suite": "main",
        "device": "cpu",
        "shape": [4, 33],
        "dtypes": ["fp32"],
        "threads": [1],
        "allocator": "default",
        "contenders": None,
        "memory": False,
        "seconds": 0.01,
        "least": 2,
        "most": 3,
    }
    return {**base, **changes}


@pytest.fixture
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@needs_kernels
def test_bench_end_to_end(tmp_path):
    target = tmp_path / "rows.json"
    command = [sys.executable, "-m", "bench", "kd", "--quick", "--shapes", "24x64"]
    command += ["--contenders", "fastdistill,eager,wrong", "--json", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(target.read_text())
    assert_schema(results)
    assert {(row["dtype"], row["pass"]) for row in results["rows"]} == {
        (dtype, kind) for dtype in cases.DTYPES for kind in timing.PASSES
    }
    for row in results["rows"]:
        rounding = torch.finfo(cases.DTYPES[row["dtype"]]).eps
        assert row["error"]["fastdistill"]["loss"] < 1e-6
        assert row["error"]["fastdistill"]["gradient"] < rounding
        assert row["right"] == {"fastdistill": True, "eager": True, "wrong": False}
        if row["pass"] == "both":
            limit = row["limit"]
            assert row["ms"]["limit"] == max(limit["traffic"], limit["exponentials"])
        if sys.platform == "linux":
            assert row["peak_mb"]["fastdistill"] is not None
    wrong = [line for line in done.stdout.splitlines() if line.endswith("WRONG")]
    assert len(wrong) == len(cases.DTYPES) and all("wrong" in line for line in wrong)
    assert report.wrong(results, "wrong") and not report.wrong(results, "fastdistill")


def test_bench_skips_compile_visibly(monkeypatch, same_threads):
    def no_compiler(*args, **kwargs):
        def call(*inputs):
            raise RuntimeError("no compiler here")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    found = worker.measure(spec(contenders=["eager", "compile"]))
    assert "compile" not in found["rows"][0]["ms"]
    assert found["rows"][0]["skipped"] == {"compile": "RuntimeError: no compiler here"}
    assert "skipped: RuntimeError: no compiler here" in report.table(found)


def test_bench_truth_is_the_formula():
    x = cases.kd_inputs((5, 11), "fp32", "cpu")
    pieces = list(cases.kd_truth(x, 0.5, 0.5, elements=22))
    assert [piece[:2] for piece in pieces] == [(0, 2), (2, 4), (4, 5)]
    student = x.student.detach().double().requires_grad_()
    want = cases.kd_eager(student, x.teacher.double(), x.labels)
    want.backward()
    torch.testing.assert_close(sum(piece[2] for piece in pieces), want.detach())
    torch.testing.assert_close(torch.cat([piece[3][0] for piece in pieces]), student.grad)


@needs_kernels
def test_bench_softmax(same_threads):
    """Right next to torch's, and without the temperature wrong."""
    found = worker.measure(spec(op="softmax", contenders=["fastdistill", "eager", "wrong"]))
    for row in found["rows"]:
        assert row["right"] == {"fastdistill": True, "eager": True, "wrong": False}
        assert row["limit"] is None


@needs_kernels
def test_bench_hint(same_threads):
    """Right next to torch's, with a regressor (its products are the limit) and without."""
    for shape in ([48, 32, 40], [48, 32]):
        about = spec(op="hint", shape=shape, contenders=["fastdistill", "eager", "wrong"])
        for row in worker.measure(about)["rows"]:
            assert row["right"] == {"fastdistill": True, "eager": True, "wrong": False}
            if row["pass"] == "both":
                assert set(row["limit"]) >= ({"ms", "products"} if shape[2:] else {"traffic"})


def test_bench_sees_a_wrong_gradient_of_the_weight_alone():
    x = cases.hint_inputs((8, 6, 5), "fp32", "cpu")

    def wrong(x):
        loss = cases.hint_eager(x.student, x.teacher, *x.weights)
        return loss + (x.weights[0] - x.weights[0].detach()).sum()  # adds 0, and 1 to dW

    (found,) = errors.of_all(cases.OPS["hint"], {"wrong": cases.Contender(wrong)}, x).values()
    assert found["loss"] < 1e-6
    assert not errors.acceptable(found, "fp32")


def test_bench_counts_nan_as_wrong():
    assert errors.acceptable({"loss": 0.0, "gradient": 1e-6}, "fp32")
    assert not errors.acceptable({"loss": float("nan"), "gradient": 0.0}, "fp32")


def test_bench_takes_turns_and_medians():
    order = []
    steps = {
        name: lambda name=name: order.append(name) or {"both": float(len(order))} for name in "abc"
    }
    turns = timing.in_turn(steps, seconds=0, least=4, most=4)
    assert "".join(order) == "aabbcc" * (len(order) // 6)
    assert turns.samples["a"]["both"][0] == 8.0  # the first round is warm-up, so is the first step
    assert turns.kept >= 4 and len(turns.samples["a"]["both"]) == turns.kept
    found = timing.summary([0.001, 0.002, 0.003, 0.004, 1.0])
    assert found["median"] == pytest.approx(3) and found["iqr"] == pytest.approx(2)


def test_bench_drops_rounds_by_the_others_alone(monkeypatch):
    shares = iter([0.5, 0.0, 0.5, 0.0])

    class Others:
        def share(self):
            return next(shares)

    monkeypatch.setattr(timing, "Others", Others)
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 0.0)
    monkeypatch.setattr(timing, "PATIENCE", 1e9)
    count = iter(range(100))
    turns = timing.in_turn({"a": lambda: {"both": next(count)}}, seconds=0, least=2, most=2)
    assert turns.samples["a"]["both"] == [5, 9]  # 0, 1 warm up; 2, 3 and 6, 7 were disturbed
    assert (turns.kept, turns.dropped, turns.others) == (2, 2, 0.0)


def test_bench_limit_is_the_larger_of_its_parts():
    pieces = {"read_read_write": 5.0, "read_read_write_streamed": 4.0, "exponentials": 3.0}
    named = {limits.PREFIX + name: ms for name, ms in pieces.items()}
    assert limits.combine(named, "cpu")["ms"] == 4.0
    named[limits.PREFIX + "exponentials"] = 7.0
    assert limits.combine(named, "cpu")["ms"] == 7.0
    assert limits.combine({}, "cpu") is None


def row(shape, threads=2, allocator="default", **ms):
    return {
        "op": "kd",
        "suite": "main",
        "device": "cpu",
        "pass": "both",
        "shape": shape,
        "dtype": "fp32",
        "threads": threads,
        "allocator": allocator,
        "isa": "avx512",
        "disturbed": False,
        "ms": ms,
        "iqr_ms": dict.fromkeys(ms, 0.0),
    }


def test_bench_bars_say_pass_short_and_not_measured():
    rows = [row([512, 32000], fastdistill=10.0, eager=250.0, compile=60.0, limit=7.0)]
    lines = {line[:58].strip(): line for line in bars.lines({"rows": rows})}
    assert lines["512x32000, 2 threads, default: x eager"].endswith("25.00  PASS")
    assert lines["512x32000, 2 threads, default: x compile"].endswith("6.00  short")
    assert lines["512x32000, 2 threads, default: of the limit"].endswith("1.43  PASS")
    assert lines["512x32000, 2 threads, thp: x eager"].endswith("not measured")
    rows[0]["iqr_ms"]["eager"] = 100.0
    assert any(line.endswith("25.00  PASS, wide spread") for line in bars.lines({"rows": rows}))
    rows[0]["disturbed"] = True
    assert any(line.endswith("25.00  PASS, disturbed") for line in bars.lines({"rows": rows}))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_bench_committed_results(path, tmp_path):
    results = json.loads(path.read_text())
    assert_schema(results)
    assert not report.wrong(results, "fastdistill", "triton", "cuda")
    assert len(bars.lines(results)) > 1
    pytest.importorskip("matplotlib")
    pictures = plots.draw(results, tmp_path)
    assert pictures and all(picture.stat().st_size > 10_000 for picture in pictures)


def test_bench_times_a_gpu_with_events(monkeypatch):
    """The code that needs a GPU, run with events that tick once each time they are recorded."""
    ticks = iter(range(100))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(ticks)

        def synchronize(self):
            assert self.at is not None

        def elapsed_time(self, end):
            return end.at - self.at

    slept = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(timing.CudaSteps, "__init__", lambda self: None)
    steps = timing.CudaSteps()
    steps.flush = torch.ones(4)
    x = cases.kd_inputs((4, 33), "fp32", "cpu")
    found = cases.kd_contenders("cuda", "fp32")
    assert list(found)[:2] == ["triton", "cuda"]
    sample = steps.step(found["eager"], x)()
    assert sample == pytest.approx({"forward": 1e-3, "backward": 1e-3, "both": 2e-3})
    assert slept and not steps.flush.any()
    pieces = {name: step()["both"] * 1e3 for name, step in limits.cuda_steps(x, steps).items()}
    assert limits.combine(pieces, "cuda")["ms"] == pytest.approx(1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_bench_on_a_gpu():
    contenders = ["triton", "cuda", "eager", "cross_entropy_alone"]
    found = worker.measure(spec(device="cuda", shape=[64, 1000], contenders=contenders))
    both = next(row for row in found["rows"] if row["pass"] == "both")
    assert set(both["ms"]) | set(both["skipped"]) == {*contenders, "limit"}
    assert all(both["right"].values())
    assert both["limit"]["ms"] > 0
