"""Fixtures of the whole suite."""

import pytest
import torch

import fastdistill
from fastdistill import _native
from fastdistill.kd import ops as kd_ops
from fastdistill.privacy import ops as privacy_ops


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Each backend that runs on the CPU, requested explicitly."""
    if request.param == "cpu" and _native.cpu().module is None:
        pytest.skip(_native.cpu().reason)
    with fastdistill.backend(request.param):
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


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Every output of an op starts as NaN: what a kernel does not write shows."""

    def poisoned(allocate):
        def allocate_poisoned(*args):
            outputs = allocate(*args)
            for x in outputs:
                x.fill_(float("nan"))
            return outputs

        return allocate_poisoned

    for ops in (kd_ops, privacy_ops):
        monkeypatch.setattr(ops, "allocate", poisoned(ops.allocate))


@pytest.fixture(autouse=True)
def seeded():
    """Each test draws the same numbers wherever it runs."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(config, items):
    """Skip, visibly, what this machine or this run does not have."""
    chosen = config.getoption("-m")
    for item in items:
        if "slow" in item.keywords and "slow" not in chosen:
            item.add_marker(pytest.mark.skip(reason="needs 16 GB of memory: pytest -m slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
