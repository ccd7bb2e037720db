"""kd_loss: what is refused, and in which words: the argument, what was expected, what came."""

import numpy as np
import pytest
import torch

import fastdistill as fd

S, T = torch.zeros(4, 6), torch.zeros(4, 6)
Y = torch.zeros(4, dtype=torch.int64)


def labels(*values):
    return torch.tensor(values)


REFUSED = [
    (dict(student_logits=[1.0]), TypeError, "student_logits: expected a torch.Tensor, got list"),
    (dict(teacher_logits=None), TypeError, "teacher_logits: expected a torch.Tensor, got NoneType"),
    (dict(student_logits=S.long()), TypeError, "student_logits: expected dtype float32"),
    (dict(teacher_logits=T.cfloat()), TypeError, "teacher_logits: .* got torch.complex64"),
    (dict(student_logits=S.to_sparse()), TypeError, "student_logits: .*torch.sparse_coo"),
    (dict(teacher_logits=T[:3]), ValueError, r"teacher_logits: expected shape \[4, 6\].*\[3, 6\]"),
    (dict(teacher_logits=T[:, :1]), ValueError, r"\[4, 1\]; nothing is broadcast"),
    (dict(teacher_logits=T.to("meta")), ValueError, "teacher_logits: expected device cpu.*meta"),
    (
        dict(student_logits=torch.tensor(1.0), teacher_logits=torch.tensor(1.0)),
        ValueError, "student_logits: expected at least 1 dimension",
    ),
    (
        dict(student_logits=S[:, :0], teacher_logits=T[:, :0]),
        ValueError, r"student_logits: expected at least one class, got shape \[4, 0\]",
    ),
    (dict(temperature=0.0), ValueError, "temperature: expected a number > 0, got 0.0"),
    (dict(temperature=-1), ValueError, "temperature: expected a number > 0, got -1.0"),
    (dict(temperature=float("inf")), ValueError, "temperature: expected a finite number, got inf"),
    (dict(temperature=float("nan")), ValueError, "temperature: expected a finite number, got nan"),
    (dict(temperature="2"), TypeError, "temperature: expected a number, got str"),
    (dict(temperature=True), TypeError, "temperature: expected a number, got bool"),
    (dict(hard_weight=float("nan")), ValueError, "hard_weight: expected a finite number, got nan"),
    (dict(soft_weight=float("inf")), ValueError, "soft_weight: expected a finite number, got inf"),
    (dict(hard_weight=0.5), ValueError, "labels: expected a tensor with hard_weight=0.5, got None"),
    (dict(labels=S, hard_weight=1.0), TypeError, "labels: .*float32; for class probabilities"),
    (dict(labels=S[:, 0]), TypeError, "labels: expected class indices of dtype int64"),
    (dict(labels=Y.int()), TypeError, "labels: .*int64, got torch.int32"),
    (dict(labels=Y[:3]), ValueError, r"labels: expected shape \[4\].*got \[3\]"),
    (dict(labels=[0, 1, 2, 3]), TypeError, "labels: expected a torch.Tensor, got list"),
    (dict(labels=labels(0, 6, 0, 0)), ValueError, r"labels: .*\[0, 5\] or ignore_index=-100, .*6"),
    (dict(labels=labels(0, 0, -1, 0)), ValueError, "labels: .* got -1"),
    (dict(labels=labels(0, 0, -100, 0), ignore_index=-1), ValueError, "ignore_index=-1, got -100"),
    (dict(mask=torch.ones(4)), TypeError, "mask: expected dtype torch.bool.*torch.float32"),
    (dict(mask=torch.ones(6, dtype=torch.bool)), ValueError, r"mask: expected shape \[4\]"),
    (dict(mask=True), TypeError, "mask: expected a torch.Tensor, got bool"),
    (dict(row_weight=torch.ones(4, 1)), ValueError, r"row_weight: expected shape \[4\]"),
    (dict(row_weight=torch.ones(4).long()), TypeError, "row_weight: expected dtype float32"),
    (dict(row_weight=-torch.ones(4)), ValueError, "row_weight: .*>= 0, got -1.0"),
    (dict(row_weight=torch.ones(4) * float("nan")), ValueError, "row_weight: .* got nan"),
    (dict(row_weight=torch.ones(4) * float("inf")), ValueError, "row_weight: .* got inf"),
    (dict(ignore_index=1.5), TypeError, "ignore_index: expected an int, got float"),
    (dict(label_smoothing=1.1), ValueError, r"label_smoothing: expected a number in \[0, 1\]"),
    (dict(label_smoothing=-0.1), ValueError, r"label_smoothing: expected a number in \[0, 1\]"),
    (dict(divergence="kl"), ValueError, "divergence: expected one of forward_kl, .*; got 'kl'"),
    (dict(divergence=None), TypeError, "divergence: expected a str, got NoneType"),
    (dict(reduction="avg"), ValueError, "reduction: expected one of mean, .*; got 'avg'"),
    (dict(scale_t2=1), TypeError, "scale_t2: expected a bool, got int"),
    (dict(dim=2), ValueError, r"dim: expected a value in \[-2, 1\], got 2"),
    (dict(dim=1.0), TypeError, "dim: expected an int, got float"),
    (dict(dim=0, reduction="batchmean"), ValueError, "reduction: .* classes not first"),
    (
        dict(student_logits=S[0], teacher_logits=T[0], reduction="batchmean"),
        ValueError, "reduction: expected at least 2 dimensions",
    ),
    (dict(normalizer=2.0, reduction="sum"), ValueError, 'normalizer: expected reduction="mean"'),
    (dict(normalizer=0), ValueError, "normalizer: expected a number > 0, got 0.0"),
    (dict(normalizer=float("nan")), ValueError, "normalizer: expected a finite number"),
    (dict(normalizer="4"), TypeError, "normalizer: expected a number, got str"),
    (dict(normalizer=torch.ones(2)), TypeError, r"normalizer: .*scalar tensor, got shape \[2\]"),
    (dict(normalizer=torch.tensor(0)), ValueError, "normalizer: .* > 0, got 0.0"),
    (dict(normalizer=torch.tensor(float("nan"))), ValueError, "normalizer: .* got nan"),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=lambda c: next(iter(c[0])))
