"""PrivacyEngine: what it guarantees, by the checks that broken engines fail."""

import privacy_engine_checks as checks
import pytest
import torch
from private_models import assert_close, by_samples, ours
from torch import nn

from fastdistill.privacy.engine.gradients import Gradient


@pytest.fixture(autouse=True)
def quietly(one_thread):
    yield


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda c: c.__name__)
def test_engine(check):
    check(checks.Engine())


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_engine_sums_are_of_float32_products(precision, monkeypatch):
    """Whatever torch may use elsewhere; and what was allowed is allowed afterwards."""
    places = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    seen = []

    def spied(self, factor, chunk, total=Gradient.total):
        seen.append([place.fp32_precision for place in places])
        return total(self, factor, chunk)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    allowed = [place.fp32_precision for place in places]
    try:
        monkeypatch.setattr(Gradient, "total", spied)
        checks.Run(checks.Engine(), checks.mlp(torch.float32)).step(
            torch.randn(3, 6), torch.randn(3, 5)
        )
        assert [place.fp32_precision for place in places] == allowed
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [["ieee", "ieee"]] * 4


def test_engine_follows_what_is_written_in_place():
    """Hooks cannot. With a layer that has a rule, and with one that Opacus's sampler is for."""
    for convolution, x in (
        (nn.Conv2d, torch.randn(4, 1, 3, 3)),
        (nn.Conv3d, torch.randn(4, 1, 3, 3, 3)),
    ):
        torch.manual_seed(0)
        models = []
        for inplace in (True, False):
            torch.manual_seed(1)
            models.append(
                nn.Sequential(
                    convolution(1, 2, 2), nn.ReLU(inplace), nn.Flatten(), nn.LazyLinear(3)
                ).double()
            )
            models[-1](x.double())
        batch = [(x.double(), torch.randint(3, (4,)))]
        in_place, plain = (ours(model, batch) for model in models)
        assert_close(in_place, plain)
        assert_close(plain, by_samples(models[1], batch[0]))
