"""The benchmark suite: what it writes, that it tells right from wrong, how it takes time."""

import contextlib
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from bench import (
    bars,
    cases,
    curves,
    errors,
    limits,
    peers,
    plots,
    report,
    run,
    schema,
    timing,
    worker,
)
from fastdistill import _native

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))

needs_kernels = pytest.mark.skipif(
    _native.cpu().module is None, reason=f"no CPU kernels: {_native.cpu().reason}"
)


def assert_schema(results):
    assert list(schema.problems(results)) == []
    for row in results["rows"]:
        assert row["pass"] in timing.PASSES
        for error in row["error"].values():
            assert set(error) == {"loss", "gradient"}


def spec(**changes):
    base = {
        "op": "kd",
        "suite": "main",
        "device": "cpu",
        "shapes": [[4, 33]],
        "dtypes": ["fp32"],
        "threads": [1],
        "allocator": "default",
        "contenders": None,
        "memory": False,
        "near": True,
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
        (dtype, kind) for dtype in ("fp32", "bf16") for kind in timing.PASSES
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
    assert len(wrong) == 2 and all("wrong" in line for line in wrong)
    assert report.wrong(results, "wrong") and not report.wrong(results, "fastdistill")


def test_bench_skips_compile_visibly(monkeypatch, same_threads):
    def no_compiler(*args, **kwargs):
        def call(*inputs):
            raise RuntimeError("no compiler here")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    found = worker.measure(spec(contenders=["eager", "compile"]))
    assert "compile" not in found["rows"][0]["ms"]
    assert found["rows"][0]["skipped"] == {
        "compile": "a C++ compiler, or Triton: RuntimeError: no compiler here"
    }
    assert "Triton: RuntimeError: no compiler here" in report.table(found)


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
        if row["pass"] == "both":  # five arrays for the three that were timed
            limit = row["limit"]
            least = min(limit["read_read_write"], limit["read_read_write_streamed"])
            assert limit["traffic"] == pytest.approx(least * 5 / 3)
            assert row["ms"]["limit"] == max(limit["traffic"], limit["exponentials"])


@needs_kernels
def test_bench_hint(same_threads):
    """Right next to torch's, with a regressor (its products are the limit) and without."""
    for shape in ([48, 32, 40], [48, 32]):
        about = spec(op="hint", shapes=[shape], contenders=["fastdistill", "eager", "wrong"])
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
    assert not errors.acceptable(found, 1e-4)


def test_bench_counts_nan_as_wrong():
    assert errors.acceptable({"loss": 0.0, "gradient": 1e-6}, 1e-4)
    assert not errors.acceptable({"loss": float("nan"), "gradient": 0.0}, 1e-4)


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
    x = cases.kd_inputs((100, 100), "fp32", "cpu")
    kd = cases.OPS["kd"].limit(x)
    pieces = {"read_read_write": 5.0, "read_read_write_streamed": 4.0, "exponentials": 3.0}
    named = {limits.PREFIX + name: ms for name, ms in pieces.items()}
    found = limits.combine(named, "cpu", kd, x)
    assert found["ms"] == 4.0
    assert found["gb_per_s"] == pytest.approx(3 * 4 * 100 * 100 / 4e-3 / 1e9)
    assert found["exponentials_per_ns"] == pytest.approx(2 * 100 * 100 / 3e6)
    named[limits.PREFIX + "exponentials"] = 7.0
    assert limits.combine(named, "cpu", kd, x)["ms"] == 7.0
    assert limits.combine(named, "cpu", cases.OPS["softmax"].limit(x), x)["traffic"] == 4 * 5 / 3
    assert limits.combine({}, "cpu", kd, x) is None


def test_bench_limit_of_products_has_a_rate():
    x = cases.hint_inputs((8, 6, 5), "fp32", "cpu")
    limit = cases.OPS["hint"].limit(x)
    shapes = [tuple(part.shape) for part in limit.products()]
    assert shapes == [(8, 5), (8, 6), (5, 6)]
    found = limits.combine({limits.PREFIX + "products": 2.0}, "cpu", limit, x)
    assert found["gflops"] == pytest.approx(3 * 2 * 8 * 6 * 5 / 2e-3 / 1e9)


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


def test_bench_bars_of_softmax():
    many, few, other = (
        row(shape, fastdistill=10.0, eager=19.0) | {"op": "softmax"}
        for shape in ([512, 32000], [8192, 100], [2048, 1024])
    )
    few["ms"]["eager"] = 20.0
    halves = few | {"dtype": "bf16"}
    lines = [line for line in bars.lines({"rows": [many, few, other, halves]}) if "softmax" in line]
    assert [line.split()[1] for line in lines] == ["512x32000,", "8192x100,"]
    assert [line.split(maxsplit=8)[-1] for line in lines] == ["1.90  short", "2.00  PASS"]


@needs_kernels
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_bench_shows_who_is_wrong_near(dtype, same_threads):
    """Where the teacher is the student and a little noise, only a sum of terms >= 0 is right."""
    (row, *_) = worker.measure(
        spec(shapes=[[64, 1000]], dtypes=[dtype], contenders=["fastdistill", "eager"])
    )["rows"]
    assert row["right"] == {"fastdistill": True, "eager": True}
    assert row["near_right"]["fastdistill"]
    assert row["near"]["eager"]["loss"] > 100 * row["near"]["fastdistill"]["loss"]
    if dtype == "bf16":
        assert not row["near_right"]["eager"]
        text = report.table({"rows": worker_rows(row)})
        assert "WRONG where student and teacher are nearly alike" in text
    assert not report.wrong({"rows": [row]}, "fastdistill")


def worker_rows(row):
    return [{**row, "pass": kind} for kind in timing.PASSES]


@needs_kernels
def test_bench_linear(same_threads):
    found = worker.measure(
        spec(op="linear_kd", shapes=[[16, 8, 40]], contenders=["fastdistill", "eager"], near=False)
    )
    for row in found["rows"]:
        assert row["right"] == {"fastdistill": True, "eager": True}
    assert found["rows"][2]["limit"]["gflops"] > 0


@needs_kernels
@pytest.mark.parametrize("op, shape", [("causal_kd", [2, 5, 30]), ("teachers", [4, 30, 3])])
def test_bench_ops_of_the_curves(op, shape, same_threads):
    about = [{"axis": "x", "at": 5}]
    contenders = ["fastdistill", "eager"]
    found = worker.measure(spec(op=op, shapes=[shape], contenders=contenders, about=about))
    for row in found["rows"]:
        assert row["right"] == {"fastdistill": True, "eager": True}
        assert (row["axis"], row["at"]) == ("x", 5)
    assert (
        list(
            schema.problems(
                {
                    "schema": 1,
                    "environments": [found["environment"]],
                    "rows": [{**r, "environment": 0} for r in found["rows"]],
                }
            )
        )
        == []
    )


def test_bench_peers_that_are_absent_say_so(monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda name: False)
    found = {**peers.kd_contenders("cpu"), **peers.linear_contenders()}
    assert len(found) == 6
    assert all("is not installed (extra: peers)" in c.unavailable for c in found.values())


def test_bench_a_broken_peer_is_skipped_visibly(monkeypatch, same_threads):
    monkeypatch.setitem(sys.modules, "torchdistill", types.ModuleType("torchdistill"))
    monkeypatch.setattr(peers, "installed", lambda name: True)
    peers._torchdistill.cache_clear()
    found = worker.measure(spec(contenders=["eager", "torchdistill", "liger_kl"]))["rows"][0]
    assert found["skipped"]["torchdistill"].startswith("torchdistill: ModuleNotFoundError")
    assert found["skipped"]["liger_kl"] == "its Triton kernels need a GPU"
    assert set(found["ms"]) == {"eager"}


@pytest.mark.parametrize("name", [*peers.OF_LOGITS, "liger_chunked"])
def test_bench_peers_compute_what_they_are_held_to(name):
    """And are right in float32 where student and teacher are far apart."""
    op = cases.OPS["linear_kd" if name == "liger_chunked" else "kd"]
    contender = op.contenders("cpu", "fp32")[name]
    if contender.unavailable:
        pytest.skip(contender.unavailable)
    x = op.inputs((8, 6, 50) if op is cases.OPS["linear_kd"] else (6, 50), "fp32", "cpu")
    (error,) = errors.of_all(op, {name: contender}, x).values()
    assert errors.acceptable(error, 1e-5), error
    if op.near:
        (near,) = errors.of_near(op, {name: contender}, x).values()
        assert near["gradient"] < 0.1  # it is held to its own scale there too


def settings(**changes):
    base = run.Settings(
        op="kd", device="cpu", shapes=cases.OPS["kd"].shapes, dtypes=["fp32", "bf16"],
        threads=[2, 1], allocators=None, contenders=None, quick=False,
    )  # fmt: skip
    return base._replace(**changes)


def test_bench_plan_covers_what_it_should():
    plan = [spec for spec, _ in run.SUITES["grid"](settings())]
    seen = {(dtype, *shape) for s in plan for dtype in s["dtypes"] for shape in s["shapes"]}
    left_out = [line for s in plan for line in s["left_out"]]
    wanted = len(run.GRID_CLASSES) * len(run.GRID_ROWS) * len(cases.DTYPES)
    assert len(seen) + len(left_out) == wanted and len(seen) > wanted / 2
    assert all("GB are allowed (--memory-gb)" in line for line in left_out)
    assert {x[0] for x in seen} == {"fp32", "bf16", "fp16"} and {
        s["threads"] == [2, 1] for s in plan
    }
    assert max(x[1] * x[2] for x in seen if x[0] == "fp32") * run.GRID_ARRAYS * 4 <= 1e9
    more = [spec for spec, _ in run.SUITES["grid"](settings(memory_gb=200.0))]
    assert not any(s["left_out"] for s in more)

    main = list(run.SUITES["main"](settings()))
    assert {v["THP_MEM_ALLOC_ENABLE"] for _, v in main} == {"0", "1"}
    assert len(main) == 2 * len(cases.OPS["kd"].shapes) and all(s["memory"] for s, _ in main)
    assert any(s["near"] for s, _ in main)
    (beside,) = [spec for spec, _ in run.SUITES["peers"](settings())]
    assert set(peers.OF_LOGITS) < set(beside["contenders"]) and beside["near"]
    axes = [a["axis"] for s, _ in run.SUITES["curves"](settings()) for a in s["about"]]
    assert set(axes) == {
        "rows", "vocabulary", "hidden size", "batch", "sequence length", "teachers"
    }  # fmt: skip
    assert all(s["memory"] and s["op"] in curves.EVERY for s, _ in run.SUITES["curves"](settings()))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_bench_committed_results(path, tmp_path):
    results = schema.load(path)
    assert not report.wrong(results, *{n for row in results["rows"] for n in row["ms"]
                                       if schema.is_ours(n)})  # fmt: skip
    pytest.importorskip("matplotlib")
    few = {**results, "rows": [r for r in results["rows"] if r["dtype"] == "fp32"]}
    pictures = plots.draw(few, tmp_path)
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
    found = limits.combine(pieces, "cuda", cases.OPS["kd"].limit(x), x)
    assert found["ms"] == pytest.approx(1.0)


def test_bench_replays_a_step_as_a_graph(monkeypatch):
    """The code that needs a GPU: a capture holds one forward and backward, and only it is timed."""
    calls, captured = [], []

    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        def replay(self):
            calls.append("replay")

    @contextlib.contextmanager
    def capture(graph):
        before = len(calls)
        yield
        captured.append(len(calls) - before)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(timing.CudaSteps, "__init__", lambda self: None)
    steps = timing.CudaSteps()
    steps.call = lambda work: lambda: work() or {"both": 0.25}
    x = cases.kd_inputs((4, 33), "fp32", "cpu")
    contender = cases.Contender(lambda x: calls.append("loss") or x.student.sum())
    step = steps.replay(contender, x)
    assert calls == ["loss"] * 4 and captured == [1] and x.student.grad is None
    assert step() == {timing.REPLAY: 0.25} and calls[-1] == "replay"

    def refused(graph):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", refused)
    text = worker._replay(steps, contender, x)
    assert text == "RuntimeError: operation not permitted when stream is capturing"


def test_bench_prints_the_model_beside_the_figure():
    both = {
        **row([512, 32000], triton=0.04, limit=0.03), "device": "cuda", "repetitions": 9,
        "dropped": 0, "error": {"triton": {"loss": 1e-8, "gradient": 1e-8}},
        "right": {"triton": True}, "gb_per_s": {"triton": 1.0}, "peak_mb": {"triton": 1.0},
        "limit": {"ms": 0.03}, "skipped": {}, "noisy": [],
        "modelled": {"gpu": "H100", "kernel": "k", "ms": 0.02, "bound": "memory", "least_ms": 0.01,
                     "measured_over_modelled": {"triton": 2.0}},
    }  # fmt: skip
    rows = [{**both, "pass": kind} for kind in (*timing.PASSES, timing.REPLAY)]
    text = report.table({"rows": rows})
    assert (
        "0.020  (k on H100, bound by memory; any implementation 0.010; measured: triton x 2.00)"
        in text
    )
    assert "triton, as a graph" in text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_bench_on_a_gpu():
    contenders = ["triton", "cuda", "eager", "cross_entropy_alone"]
    found = worker.measure(spec(device="cuda", shapes=[[64, 1000]], contenders=contenders))
    both = next(row for row in found["rows"] if row["pass"] == "both")
    assert set(both["ms"]) | set(both["skipped"]) == {*contenders, "limit"}
    assert all(both["right"].values())
    assert both["limit"]["ms"] > 0
    (replay,) = [row for row in found["rows"] if row["pass"] == "replay"]
    assert {"triton", "eager"} <= set(replay["ms"])
