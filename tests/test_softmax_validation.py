"""temperature_softmax: what is refused, and in which words: argument, expected, what came."""

import numpy as np
import pytest
import torch

import fastdistill as fd

X = torch.zeros(4, 6)
FUNCTIONS = (fd.temperature_softmax, fd.temperature_log_softmax)


def rows(*values):
    return torch.tensor(values)


REFUSED = [
    (dict(x=[1.0]), TypeError, "x: expected a torch.Tensor, got list"),
    (dict(x=X.long()), TypeError, "x: expected dtype float32"),
    (dict(x=X.to_sparse()), TypeError, "x: .*torch.sparse_coo"),
    (dict(x=torch.tensor(1.0)), ValueError, "x: expected at least 1 dimension"),
    (dict(x=X[:, :0]), ValueError, r"x: expected at least one class .* -1, got shape \[4, 0\]"),
    (dict(x=X[:0], dim=0), ValueError, r"x: .* dimension 0, got shape \[0, 6\]"),
    (dict(temperature=0.0), ValueError, "temperature: expected a number > 0, got 0.0"),
    (dict(temperature=-2), ValueError, "temperature: expected a number > 0, got -2.0"),
    (dict(temperature=float("nan")), ValueError, "temperature: expected a finite number, got nan"),
    (dict(temperature=float("inf")), ValueError, "temperature: expected a finite number, got inf"),
    (dict(temperature="2"), TypeError, "temperature: expected a number, got str"),
    (dict(temperature=True), TypeError, "temperature: expected a number, got bool"),
    (dict(temperature=[2.0] * 4), TypeError, "temperature: expected a number, got list"),
    (dict(temperature=torch.tensor(2.0)), ValueError, r"temperature: .*\[4\] .*got \[\]; nothing"),
    (dict(temperature=torch.ones(6)), ValueError, r"temperature: expected shape \[4\] .*\[6\]"),
    (dict(temperature=torch.ones(4, 1)), ValueError, r"got \[4, 1\]; nothing is broadcast"),
    (dict(temperature=torch.ones(4), dim=0), ValueError, r"temperature: expected shape \[6\]"),
    (dict(temperature=torch.ones(4).long()), TypeError, "temperature: expected dtype float32"),
    (dict(temperature=torch.ones(4).to("meta")), ValueError, "temperature: expected device cpu"),
    (dict(temperature=rows(1.0, 0.0, 1.0, 1.0)), ValueError, "temperature: .*finite .*> 0, got 0"),
    (dict(temperature=rows(1.0, 1.0, -3.0, 1.0)), ValueError, "temperature: .* got -3.0"),
    (dict(temperature=rows(1.0, 1.0, 1.0, np.inf)), ValueError, "temperature: .* got inf"),
    (dict(temperature=rows(np.nan, 1.0, 1.0, 1.0)), ValueError, "temperature: .* got nan"),
    (dict(dim=2), ValueError, r"dim: expected a value in \[-2, 1\], got 2"),
    (dict(dim=1.0), TypeError, "dim: expected an int, got float"),
    (dict(dim=None), TypeError, "dim: expected an int, got NoneType"),
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("case", REFUSED, ids=lambda c: next(iter(c[0])))
def test_softmax_refuses(host_backend, case, function):
    arguments, kind, words = case
    with pytest.raises(kind, match=words):
        function(**{"x": X, **arguments})


def test_softmax_accepts_numbers_of_numpy_and_python(backend):
    x = torch.arange(6.0)
    want = fd.temperature_softmax(x, 2.0)
    assert torch.equal(fd.temperature_softmax(x, np.float32(2)), want)
    assert torch.equal(fd.temperature_softmax(x, temperature=2, dim=0), want)


def test_softmax_explicit_backends_that_cannot_run_say_why():
    for name, function in zip(("cuda", "triton"), FUNCTIONS, strict=True):
        with fd.backend(name), pytest.raises(RuntimeError, match="not on cpu") as caught:
            function(X)
        assert f"{function.__name__}: backend {name!r} cannot run" in str(caught.value)
        assert "these can: " in str(caught.value)


@pytest.mark.parametrize("temperature", [1e-45, 1e-300, 1e37, 1e300])
def test_softmax_temperatures_that_float32_cannot_divide_by(host_backend, temperature):
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"temperature: expected a number from 1e-36 to 1e\+36"):
        fd.temperature_softmax(x, temperature)
    of_rows = torch.full((3,), temperature, dtype=torch.float64)
    with pytest.raises(ValueError, match="temperature: expected finite values > 0.* 1e-36 to 1e"):
        fd.temperature_log_softmax(x, of_rows)
