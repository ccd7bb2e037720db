"""The kernels of fastdistill.privacy."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from entries import DTYPES, TARGETS, Config, CudaKernel, Least, TritonKernel
from inputs import far_apart
from torch import Tensor

from fastdistill.privacy import mechanism, reference, source

MODULE = "fastdistill.privacy.triton"

FACTORS: dict[str, tuple[Any, ...]] = {
    "dtype": tuple(DTYPES),
    "size": (5, 1000, 4099, 9000),
    "samples": (0, 1, 3, 5),
    "noise": ("philox", "chacha20", "none"),
    "layout": ("dense", "padded"),
    "tensors": (1, 3),
    "target": TARGETS,
}
PLAIN: Config = {
    "dtype": "fp32",
    "size": 9000,
    "samples": 5,
    "noise": "philox",
    "layout": "dense",
    "tensors": 1,
    "target": "sm_90",
}
KINDS = {"philox": source.PHILOX, "chacha20": source.CHACHA20, "none": source.NONE}


def inputs(config: Config) -> Tensor:
    """[samples, size] inside NaN, of norms on both sides of the clip norm 1; of five samples one
    is not finite."""
    torch.manual_seed(0)
    samples, size, dtype = config["samples"], config["size"], DTYPES[config["dtype"]]
    pad = 16 if config["layout"] == "padded" else 0
    x = torch.full((samples, size + pad), float("nan"))
    scale = torch.tensor([2.0, 0.5, 30.0, 1.0, 1.0]).repeat(4)[:samples, None] / size**0.5
    x[:, :size] = torch.randn(samples, size) * scale
    x = x.to(dtype)[:, :size]
    if samples == 5:
        x[1, size // 2] = float("inf")
    return far_apart(x) if config["layout"] == "far" else x


def several(config: Config) -> list[Tensor]:
    """The first as above; the others dense."""
    x = inputs(config)
    return [x, *(torch.randn(x.shape).to(x.dtype) for _ in range(config["tensors"] - 1))]


def numbers(config: Config) -> tuple[mechanism.Mechanism, source.Source]:
    sigma = 0.0 if config["noise"] == "none" else 2.0
    coordinates = config["size"] * config["tensors"]
    planned = mechanism.plan(1.0, sigma, 3.0, coordinates, config["dtype"] != "fp64")
    key = torch.tensor([7, 0xFFFFFFFF, 2, 3, 0x80000000, 5, 6, 1])
    return planned, source.Source(KINDS[config["noise"]], key, (1 << 62) + 0xFFFFFFF1)


def call(module: ModuleType, config: Config) -> None:
    planned, bits = numbers(config)
    module.clip_and_noise(several(config), planned, bits)


def check(module: ModuleType, config: Config) -> None:
    """The oracle's bits with noise; without, where sums are not on a grid, its float64."""
    samples = several(config)
    planned, bits = numbers(config)
    found = module.clip_and_noise(samples, planned, bits)
    if config["layout"] == "far":
        samples[0] = torch.stack(list(samples[0]))
    for got, want in zip(found, reference.clip_and_noise(samples, planned, bits), strict=True):
        assert_released(got, want, config)


def assert_released(got: Tensor, want: Tensor, config: Config) -> None:
    assert got.dtype is want.dtype and got.shape == want.shape
    if config["noise"] == "none":
        relative = 1e-12 if got.dtype is torch.float64 else 2.0**-23
        torch.testing.assert_close(got, want, rtol=relative, atol=1e-15)
    else:
        assert torch.equal(got, want), int((got != want).sum())


def possible_square(config: Config) -> bool:
    """It does not see the noise, and nothing is squared of no samples."""
    return config["samples"] > 0 and config["noise"] == "philox"


def tile(arguments: Mapping[str, Any]) -> int:
    """Elements of samples; of the result where there is no sample."""
    at_once = 1 if arguments.get("EMPTY") else arguments.get("UNROLL", 1)
    return arguments["LANES"] * arguments["VEC"] * at_once


def least(config: Config) -> Least:
    """Of one sample: what the result takes is a fraction of it."""
    width = DTYPES[config["dtype"]].itemsize
    return Least(width, 0) if config["samples"] else Least(0, max(width, 4))


