"""The kernels of fastdistill.kd."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from entries import DTYPES, TARGETS, Config, CudaKernel, Least, TritonKernel
from inputs import ROWS, strided
from torch import Tensor

from fastdistill.kd import reference

MODULE = "fastdistill.kd.triton"
ARCHITECTURES = {"sm_80": "sm_8", "sm_90": "sm_9", "sm_100": "sm_10", "gfx942": "gfx9"}

FACTORS: dict[str, tuple[Any, ...]] = {
    "student": tuple(DTYPES),
    "teacher": tuple(DTYPES),
    "divergence": ("none", "forward_kl", "reverse_kl", "cross_entropy"),
    "hard": ("none", "plain", "smooth"),
    "temperature": (1.0, 2.0),
    "grad": (True, False),
    "layout": ("dense", "padded", "next_token"),
    "target": TARGETS,
}
PLAIN: Config = {
    "student": "bf16",
    "teacher": "bf16",
    "cols": 1000,
    "divergence": "forward_kl",
    "hard": "plain",
    "temperature": 2.0,
    "grad": True,
    "layout": "dense",
    "target": "sm_90",
}


def double(config: Config) -> bool:
    return "fp64" in (config["student"], config["teacher"])


def in_registers(config: Config) -> bool:
    from fastdistill.kd import triton as kd_triton

    key = (ARCHITECTURES[config["target"]], "double" if double(config) else "single")
    reverse = config["divergence"] == "reverse_kl"
    fits = (c for c in kd_triton.CONFIGS[key] if config["cols"] <= c.cols)
    return next(c for c in fits if c.reverse or not reverse).in_registers


# ----------------------------------------------------------------------------------------------
# Calls.


def inputs(config: Config) -> tuple[Tensor, Tensor, list[Any]]:
    """(student, teacher, the other arguments of kd_fwd but need_grad); one row is dropped."""
    torch.manual_seed(0)
    s, t = strided(config, config["student"], 8), strided(config, config["teacher"], 47)
    labels = torch.randint(config["cols"], s.shape[:-1])
    labels.view(-1)[1:2], labels.view(-1)[2:3] = 0, config["cols"] - 1
    labels.view(-1)[0 if config["layout"] == "far" else -1] = -100
    smoothing = 0.1 if config["hard"] == "smooth" else 0.0
    soft = config["divergence"] != "none"
    weights = [0.0 if config["hard"] == "none" else 0.5, 0.7 if soft else 0.0]
    arguments: list[Any] = [labels, None, None, None, config["temperature"], *weights]
    arguments += [config["divergence"] if soft else "forward_kl", True, -100, smoothing]
    return s, t, [*arguments, "none", 1.0]


def call_forward(module: ModuleType, config: Config) -> None:
    student, teacher, arguments = inputs(config)
    module.kd_fwd(student, teacher, *arguments, config["grad"])


def check_forward(module: ModuleType, config: Config) -> None:
    """Values and gradient, within the suite's budget of float64."""
    from budget import assert_within

    student, teacher, arguments = inputs(config)
    loss, hard, soft, grad, scale = module.kd_fwd(student, teacher, *arguments, config["grad"])
    results = {"loss": loss, "hard": hard, "soft": soft}
    want = oracle(student.double(), teacher.double(), arguments)
    native = oracle(student, teacher, arguments)
    for name, got in results.items():
        assert_within(name, *(x.unsqueeze(-1) for x in (got, want[name], native[name])))
    if config["grad"]:
        if scale.numel():  # float16 keeps the row's factor apart; backward multiplies
            grad = (grad.float() * scale.view(loss.shape).unsqueeze(-1)).half()
        assert_within("gradient", grad, want["gradient"], native["gradient"])
    if arguments[5]:  # a label that is no class is not looked up, and spoils its row alone
        arguments[0].view(-1)[-1] = config["cols"]
        again = module.kd_fwd(student, teacher, *arguments, False)[0].view(-1)
        assert again[-1].isnan()
        torch.testing.assert_close(again[:-1], loss.view(-1)[:-1], rtol=1e-5, atol=0.0)


def oracle(student: Tensor, teacher: Tensor, arguments: list[Any]) -> dict[str, Tensor]:
    leaf = student.detach().clone().requires_grad_()
    loss, hard, soft = reference.kd_loss(leaf, teacher, *arguments)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return {"loss": loss.detach(), "hard": hard, "soft": soft, "gradient": gradient}


def measured(shape: tuple[int, ...], dtype: str) -> Config:
    """What bench/cases.py measures."""
    return {**PLAIN, "student": dtype, "teacher": dtype, "cols": shape[-1]}