def test_kd_refuses(host_backend, case):
    arguments, kind, words = case
    with pytest.raises(kind, match=words):
        fd.kd_loss(**{"student_logits": S, "teacher_logits": T, **arguments})


def test_kd_accepts_numbers_of_numpy_and_python(backend):
    want = fd.kd_loss(S + 1, T, temperature=2.0, soft_weight=1.0)
    assert fd.kd_loss(S + 1, T, temperature=np.float32(2), soft_weight=1) == want
    assert fd.kd_loss(S + 1, T, temperature=2, normalizer=np.int64(4)) == want


def test_kd_unknown_keyword_is_python_s_own_error():
    with pytest.raises(TypeError, match="alpha"):
        fd.kd_loss(S, T, alpha=0.5)


def test_module_passes_everything_on(backend):
    torch.manual_seed(1)
    s, t, y = torch.randn(4, 6), torch.randn(4, 6), torch.randint(6, (4,))
    settings = dict(temperature=3.0, hard_weight=0.2, soft_weight=0.8, divergence="reverse_kl")
    module = fd.nn.KDLoss(**settings, return_parts=True)
    mask, weight = torch.tensor([True, True, False, True]), torch.rand(4)
    got = module(s, t, y, mask=mask, row_weight=weight, normalizer=7)
    want = fd.kd_loss(
        s, t, y, mask=mask, row_weight=weight, normalizer=7, return_parts=True, **settings
    )
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert "temperature=3.0" in repr(module)
    with pytest.raises(TypeError, match="expected one of temperature, .*; got 'alpha'"):
        fd.nn.KDLoss(alpha=0.5)
    with pytest.raises(ValueError, match="temperature"):
        fd.nn.KDLoss(temperature=-1.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 1e19}, r"temperature: expected .* 1e-18 to 1e\+18 \(it is squared"),
        ({"temperature": 1e-19}, r"temperature: expected .* 1e-18 to 1e\+18 \(it is squared"),
        ({"temperature": 1e155, "scale_t2": False}, r"temperature: expected .* 1e-36 to 1e\+36, "),
        ({"temperature": 1e-45, "scale_t2": False}, r"temperature: expected .* 1e-36 to 1e\+36, "),
        ({"soft_weight": 1e39}, "soft_weight: expected 0 or a size from 1e-36"),
        ({"soft_weight": -1e-40}, "soft_weight: expected 0 or a size from 1e-36"),
        ({"hard_weight": 1e300, "labels": [0, 1]}, "hard_weight: expected 0 or a size from 1e-36"),
        ({"normalizer": 1e-50}, "normalizer: expected 0 or a size from 1e-36"),
        ({"normalizer": torch.tensor(1e-50, dtype=torch.float64)}, "normalizer: expected 0 or a"),
        (
            {"row_weight": torch.tensor([1.0, 1e39], dtype=torch.float64)},
            "row_weight: .*in the type of the loss",
        ),
    ],
)
def test_kd_numbers_that_float32_cannot_hold(host_backend, settings, words):
    """Some backends compute in float64, others do not: none is let guess."""
    if "labels" in settings:
        settings = settings | {"labels": torch.tensor(settings["labels"])}
    with pytest.raises(ValueError, match=words):
        fd.kd_loss(torch.zeros(2, 3), torch.ones(2, 3), **settings)


def test_kd_float64_holds_larger_row_weights(host_backend):
    wide = torch.tensor([1.0, 1e39], dtype=torch.float64)
    s, t = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3)
    loss = fd.kd_loss(s, t, row_weight=wide)
    torch.testing.assert_close(loss, fd.kd_loss(s[1], t[1]))