FAULTS: tuple[Config, ...] = (
    PLAIN,
    {**PLAIN, "dtype": "bf16", "layout": "padded", "size": 2056, "tensors": 3},
    {**PLAIN, "dtype": "bf16", "size": 4099, "samples": 3, "noise": "none"},
    {**PLAIN, "dtype": "fp64", "size": 1000, "samples": 1},
    {**PLAIN, "size": 1000, "samples": 3, "layout": "far"},
)
HARMLESS = {
    "arithmetic in the narrow type: _release_kernel: tl.load(at, mask=tl.where(there, inside, "
    "False), other=0.0).to(tl.float64)":
        "the product with the float64 factor widens it as this does",
    "false alignment: first_vector: ALIGNED":
        "it is always told: where a row is not aligned its vectors are of one element",
}  # fmt: skip
EMPTY: Config = {**PLAIN, "samples": 0}

ROW_FACTORS: dict[str, tuple[Any, ...]] = {
    "dtype": ("fp32", "bf16", "fp64"),
    "kind": ("softmax", "gradient"),
    "cols": (),
    "teachers": (1, 2, 5),
    "noise": ("philox", "none"),
    "layout": ("dense", "padded"),
    "target": TARGETS,
}
NARROW: Config = {
    "dtype": "fp32",
    "kind": "softmax",
    "cols": 64,
    "teachers": 5,
    "noise": "philox",
    "layout": "dense",
    "target": "sm_90",
}
WIDE: Config = {**NARROW, "cols": 2304}
ROWS = 3


def teachers(config: Config) -> list[Tensor]:
    """[ROWS, cols] each, inside NaN; of several the second has a row that ends in inf."""
    torch.manual_seed(0)
    count, cols, dtype = config["teachers"], config["cols"], DTYPES[config["dtype"]]
    pad = 16 if config["layout"] == "padded" else 0
    x = torch.full((count, ROWS, cols + pad), float("nan"))
    x[..., :cols] = torch.randn(count, ROWS, cols) - 2
    x = x.to(dtype)[..., :cols]
    if count > 1:
        x[1, 1, -1] = float("inf")
    if config["layout"] == "far":
        return [far_apart(x[0])] * count
    return list(x)


def release_of(module: ModuleType, config: Config) -> tuple[Any, tuple[Any, ...]]:
    """The launcher's function, and its numbers."""
    sigma = 0.0 if config["noise"] == "none" else 2.0
    key = torch.tensor([7, 0xFFFFFFFF, 2, 3, 0x80000000, 5, 6, 1])
    bits = source.Source(KINDS[config["noise"]], key, (1 << 62) + 0xFFFFFFF1)
    if config["kind"] == "softmax":
        planned = mechanism.plan_answers(sigma, config["cols"])
        return module.noisy_softmax_sum, (1.7, planned, bits)
    single = config["dtype"] != "fp64"
    planned = mechanism.plan(20.0, sigma, 1.0, config["cols"], single)
    return module.noisy_gradient_sum, (planned, bits)


def call_rows(module: ModuleType, config: Config) -> None:
    function, numbers = release_of(module, config)
    function(teachers(config), *numbers)


def check_rows(module: ModuleType, config: Config) -> None:
    """As `check`."""
    x = teachers(config)
    function, numbers = release_of(module, config)
    got = function(x, *numbers)
    oracle, _ = release_of(reference, config)
    want = oracle([torch.stack(list(y)) for y in x], *numbers)
    assert_released(got, want, config)


def row_tile(arguments: Mapping[str, Any]) -> int:
    """Elements of teachers."""
    rows, at_once = arguments.get("ROWS", 1), arguments.get("UNROLL", 1)
    return rows * arguments["LANES"] * arguments["VEC"] * at_once


