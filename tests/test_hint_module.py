"""nn.HintLosses: many pairs of layers in one call."""

import copy

import pytest
import torch
from test_hint_values import features
from torch import nn

import fastdistill as fd
from fastdistill.nn import HintLosses


def pairs():
    return [
        {"student_width": 8, "teacher_width": 12, "weight": 0.5, "distance": "cosine"},
        {"regressor": torch.nn.Conv2d(4, 6, 1), "feature_norm": "l2"},
        {"weight": 3.0, "distance": "smooth_l1", "reduction": "sum"},
    ]


def layers():
    students = [features(5, 7, 8), features(2, 4, 3, 3), features(9, 10)]
    return students, [features(5, 7, 12), features(2, 6, 3, 3), features(9, 10)]


def test_losses_add_up(backend):
    module = HintLosses(pairs())
    (s, t), linear, conv = layers(), module.regressors[0], module.regressors[1]
    mask = [torch.rand(5, 7) > 0.4, None, None]
    for x in s:
        x.requires_grad_()
    loss, parts = module(s, t, mask=mask, return_parts=True)
    want = [
        fd.hint_loss(s[0], t[0], proj_weight=linear.weight, proj_bias=linear.bias,
                     distance="cosine", mask=mask[0]),
        fd.hint_loss(s[1], t[1], proj_weight=conv.weight, proj_bias=conv.bias, channel_dim=1,
                     feature_norm="l2"),
        fd.hint_loss(s[2], t[2], distance="smooth_l1", reduction="sum"),
    ]  # fmt: skip
    assert all(torch.equal(p, w) for p, w in zip(parts, want, strict=True))
    torch.testing.assert_close(loss, 0.5 * want[0] + want[1] + 3 * want[2])
    assert torch.equal(module(s, t, mask=mask), loss)
    loss.backward()
    assert all(x.grad is not None for x in (*s, *module.parameters()))
    assert len(list(module.parameters())) == 4 and len(module.state_dict()) == 4
    assert copy.deepcopy(module).weights == [0.5, 1.0, 3.0]
    assert "smooth_l1" in repr(module)


def test_one_mask_for_all_pairs(backend):
    module = HintLosses([{}, {"distance": "l1"}])
    s, t = features(4, 6), features(4, 6)
    mask, w = torch.tensor([True, False, True, True]), torch.rand(4)
    got = module([s, s], [t, t], mask=mask, row_weight=w)
    want = fd.hint_loss(s, t, mask=mask, row_weight=w)
    want = want + fd.hint_loss(s, t, mask=mask, row_weight=w, distance="l1")
    torch.testing.assert_close(got, want)


REFUSED = [
    ({}, TypeError, "pairs: expected a sequence of mappings, got dict"),
    ([], ValueError, "pairs: expected at least one"),
    ([3], TypeError, r"pairs\[0\]: expected a mapping, got int"),
    ([{}, {"alpha": 1}], TypeError, r"pairs\[1\]: expected one of student_width, .*'alpha'"),
    ([{"student_width": 3}], ValueError, r"pairs\[0\]: expected student_width and teacher_width"),
    ([{"student_width": 0, "teacher_width": 3}], ValueError, "student_width: .*> 0, got 0"),
    ([{"student_width": 2.0, "teacher_width": 3}], TypeError, "student_width: expected an int"),
    ([{"bias": False}], ValueError, "bias: expected student_width"),
    ([{"regressor": torch.nn.ReLU()}], TypeError, "regressor: expected nn.Linear, .*got ReLU"),
    ([{"regressor": torch.nn.Conv2d(2, 2, 3)}], ValueError, "regressor: expected kernel size 1"),
    ([{"regressor": torch.nn.Linear(2, 2), "bias": True}], ValueError, "got both"),
    ([{"distance": "l3"}], ValueError, "distance: expected one of"),
    ([{"reduction": "none"}], ValueError, r"pairs\[0\]: reduction"),
    ([{"weight": "1"}], TypeError, r"pairs\[0\]: weight: expected a number, got str"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda c: str(c[0])[:30])
def test_losses_refuse(case):
    with pytest.raises(case[1], match=case[2]):
        HintLosses(case[0])


def test_losses_refuse_the_wrong_number_of_layers():
    module = HintLosses([{}, {}])
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="student_features: expected 2 tensors, one a pair, got 1"):
        module([x], [x, x])
    with pytest.raises(TypeError, match="teacher_features: expected a sequence of 2 tensors"):
        module([x, x], x)
    with pytest.raises(ValueError, match="mask: expected 2 tensors"):
        module([x, x], [x, x], mask=[None])


def test_a_regressor_that_does_more_than_its_weight_is_refused():
    """What its own forward, or a hook of it, would add, the fused loss would leave out."""

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Named(nn.Linear):
        pass

    hooked = nn.Linear(3, 4)
    hooked.register_forward_hook(lambda module, inputs, output: 2 * output)
    normed = nn.utils.spectral_norm(nn.Linear(3, 4))  # a hook before the forward
    for regressor in (Scaled(3, 4), hooked, normed):
        with pytest.raises(
            TypeError, match=r"pairs\[0\]: regressor: expected a layer without hook"
        ):
            HintLosses([{"regressor": regressor}])
    HintLosses([{"regressor": Named(3, 4)}])
    parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    x, t = torch.randn(5, 3), torch.randn(5, 4)
    loss = HintLosses([{"regressor": parametrised}])([x], [t])
    torch.testing.assert_close(loss, nn.functional.mse_loss(parametrised(x), t))