def scale_inputs(config: Config) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    grad = torch.randn(ROWS, config["cols"]).to(DTYPES[config["student"]])
    scale = torch.rand(ROWS) + 0.5 if config["student"] == "fp16" else torch.zeros(0)
    dtype = torch.float64 if config["student"] == "fp64" else torch.float32
    upstream = torch.randn(ROWS) if config["per_row"] else torch.tensor(2.5)
    return grad, scale, upstream.to(dtype)


def call_scale(module: ModuleType, config: Config) -> None:
    (module.kd_bwd_ if config["in_place"] else module.kd_bwd)(*scale_inputs(config))


def check_scale(module: ModuleType, config: Config) -> None:
    """To the bit: one multiplication, one rounding."""
    grad, scale, upstream = scale_inputs(config)
    factor = upstream * scale if scale.numel() else upstream
    want = (grad.to(upstream.dtype) * factor.expand(ROWS)[:, None]).to(grad.dtype)
    if config["in_place"]:
        module.kd_bwd_(grad, scale, upstream)
        assert torch.equal(grad, want)
    else:
        assert torch.equal(module.kd_bwd(grad, scale, upstream), want)


# ----------------------------------------------------------------------------------------------
# Entries.


def least_forward(config: Config) -> Least:
    student = DTYPES[config["student"]].itemsize
    soft = config["divergence"] != "none"
    teacher = DTYPES[config["teacher"]].itemsize if soft else 0
    separate = config["hard"] != "none" and config["temperature"] != 1.0 and soft
    return Least(student + teacher, student * config["grad"], 1 + soft + separate)


def least_scale(config: Config) -> Least:
    width = DTYPES[config["student"]].itemsize
    return Least(width, width)


def tile(arguments: Mapping[str, Any]) -> int:
    return arguments["LANES"] * arguments["VEC"] * arguments.get("ROWS", 1)


WIDE: Config = {**PLAIN, "cols": 50257}
_WIDENED = "it meets a float32 in the next operation, which widens it as this does"
_LOAD = "arithmetic in the narrow type: _kd_scale_kernel: tl.load("
HARMLESS_FORWARD = {
    "arithmetic in the narrow type: _label: tl.load(s_ptr + start + label, mask=inside, "
    "other=0.0).to(DTYPE)": _WIDENED,
    "mask loosened: _kd_blocks_kernel: row < rows": "a program for each row: it is always true",
}
HARMLESS_SCALE = {
    _LOAD + "grad_output_ptr + row, mask=valid, other=1.0).to(DTYPE)": "it has that type already",
    _LOAD + "grad_output_ptr + row * 0, mask=valid, other=1.0).to(DTYPE)":
        "it has that type already",
    _LOAD + "grad_scale_ptr + row, mask=valid, other=1.0).to(DTYPE)": "it has that type already",
    _LOAD + "source + (first * VEC + offset), mask=inside).to(DTYPE)": _WIDENED,
    _LOAD + "grad_ptr + (start + end), mask=outside).to(DTYPE)": _WIDENED,
}  # fmt: skip

