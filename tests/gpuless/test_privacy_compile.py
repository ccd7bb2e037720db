"""What only the private releases promise of their compiled kernels; see test_triton_compile.py."""

from __future__ import annotations

import os
import re

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

import room_privacy
import torch
import triton_static as static

from fastdistill.privacy import triton

SQUARE, RELEASE, NARROW, _, SUM = room_privacy.TRITON


def fused(
    kernel: static.TritonKernel, config: static.Config, target: str, **options: bool
) -> list[str]:
    """Products and sums of doubles that are, or may still become, one rounding."""
    amd = target == "gfx942"
    launch = static.record(kernel, config, target)
    launch = launch._replace(options={**launch.options, **options})
    asm = static.compile_launch(launch, target).asm
    if amd:
        return re.findall(r"v_fma\w*_f64|v_pk_fma\w*", asm["amdgcn"])
    return re.findall(r"\bfma\.\S*f64|\b(?:mul|add|sub)\.f64", asm["ptx"])  # without .rn they fuse


@pytest.mark.parametrize(
    ("kernel", "config", "target"),
    [
        (RELEASE, room_privacy.PLAIN, "sm_90"),
        (NARROW, room_privacy.NARROW, "sm_90"),
        (SUM, room_privacy.WIDE, "sm_90"),
        # AMD's quotients and roots are made of fused operations: where none of those are.
        (RELEASE, {**room_privacy.PLAIN, "noise": "none"}, "gfx942"),
        (SUM, room_privacy.WIDE, "gfx942"),
    ],
)
def test_privacy_no_product_is_fused_with_a_sum(
    kernel: static.TritonKernel, config: static.Config, target: str
) -> None:
    """Or the noise would have other bits than elsewhere; the control: where fusing is allowed."""
    assert not fused(kernel, config, target)
    assert fused(kernel, config, target, enable_fp_fusion=True)


def test_privacy_the_key_selects_no_kernel() -> None:
    """A word of it that is 1 or a multiple of 16 would show in the names of compiled kernels."""
    launch = static.record(RELEASE, room_privacy.PLAIN)
    for parameter in launch.kernel.params:
        if re.fullmatch(r"[kc]\d", parameter.name):
            assert parameter.do_not_specialize and parameter.annotation_type == "u32"


@pytest.mark.parametrize("kernel", [SQUARE, RELEASE], ids=lambda k: k.name)
def test_privacy_one_kernel_serves_every_size(kernel: static.TritonKernel) -> None:
    keys = set()
    for size, samples in ((4096, 5), (1 << 14, 16), (5008, 1)):
        launch = static.record(kernel, {**room_privacy.PLAIN, "size": size, "samples": samples})
        varying = [p for p in launch.kernel.params if not p.is_constexpr and "ptr" not in p.name]
        assert all(p.do_not_specialize or p.annotation_type == "fp64" for p in varying)
        constants = [launch.arguments[p.name] for p in launch.kernel.params if p.is_constexpr]
        keys.add(tuple(map(str, constants)))
    assert len(keys) == 1


@pytest.mark.parametrize("kernel", room_privacy.TRITON[2:], ids=lambda k: k.name)
def test_privacy_one_kernel_serves_all_rows_and_teachers(kernel: static.TritonKernel) -> None:
    (config,) = kernel.headlines.values()
    launch = static.record(kernel, config)
    varying = [p for p in launch.kernel.params if not p.is_constexpr and "ptr" not in p.name]
    assert all(p.do_not_specialize or p.annotation_type == "fp64" for p in varying)


def test_privacy_tensors_of_one_kind_are_one_launch() -> None:
    samples = [torch.randn(3, i % 5 * 40) for i in range(60)]
    samples[2] = torch.randn(3, 41)[:, 1:]  # begins beside a boundary of 16 bytes
    planned, bits = room_privacy.numbers(room_privacy.PLAIN)
    with static.recording(triton) as launches:
        triton.clip_and_noise(samples, planned, bits)
        triton.add_noise_([x[0] for x in samples], planned, bits)
    names = [x.kernel.__name__ for x in launches]
    assert sorted(names) == ["_release_kernel"] * 4 + ["_square_kernel"] * 2