def row_kernel(name: str, plain: Config, cols: tuple[int, ...], **options: Any) -> TritonKernel:
    return TritonKernel(
        name=name,
        module=MODULE,
        factors={**ROW_FACTORS, "cols": cols},
        possible=lambda config: True,
        call=call_rows,
        check=check_rows,
        tile=row_tile,
        least=lambda config: Least(DTYPES[config["dtype"]].itemsize, 0),
        headlines={"softmax": plain},
        architecture="architecture",
        faults=(
            plain,
            {**plain, "dtype": "bf16", "kind": "gradient", "layout": "padded", "teachers": 2},
            {**plain, "cols": cols[-1], "noise": "none", "layout": "far"},
        ),
        not_sanitized="triton-viz cannot follow the addresses that it loads",
        **options,
    )


TRITON = (
    TritonKernel(
        name="_square_kernel",
        module=MODULE,
        factors={**FACTORS, "samples": (1, 3, 5), "noise": ("philox",)},
        possible=possible_square,
        call=call,
        check=check,
        tile=tile,
        least=least,
        passes=lambda arguments: 1,
        headlines={
            "fp32": PLAIN,
            "bf16": {**PLAIN, "dtype": "bf16"},
            "fp32-several": {**PLAIN, "tensors": 3},
        },
        architecture="architecture",
        faults=tuple({**c, "noise": "philox"} for c in FAULTS),
        not_sanitized="triton-viz cannot evaluate the cast in its loop's bound",
    ),
    TritonKernel(
        name="_release_kernel",
        module=MODULE,
        factors=FACTORS,
        possible=lambda config: True,
        call=call,
        check=check,
        tile=tile,
        least=least,
        passes=lambda arguments: 1,
        headlines={
            "fp32-philox": PLAIN,
            "fp32-several": {**PLAIN, "tensors": 3},
            "bf16-chacha20": {**PLAIN, "dtype": "bf16", "noise": "chacha20"},
            "noise-philox": EMPTY,
            "noise-chacha20": {**EMPTY, "noise": "chacha20"},
        },
        architecture="architecture",
        faults=FAULTS,
        harmless=HARMLESS,
        uniform=frozenset({("load", 8)}),
        sanitized=({**EMPTY, "noise": "none"}, {**EMPTY, "noise": "none", "size": 4099}),
    ),
    row_kernel(
        "_narrow_rows_kernel",
        NARROW,
        (10, 64, 257),
        passes=lambda arguments: 1,
        uniform=frozenset({("load", 8)}),
    ),
    row_kernel("_row_factor_kernel", WIDE, (1024, 2304, 1027), passes=lambda arguments: 2),
    row_kernel(
        "_row_sum_kernel",
        WIDE,
        (1024, 2304, 1027),
        passes=lambda arguments: 1,
        uniform=frozenset({("load", 8)}),
    ),
)

_NOTHING_THERE = "beyond the end a thread reads nothing and adds zeros"
HARMLESS_CUDA = {
    "mask loosened: privacy.cuh: for (int64_t first = begin + threadIdx.x * kEach; first < end; "
    "first += blockDim.x * kEach) {":
        _NOTHING_THERE,
    "mask loosened: privacy.cuh: for (int64_t at = 0; at < samples; at += kUnroll) {":
        _NOTHING_THERE,
    "mask loosened: row_sums.cuh: for (int64_t first = threadIdx.x * kEach; first < a.cols; "
    "first += blockDim.x * kEach) {":
        _NOTHING_THERE,
    "mask loosened: row_sums.cuh: for (int64_t at = 0; at < a.teachers; at += kUnroll) {":
        _NOTHING_THERE,
}  # fmt: skip

CUDA = tuple(
    CudaKernel(
        name=name,
        room="privacy",
        source=file,
        probe="probe_privacy.cu",
        headers=("privacy.cuh", "row_sums.cuh", "group.cuh"),
        harmless=HARMLESS_CUDA,
        wide=wide,
    )
    for name, file, wide in (
        ("privacy_square", "privacy.cuh", ("load",)),
        ("privacy_release", "privacy.cuh", ("load", "store")),
        ("privacy_narrow_rows", "row_sums.cuh", ("load", "store")),
        ("privacy_row_factor", "row_sums.cuh", ("load",)),
        ("privacy_row_sum", "row_sums.cuh", ("load", "store")),
    )
)

KERNELS = (*TRITON, *CUDA)