TRITON = (
    TritonKernel(
        name="_kd_rows_kernel",
        module=MODULE,
        factors={"cols": (10, 100, 1000, 1001, 2000), **FACTORS},
        possible=in_registers,
        call=call_forward,
        check=check_forward,
        tile=tile,
        least=least_forward,
        passes=lambda arguments: 1,
        measured=measured,
        sanitized=({**PLAIN, "student": "fp32", "hard": "smooth"}, {**PLAIN, "cols": 2000}),
        headlines={
            "bf16-100": {**PLAIN, "cols": 100},
            "bf16-1000": PLAIN,
            "fp32-1000": {**PLAIN, "student": "fp32", "teacher": "fp32"},
            "bf16-2001-reverse": {
                **PLAIN, "cols": 2001, "divergence": "reverse_kl", "hard": "smooth"
            },
        },
        architecture="_architecture",
        faults=(
            {**PLAIN, "cols": 100, "hard": "smooth", "student": "fp32"},
            {**PLAIN, "cols": 10, "divergence": "reverse_kl", "layout": "padded"},
            {**PLAIN, "cols": 1001, "layout": "padded", "student": "fp16"},
            {**PLAIN, "cols": 1001, "layout": "next_token", "divergence": "reverse_kl"},
            {**PLAIN, "cols": 1000, "layout": "far", "temperature": 1.0, "hard": "none"},
            {**PLAIN, "cols": 1000, "divergence": "none"},
        ),
    ),
    TritonKernel(
        name="_kd_blocks_kernel",
        module=MODULE,
        factors={"cols": (9000, 9001), **FACTORS},
        possible=lambda config: not in_registers(config),
        call=call_forward,
        check=check_forward,
        tile=tile,
        least=least_forward,
        passes=lambda arguments: 2,
        measured=measured,
        headlines={
            "bf16-50257": WIDE,
            "bf16-50257-soft": {**WIDE, "hard": "none", "temperature": 1.0},
            "bf16-50257-hard": {**WIDE, "divergence": "none", "hard": "smooth"},
            "bf16-50257-reverse": {**WIDE, "divergence": "reverse_kl", "hard": "smooth"},
            "bf16-50257-values": {**WIDE, "grad": False},
            "fp32-50257": {**WIDE, "student": "fp32", "teacher": "fp32"},
            "fp16-50257-reverse": {
                **WIDE, "student": "fp16", "teacher": "fp16", "divergence": "reverse_kl"
            },
        },
        architecture="_architecture",
        faults=(
            {**PLAIN, "cols": 9001, "hard": "smooth", "student": "fp32"},
            {**PLAIN, "cols": 9001, "layout": "padded", "student": "fp16",
             "divergence": "reverse_kl"},
            {**PLAIN, "cols": 9000, "layout": "far", "temperature": 1.0},
            {**PLAIN, "cols": 9001, "layout": "next_token"},
            {**PLAIN, "cols": 9000, "divergence": "none"},
        ),
        harmless=HARMLESS_FORWARD,
        not_sanitized="it branches on the row's weight, which is loaded",
    ),
    TritonKernel(
        name="_kd_scale_kernel",
        module=MODULE,
        factors={
            "cols": (10, 1000, 1001, 9001),
            "student": tuple(DTYPES),
            "per_row": (True, False),
            "in_place": (True, False),
            "target": TARGETS,
        },
        possible=lambda config: True,
        call=call_scale,
        check=check_scale,
        tile=tile,
        least=least_scale,
        passes=lambda arguments: 1,
        headlines={
            f"{dtype}-50257": {
                "cols": 50257, "student": dtype, "per_row": False, "in_place": True,
                "target": "sm_90",
            }
            for dtype in ("bf16", "fp16", "fp32")
        },
        architecture="_architecture",
        faults=tuple(
            {"cols": cols, "student": dtype, "per_row": per_row, "in_place": in_place,
             "target": "sm_90"}
            for cols, dtype, per_row, in_place in (
                (10, "fp32", True, False), (1001, "fp16", False, False),
                (9001, "bf16", True, True), (1001, "bf16", False, True),
            )
        ),
        harmless=HARMLESS_SCALE,
        not_sanitized="it branches on its factors, which are loaded",
    ),
)  # fmt: skip


_NO_CHUNK = "a chunk beyond the row's end reads nothing and stores nothing"
HARMLESS_CUDA = {
    "mask loosened: kd.cuh: const bool near = fabsf(u) < kNear;":
        "no mask: where a series takes over, which is still good to 1e-5 at |u| = 1.1",
    "tail missing: chunk.cuh: for (int i = 0; i < kChunk; i += 2) "
    "round_pair(x[i], x[i + 1], y + i);":
        "steps of 2 up to 8: the last is at 6",
    "mask loosened: kd.cuh: for (int k = 0; k < kChunks; k++) {":
        "chunk k of a lane is used only where it is < row.chunks",
    "mask loosened: kd.cuh: for (int k = 0; k < kChunks; k++) { (#2)":
        "chunk k of a lane is used only where it is < row.chunks",
    "mask loosened: kd.cuh: if (j < row.chunks) {": _NO_CHUNK,
    "mask loosened: kd.cuh: for (int j = Block::rank(); j < row.chunks; j += Block::size()) { (#3)":
        _NO_CHUNK,
    "mask loosened: kd.cuh: for (int j = Group::rank(); j < row.chunks; j += Group::size()) {":
        _NO_CHUNK,
}  # fmt: skip
HARMLESS_CUDA_SCALE = {
    "mask loosened: kd.cuh: for (int first = Group::rank() * kChunk - shift; first < cols; "
    "first += Group::size() * kChunk) {": _NO_CHUNK,
    "offset of 32 bits: kd.cuh: float factor = a.grad_output[r * a.grad_output_step];":
        "the step is 0 or 1: it differs from 2^31 rows on",
}  # fmt: skip

CUDA = (
    CudaKernel(
        name="kd_forward",
        room="kd",
        source="kd.cuh",
        probe="probe_kd.cu",
        headers=("kd.cuh", "chunk.cuh", "group.cuh"),
        harmless=HARMLESS_CUDA,
    ),
    CudaKernel(
        name="scale_rows",
        room="kd",
        source="kd.cuh",
        probe="probe_kd.cu",
        headers=("kd.cuh", "chunk.cuh"),
        harmless=HARMLESS_CUDA_SCALE,
    ),
)

KERNELS = (*TRITON, *CUDA)
