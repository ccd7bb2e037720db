"""Fixtures of the whole suite."""

import pytest
import torch

import fastdistill
from fastdistill import _native
from fastdistill.hint import ops as hint_ops
from fastdistill.kd import ops


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

    for module, name in (
        (ops, "allocate"),
        (hint_ops, "allocate"),
        (hint_ops, "allocate_gradients"),
    ):
        monkeypatch.setattr(module, name, poisoned(getattr(module, name)))


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
