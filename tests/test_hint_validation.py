"""hint_loss: what is refused, and in which words: the argument, what was expected, what came."""

import pytest
import torch

import fastdistill as fd

S, T = torch.zeros(4, 6), torch.zeros(4, 8)
W, B = torch.zeros(8, 6), torch.zeros(8)
BASE = {"student_features": S, "teacher_features": T, "proj_weight": W, "proj_bias": B}

REFUSED = [
    (dict(student_features=[1.0]), TypeError, "student_features: .*Tensor, got list"),
    (dict(teacher_features=None), TypeError, "teacher_features: .* got NoneType"),
    (dict(student_features=S.long()), TypeError, "student_features: expected dtype float32"),
    (dict(teacher_features=T.to_sparse()), TypeError, "teacher_features: .*torch.sparse_coo"),
    (dict(teacher_features=T[:3]), ValueError, r"teacher_features: .*\[4\].*got \[3\]; nothing is"),
    (dict(teacher_features=T[:1]), ValueError, "nothing is broadcast"),
    (dict(teacher_features=T[None]), ValueError, r"teacher_features: expected 2 dimensions"),
    (dict(teacher_features=T.to("meta")), ValueError, "teacher_features: .*device cpu.*meta"),
    (dict(student_features=torch.tensor(1.0)), ValueError, "student_features: expected at least 1"),
    (dict(student_features=S[:, :0]), ValueError, "student_features: .*at least one feature"),
    (dict(teacher_features=T[:, :0]), ValueError, "teacher_features: .*at least one feature"),
    (
        dict(proj_weight=None, proj_bias=None),
        ValueError, r"proj_weight: expected a regressor \[8, 6\] .*student 6, teacher 8.*None",
    ),
    (dict(proj_weight=None), ValueError, "proj_bias: expected None without proj_weight"),
    (dict(proj_weight=W.t()), ValueError, r"proj_weight: expected shape \[8, 6\].*got \[6, 8\]"),
    (dict(proj_weight=W[0]), ValueError, r"proj_weight: .*got \[6\]"),
    (
        dict(proj_weight=torch.zeros(8, 6, 3, 3)),
        ValueError, r"proj_weight: .*end in ones\), got \[8, 6, 3, 3\]",
    ),
    (dict(proj_weight=W.long()), TypeError, "proj_weight: expected dtype float32"),
    (dict(proj_weight=[1.0]), TypeError, "proj_weight: expected a torch.Tensor, got list"),
    (
        dict(proj_weight=W.bfloat16()),
        TypeError, "proj_weight: expected dtype torch.float32 .*got torch.bfloat16",
    ),
    (dict(proj_bias=B.double()), TypeError, "proj_bias: expected dtype torch.float32 .*float64"),
    (dict(proj_weight=W.to("meta")), ValueError, "proj_weight: expected device cpu"),
    (dict(proj_bias=B[:6]), ValueError, r"proj_bias: expected shape \[8\].*got \[6\]"),
    (dict(proj_bias=0.0), TypeError, "proj_bias: expected a torch.Tensor, got float"),
    (dict(distance="l2"), ValueError, "distance: expected one of mse, .*cosine; got 'l2'"),
    (dict(distance=None), TypeError, "distance: expected a str, got NoneType"),
    (dict(feature_norm="batch"), ValueError, "feature_norm: .*layer_norm, l2; .*batch"),
    (dict(feature_norm=("l2", "x")), ValueError, "feature_norm: .*got 'x'"),
    (dict(feature_norm=("l2",) * 3), ValueError, "feature_norm: .*pair .*got 3 values"),
    (dict(feature_norm=2), TypeError, "feature_norm: expected a str, got int"),
    (dict(reduction="batchmean"), ValueError, "reduction: expected one of mean, sum, none; got"),
    (dict(mask=torch.ones(4)), TypeError, "mask: expected dtype torch.bool.*torch.float32"),
    (dict(mask=torch.ones(6, dtype=torch.bool)), ValueError, r"mask: expected shape \[4\]"),
    (dict(row_weight=torch.ones(4, 1)), ValueError, r"row_weight: expected shape \[4\]"),
    (dict(row_weight=-torch.ones(4)), ValueError, "row_weight: .*>= 0, got -1.0"),
    (dict(row_weight=torch.ones(4) * float("nan")), ValueError, "row_weight: .* got nan"),
    (dict(channel_dim=2), ValueError, r"channel_dim: expected a value in \[-2, 1\], got 2"),
    (dict(channel_dim=1.0), TypeError, "channel_dim: expected an int, got float"),
    (dict(channel_dim=0), ValueError, r"teacher_features: .*rows \[6\].*channel_dim=0, got \[8\]"),
    (dict(normalizer=2.0, reduction="sum"), ValueError, 'normalizer: expected reduction="mean"'),
    (dict(normalizer=0), ValueError, "normalizer: expected a number > 0, got 0.0"),
    (dict(normalizer=torch.ones(2)), TypeError, r"normalizer: .*scalar tensor, got shape \[2\]"),
    (dict(normalizer=torch.tensor(0.0)), ValueError, "normalizer: .* > 0, got 0.0"),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=lambda c: next(iter(c[0])))
def test_hint_refuses(host_backend, case):
    arguments, kind, words = case
    with pytest.raises(kind, match=words):
        fd.hint_loss(**{**BASE, **arguments})


def test_hint_accepts_what_it_says(backend):
    assert fd.hint_loss(**BASE) == 0
    assert fd.hint_loss(S, S + 1, feature_norm=[None, None], normalizer=2) == 2
    assert fd.hint_loss(S.t(), T.t(), proj_weight=W.view(8, 6, 1, 1), channel_dim=0) == 0
