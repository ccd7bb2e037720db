"""The kernels of fastdistill.softmax."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from entries import DTYPES, TARGETS, Config, CudaKernel, Least, TritonKernel
from inputs import strided
from torch import Tensor

from fastdistill.softmax import reference

MODULE = "fastdistill.softmax.triton"

FACTORS: dict[str, tuple[Any, ...]] = {
    "dtype": tuple(DTYPES),
    "log": (False, True),
    "temperature": ("number", "rows"),
    "layout": ("dense", "padded", "next_token"),
    "target": TARGETS,
}
PLAIN: Config = {
    "dtype": "bf16",
    "cols": 1000,
    "log": False,
    "temperature": "number",
    "layout": "dense",
    "target": "sm_90",
}
WIDE: Config = {**PLAIN, "cols": 50257}


def in_registers(config: Config) -> bool:
    from fastdistill.softmax import triton as softmax_triton

    configs = softmax_triton._DOUBLE if config["dtype"] == "fp64" else softmax_triton._SINGLE
    return next(c for c in configs if config["cols"] <= c.cols).in_registers


def in_blocks(config: Config) -> bool:
    return not in_registers(config)


# ----------------------------------------------------------------------------------------------
# Calls.


def inputs(config: Config) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """(x, the gradient of y, T of each row or None, T)."""
    torch.manual_seed(0)
    x, grad = strided(config, config["dtype"], 8), strided(config, config["dtype"], 47)
    if config["temperature"] == "number":
        return x, grad, None, 2.5
    return x, grad, torch.rand(x.shape[:-1]) + 0.7, 1.0


def call_forward(module: ModuleType, config: Config) -> None:
    x, _, rows, scalar = inputs(config)
    module.softmax_fwd(x, rows, scalar, config["log"])


def call_backward(module: ModuleType, config: Config) -> None:
    x, grad, rows, scalar = inputs(config)
    _, stats = module.softmax_fwd(x, rows, scalar, config["log"])
    module.softmax_bwd(grad, x, stats, rows, scalar, config["log"], config["learned"])


def check_forward(module: ModuleType, config: Config) -> None:
    """Within the suite's budget of float64."""
    from budget import assert_within

    x, grad, rows, scalar = inputs(config)
    y, _ = module.softmax_fwd(x, rows, scalar, config["log"])
    want, native = (oracle(x, grad, rows, scalar, config["log"], wide) for wide in (True, False))
    assert_within("y", y, want[0], native[0])


def check_backward(module: ModuleType, config: Config) -> None:
    """Both gradients; the sums from a real forward pass."""
    from budget import assert_within

    x, grad, rows, scalar = inputs(config)
    _, stats = module.softmax_fwd(x, rows, scalar, config["log"])
    learned = config["learned"]
    got = module.softmax_bwd(grad, x, stats, rows, scalar, config["log"], learned)
    want, native = (oracle(x, grad, rows, scalar, config["log"], wide) for wide in (True, False))
    # Where a class takes nearly all, g - sum g p cancels: the largest gradients set the scale.
    names = ("gradient", "temperature")[: 1 + learned]
    for name, g, w, n in zip(names, got, want[1:], native[1:], strict=False):
        assert_within(name, g.reshape(1, -1), w.reshape(1, -1), n.reshape(1, -1))


def oracle(
    x: Tensor, grad: Tensor, rows: Tensor | None, scalar: float, log: bool, wide: bool
) -> list[Tensor]:
    x = (x.double() if wide else x).detach().requires_grad_()
    leaves = [x]
    if rows is not None:
        rows = (rows.double() if wide else rows).detach().requires_grad_()
        leaves.append(rows)
    y = reference.softmax(x, rows, scalar, log)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


# ----------------------------------------------------------------------------------------------
# Entries.


def least_forward(config: Config) -> Least:
    width = DTYPES[config["dtype"]].itemsize
    return Least(width, width, 1)


def least_backward(config: Config) -> Least:
    width = DTYPES[config["dtype"]].itemsize
    return Least(2 * width, width, 1)


def tile(arguments: Mapping[str, Any]) -> int:
    return arguments["LANES"] * arguments["VEC"] * arguments.get("ROWS", 1)


def once(arguments: Mapping[str, Any]) -> float:
    return 1


def passes_backward(arguments: Mapping[str, Any]) -> float:
    """The first pass of the logarithm reads the gradient alone."""
    return 1.5 if arguments["LOG"] else 2


def possible_backward(config: Config) -> bool:
    """The gradient of a temperature that is one number is not taken here."""
    return config["temperature"] == "rows" or not config["learned"]


LEARNED: Config = {"temperature": "rows", "learned": True}
NUMBER: Config = {"learned": False}
_WIDENED = "it meets a float32 in the next operation, which widens it as this does"
_ONE_ROW = "a program for each row: it is always true"

HARMLESS_LOADS = {
    "arithmetic in the narrow type: load: tl.load(ptr, mask=mask, other=-float(\"inf\")).to(DTYPE)":
        "a maximum is taken in float32 of itself; then " + _WIDENED,
    "arithmetic in the narrow type: _load_gradient: tl.load(ptr, mask=mask, other=0.0).to(DTYPE)":
        _WIDENED,
}  # fmt: skip

