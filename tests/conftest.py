"""Fixtures of the whole suite."""

import contextlib
import sys
from pathlib import Path

import pytest
import torch

import fastdistill
from fastdistill import _native
from fastdistill.distill import speed
from fastdistill.hint import ops as hint_ops
from fastdistill.kd import ops as kd_ops
from fastdistill.privacy import ops as privacy_ops
from fastdistill.softmax import ops as softmax_ops

sys.path.append(str(Path(__file__).with_name("gpuless")))
import cuda_emulation as emulation


@pytest.fixture(scope="session")
def emulated_cuda():
    """The CUDA kernels, built for the host."""
    if emulation.missing() is not None:
        pytest.skip(emulation.missing())
    return emulation.load(emulation.build())


@pytest.fixture(params=["reference", "cpu"])
def host_backend(request):
    """Those that look at the values in tensors, as on a GPU nothing may."""
    if request.param == "cpu" and _native.cpu().module is None:
        pytest.skip(_native.cpu().reason)
    with fastdistill.backend(request.param):
        yield request.param


@pytest.fixture(params=["reference", "cpu", emulation.NAME])
def backend(request, monkeypatch):
    """Each backend that runs on the CPU, requested explicitly, and the CUDA kernels emulated.

    Those with the nearest exponentials, so that they meet the budget of every backend;
    gpuless/test_cuda_emulated.py has them err as much as a GPU may.
    """
    if request.param == "cpu" and _native.cpu().module is None:
        pytest.skip(_native.cpu().reason)
    with contextlib.ExitStack() as stack:
        if request.param == emulation.NAME:
            monkeypatch.setenv("CUEMU_EXACT_EXP2", "1")
            stack.enter_context(emulation.registered(request.getfixturevalue("emulated_cuda")))
        stack.enter_context(fastdistill.backend(request.param))
        yield request.param


@pytest.fixture
def cpu():
    """The compiled CPU backend, requested explicitly."""
    if _native.cpu().module is None:
        pytest.skip(_native.cpu().reason)
    with fastdistill.backend("cpu"):
        yield


@pytest.fixture
def one_thread():
    """For small tensors, where a second thread would only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def quick():
    """For jobs on tiny networks: one thread; the speed measured briefly, as none is judged."""
    patch = pytest.MonkeyPatch()
    patch.setattr(speed, "WARM_UP_S", 0.0)
    patch.setattr(speed, "MEASURE_S", 0.02)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield patch
    torch.set_num_threads(threads)
    patch.undo()


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Every output of an op starts as NaN: what a kernel does not write shows."""

    def poison(allocate):
        def poisoned(*args):
            outputs = allocate(*args)
            for x in outputs:
                x.fill_(float("nan"))
            return outputs

        return poisoned

    for ops in (hint_ops, kd_ops, privacy_ops, softmax_ops):
        for name in [n for n in vars(ops) if n.startswith("allocate")]:
            monkeypatch.setattr(ops, name, poison(getattr(ops, name)))


@pytest.fixture(autouse=True)
def seeded():
    """Each test draws the same numbers wherever it runs."""
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """The CUDA kernels take fewer element types than the others: those are skipped, visibly."""
    try:
        return (yield)
    except RuntimeError as error:
        if f"{emulation.NAME}: it takes " in str(error):
            pytest.skip("element types that the CUDA kernels refuse")
        raise


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """`make gpu` runs with the interpreter at hand: a file whose packages it lacks is skipped,
    visibly, as it would be for the want of a GPU. Elsewhere a missing package is an error.
    """
    report = yield
    if report.failed and collector.config.getoption("-m") == "gpu":
        cause = report.call.excinfo.value.__cause__
        name = getattr(cause, "name", None) if isinstance(cause, ModuleNotFoundError) else None
        ours = name is None or name.partition(".")[0] in ("fastdistill", "bench")
        if not ours and not Path(__file__).with_name(f"{name}.py").exists():
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), 1, f"Skipped: no package {name}")
    return report


def pytest_collection_modifyitems(config, items):
    """Skip, visibly, what this machine or this run does not have."""
    chosen = config.getoption("-m")
    for item in items:
        if "slow" in item.keywords and "slow" not in chosen:
            item.add_marker(pytest.mark.skip(reason="needs 16 GB of memory: pytest -m slow"))
        if "audit" in item.keywords and "audit" not in chosen:
            item.add_marker(pytest.mark.skip(reason="trains and audits: pytest -m audit"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
