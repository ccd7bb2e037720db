"""clip_and_noise: what is refused, and in which words."""

import math

import numpy as np
import pytest
import torch

import fastdistill as fd

X = torch.ones(4, 6)

REFUSED = [
    (dict(grad_samples=X), TypeError, r"grad_samples: expected a list of tensors .*got Tensor"),
    (dict(grad_samples=None), TypeError, "grad_samples: expected a list .*got NoneType"),
    (dict(grad_samples=[]), ValueError, "grad_samples: expected at least one tensor"),
    (dict(grad_samples=[X, 1.0]), TypeError, r"grad_samples\[1\]: expected a torch.Tensor, got"),
    (dict(grad_samples=[X.long()]), TypeError, r"grad_samples\[0\]: expected dtype float32"),
    (dict(grad_samples=[X.to_sparse()]), TypeError, r"grad_samples\[0\]: .*torch.sparse_coo"),
    (dict(grad_samples=[X.sum()]), ValueError, r"grad_samples\[0\]: expected a shape \[B, ...\]"),
    (
        dict(grad_samples=[X, X[:3]]), ValueError,
        r"grad_samples\[1\]: expected 4 samples .*got 3 in shape \[3, 6\]",
    ),
    (dict(grad_samples=[X, X.to("meta")]), ValueError, r"grad_samples\[1\]: expected device cpu"),
    (
        dict(grad_samples=[torch.zeros(1, 1).expand((1 << 20) + 1, 1)]), ValueError,
        "grad_samples: expected at most 1048576 samples, got 1048577",
    ),
    (
        dict(grad_samples=[torch.zeros(1, 1).expand(1, 1 << 37)]), ValueError,
        "grad_samples: expected at most .* coordinates",
    ),
    (dict(max_norm=0.0), ValueError, "max_norm: expected a number > 0, got 0.0"),
    (dict(max_norm=-1), ValueError, "max_norm: expected a number > 0, got -1.0"),
    (dict(max_norm=math.inf), ValueError, "max_norm: expected a finite number, got inf"),
    (dict(max_norm=math.nan), ValueError, "max_norm: expected a finite number, got nan"),
    (dict(max_norm=1e30), ValueError, r"max_norm: expected a number from 2\^-64 to 2\^64"),
    (dict(max_norm=1e-30), ValueError, r"max_norm: expected a number from 2\^-64 to 2\^64"),
    (dict(max_norm="1"), TypeError, "max_norm: expected a number, got str"),
    (dict(max_norm=True), TypeError, "max_norm: expected a number, got bool"),
    (dict(max_norm=[1.0]), TypeError, "max_norm: expected a number, got list"),
    (dict(noise_multiplier=-0.1), ValueError, "noise_multiplier: expected a number >= 0, got -0.1"),
    (dict(noise_multiplier=math.nan), ValueError, "noise_multiplier: expected a finite number"),
    (dict(noise_multiplier=None), TypeError, "noise_multiplier: expected a number, got NoneType"),
    (dict(noise_multiplier=1e12), ValueError, "noise_multiplier: expected at most 2.8.* 6 coord"),
    (dict(expected_batch_size=0), ValueError, "expected_batch_size: expected a number > 0, got 0"),
    (dict(expected_batch_size=-4), ValueError, "expected_batch_size: expected a number > 0"),
    (dict(expected_batch_size=math.inf), ValueError, "expected_batch_size: expected a finite numb"),
    (dict(expected_batch_size=X), TypeError, "expected_batch_size: expected a number, got Tensor"),
    (dict(generator=0), TypeError, "generator: expected a torch.Generator or None, got int"),
    (dict(generator=np.random), TypeError, "generator: expected a torch.Generator or None"),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=lambda c: next(iter(c[0])))
def test_privacy_refuses(backend, case):
    arguments, kind, words = case
    good = dict(grad_samples=[X], max_norm=1.0, noise_multiplier=1.0, expected_batch_size=4)
    with pytest.raises(kind, match=words):
        fd.privacy.clip_and_noise(**{**good, **arguments})


def test_privacy_the_expected_batch_size_has_no_default():
    with pytest.raises(TypeError, match="expected_batch_size"):
        fd.privacy.clip_and_noise([X], 1.0, 1.0)
    with pytest.raises(TypeError, match="positional"):
        fd.privacy.clip_and_noise([X], 1.0, 1.0, 4)


def test_privacy_accepts_numbers_of_numpy_and_python(backend):
    want = fd.privacy.clip_and_noise([X], 1.0, 0.0, expected_batch_size=4)[0]
    got = fd.privacy.clip_and_noise((X,), 1, np.float32(0), expected_batch_size=np.float64(4))[0]
    assert torch.equal(got, want)


def test_privacy_a_refused_call_draws_nothing():
    g = torch.Generator().manual_seed(1)
    state = g.get_state()
    with pytest.raises(ValueError):
        fd.privacy.clip_and_noise([X], 0.0, 1.0, expected_batch_size=1, generator=g)
    assert torch.equal(g.get_state(), state)


def test_privacy_backends_that_cannot_run_say_why():
    for name in ("cuda", "triton"):
        with fd.backend(name), pytest.raises(RuntimeError, match="clip_and_noise"):
            fd.privacy.clip_and_noise([X], 1.0, 1.0, expected_batch_size=1)


def test_privacy_transforms_are_refused(backend):
    def release(x):
        return fd.privacy.clip_and_noise([x], 1.0, 0.0, expected_batch_size=1)[0]

    for transform in (torch.func.vmap(release), torch.func.jacrev(release)):
        with pytest.raises(RuntimeError, match="outside the transform"):
            transform(torch.ones(2, 3, 4))


@pytest.mark.filterwarnings("ignore:Dynamo does not know")
def test_privacy_a_compiled_graph_is_refused():
    """Its noise would be a constant of the graph: the same in every step."""

    def release(x):
        return fd.privacy.clip_and_noise([x], 1.0, 1.0, expected_batch_size=1)[0] * 2

    with pytest.raises(Exception, match="torch.compile"):
        torch.compile(release, fullgraph=True, backend="eager")(X)
    torch._dynamo.reset()
    broken = torch.compile(release, backend="eager")  # a graph break: it runs outside the graph
    assert not torch.equal(broken(X), broken(X))
    torch._dynamo.reset()