FAULTS_ROWS: tuple[Config, ...] = (
    {**PLAIN, "cols": 100, "dtype": "fp32"},
    {**PLAIN, "cols": 10, "layout": "padded", "temperature": "rows"},
    {**PLAIN, "cols": 1001, "layout": "padded", "dtype": "fp16", "log": True},
    {**PLAIN, "cols": 1001, "layout": "next_token"},
    {**PLAIN, "layout": "far"},
)
FAULTS_BLOCKS: tuple[Config, ...] = (
    {**PLAIN, "cols": 9001, "dtype": "fp32"},
    {**PLAIN, "cols": 9001, "layout": "padded", "dtype": "fp16", "log": True},
    {**PLAIN, "cols": 9000, "layout": "far", "temperature": "rows"},
    {**PLAIN, "cols": 9001, "layout": "next_token"},
)


def with_gradient(faults: tuple[Config, ...]) -> tuple[Config, ...]:
    """The same; each whose temperature is of rows takes its gradient too."""
    return tuple({**c, "learned": c["temperature"] == "rows"} for c in faults)


TRITON = (
    TritonKernel(
        name="_softmax_rows_kernel",
        module=MODULE,
        factors={"cols": (10, 100, 1000, 1001, 2000), **FACTORS},
        possible=in_registers,
        call=call_forward,
        check=check_forward,
        tile=tile,
        least=least_forward,
        passes=once,
        headlines={
            "bf16-1000": PLAIN,
            "bf16-100": {**PLAIN, "cols": 100},
            "fp32-1000-log": {**PLAIN, "dtype": "fp32", "log": True},
            "bf16-8192": {**PLAIN, "cols": 8192},
        },
        architecture="architecture",
        faults=FAULTS_ROWS,
        harmless=HARMLESS_LOADS,
        sanitized=({**PLAIN, "dtype": "fp32"}, {**PLAIN, "cols": 2000}),
    ),
    TritonKernel(
        name="_softmax_blocks_kernel",
        module=MODULE,
        factors={"cols": (9000, 9001), **FACTORS},
        possible=in_blocks,
        call=call_forward,
        check=check_forward,
        tile=tile,
        least=least_forward,
        passes=lambda arguments: 2,
        headlines={
            "bf16-50257": WIDE,
            "fp32-50257-log": {**WIDE, "dtype": "fp32", "log": True},
        },
        architecture="architecture",
        faults=FAULTS_BLOCKS,
        harmless={"mask loosened: _softmax_blocks_kernel: row < rows": _ONE_ROW},
        not_sanitized="triton-viz cannot evaluate the cast in its loop's bound",
    ),
    TritonKernel(
        name="_softmax_grad_rows_kernel",
        module=MODULE,
        factors={"cols": (10, 100, 1000, 1001, 2000), **FACTORS, "learned": (True, False)},
        possible=lambda config: in_registers(config) and possible_backward(config),
        call=call_backward,
        check=check_backward,
        tile=tile,
        least=least_backward,
        passes=once,
        headlines={
            "bf16-1000": {**PLAIN, **NUMBER},
            "bf16-1000-learned": {**PLAIN, **LEARNED},
            "fp32-1000-log": {**PLAIN, **NUMBER, "dtype": "fp32", "log": True},
        },
        architecture="architecture",
        faults=with_gradient(FAULTS_ROWS),
        not_sanitized="its call launches the forward kernel first, which is not traced with it",
    ),
    TritonKernel(
        name="_softmax_grad_blocks_kernel",
        module=MODULE,
        factors={"cols": (9000, 9001), **FACTORS, "learned": (True, False)},
        possible=lambda config: in_blocks(config) and possible_backward(config),
        call=call_backward,
        check=check_backward,
        tile=tile,
        least=least_backward,
        passes=passes_backward,
        headlines={
            "bf16-50257": {**WIDE, **NUMBER},
            "bf16-50257-learned": {**WIDE, **LEARNED},
            "fp32-50257-log": {**WIDE, **NUMBER, "dtype": "fp32", "log": True},
        },
        architecture="architecture",
        faults=with_gradient(FAULTS_BLOCKS),
        harmless={"mask loosened: _softmax_grad_blocks_kernel: row < rows": _ONE_ROW},
        not_sanitized="triton-viz cannot evaluate the cast in its loop's bound",
    ),
)

_NO_CHUNK = "a chunk beyond the row's end reads nothing and stores nothing"
_OVER_CHUNKS = (
    "mask loosened: softmax.cuh: for (int j = Group::rank(); j < row.chunks; j += Group::size()) {"
)
HARMLESS_CUDA = {
    "tail missing: chunk.cuh: for (int i = 0; i < kChunk; i += 2) "
    "round_pair(x[i], x[i + 1], y + i);":
        "steps of 2 up to 8: the last is at 6",
    **{_OVER_CHUNKS + again: _NO_CHUNK for again in ("", " (#2)", " (#3)", " (#4)")},
}  # fmt: skip

CUDA = tuple(
    CudaKernel(
        name=name,
        room="softmax",
        source="softmax.cuh",
        probe="probe_softmax.cu",
        headers=("softmax.cuh", "chunk.cuh", "group.cuh"),
        harmless=HARMLESS_CUDA,
    )
    for name in ("softmax_forward", "softmax_backward")
)

KERNELS = (*TRITON, *CUDA)
