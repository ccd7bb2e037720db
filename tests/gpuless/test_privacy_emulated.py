"""Many tensors in one launch of the CUDA kernels; the suite has their values."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import cuda_emulation as emulation
import privacy_checks as checks
import pytest
import torch

from fastdistill.privacy import mechanism, ops, reference


@pytest.fixture
def counting(emulated_cuda: ModuleType) -> tuple[ModuleType, list[str]]:
    """The launchers, and the names of what they have launched."""
    launcher: Any = emulation.launcher(emulated_cuda, ops.launcher.names["cuda"])
    names: list[str] = []
    real = launcher._launch

    def launch(name: str, device: torch.device, **arguments: Any) -> None:
        names.append(name)
        real(name, device, **arguments)

    launcher._launch = launch
    return launcher, names


SIZES = [(i % 7 * 40, 30)[: 1 + i % 2] for i in range(90)]  # every 14th is empty


@pytest.mark.parametrize("bits", [checks.philox(9), checks.chacha20(9)], ids=["philox", "chacha20"])
def test_privacy_tensors_of_one_kind_are_one_launch(
    counting: tuple[ModuleType, list[str]], bits: Any
) -> None:
    launcher, names = counting
    samples = [torch.randn(3, *s) for s in SIZES]
    samples[1], samples[4] = samples[1].double(), samples[4].bfloat16()
    samples[2] = torch.randn(3, 41)[:, 1:]  # begins beside a boundary of 16 bytes
    planned = mechanism.plan(5.0, 1.0, 3.0, sum(x[0].numel() for x in samples), True)
    got = launcher.clip_and_noise(samples, planned, bits)
    want = reference.clip_and_noise(samples, planned, bits)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    kinds = 4  # float64, bfloat16, float32 on boundaries and beside them
    assert sorted(names) == ["privacy_release"] * kinds + ["privacy_square"] * kinds

    names.clear()
    sums = [torch.randn(s) for s in SIZES]
    want = [x.clone() for x in sums]
    launcher.add_noise_(sums, planned, bits)
    reference.add_noise_(want, planned, bits)
    assert all(torch.equal(a, b) for a, b in zip(sums, want, strict=True))
    assert names == ["privacy_release"]


def test_privacy_a_failed_launch_raises(counting: tuple[ModuleType, list[str]]) -> None:
    launcher, _ = counting
    nothing = {"table": 0, "of_chunk": 0, "chunks": 1, "type": 0, "samples": 1}
    with pytest.raises(RuntimeError, match="clip_and_noise: the CUDA kernel did not start"):
        launcher._launch(
            "privacy_release", torch.device("cpu"), **nothing, chunk=512, factors=0,
            out_double=False, generator=0, key=[0] * 8, counter=(0, 0),
            fine=0.0, grid=0.0, scale=0.0, inverse=1.0,
        )  # fmt: skip
    with pytest.raises(RuntimeError, match="a sum over teachers: the CUDA kernel did not start"):
        launcher._launch(
            "privacy_sum_rows", torch.device("cpu"), table=0, type=0, teachers=1, rows=1, cols=257,
            step=257, sums=0, highest=0, factors=0, inverse_temperature=1.0, exponentials=0.0,
            fine=0.0, clip=1.0, unit=1.0,
        )  # fmt: skip
