"""The kernels of fastdistill.hint."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from entries import DTYPES, TARGETS, Config, CudaKernel, Least, TritonKernel
from inputs import far_apart, strided
from torch import Tensor

from fastdistill.hint import reference

MODULE = "fastdistill.hint.triton"
DISTANCES = ("mse", "l1", "smooth_l1", "cosine")
NORMS = ("none", "layer_norm", "l2")
HIGH = 2.5  # the factor of a row

ROW: Config = {
    "student": "bf16",
    "teacher": "bf16",
    "cols": 1024,
    "distance": "mse",
    "student_norm": "none",
    "teacher_norm": "none",
    "bias": False,
    "grad": True,
    "layout": "dense",
    "target": "sm_90",
}
SHAPES = {"small": (5, 37, 90), "tiles": (70, 64, 160), "large": (4096, 768, 1024)}
"""name -> (rows, features of the student, of the teacher)"""
PROJECT: Config = {
    "student": "bf16",
    "teacher": "bf16",
    "shape": "large",
    "distance": "mse",
    "tf32": True,
    "bias": True,
    "grad": True,
    "layout": "dense",
    "target": "sm_90",
}

# ----------------------------------------------------------------------------------------------
# Calls.


def double(config: Config) -> bool:
    return "fp64" in (config["student"], config["teacher"])


def row_inputs(config: Config) -> list[Any]:
    """(student, teacher, bias or None, factors, gradient or None, distances); one row dropped."""
    torch.manual_seed(0)
    s, t = strided(config, config["student"], 8), strided(config, config["teacher"], 47)
    dtype = torch.float64 if double(config) else torch.float32
    bias = torch.randn(s.shape[1], dtype=dtype) if config["bias"] else None
    # What a row writes beside it shows where it is the last one.
    last = config["layout"] == "padded"
    factors = torch.tensor([1.0, HIGH, 0.0] if last else [1.0, 0.0, HIGH], dtype=dtype)
    grad = torch.empty(s.shape, dtype=s.dtype) if config["grad"] else None
    return [s, t, bias, factors, grad, torch.empty(len(s), dtype=dtype)]


def of_rows(module: ModuleType, config: Config, inputs: list[Any]) -> None:
    norms = (config["student_norm"], config["teacher_norm"])
    module._rows(config["distance"], *norms, *inputs)


def call_rows(module: ModuleType, config: Config) -> None:
    of_rows(module, config, row_inputs(config))


def oracle(
    config: Config, s: Tensor, t: Tensor, bias: Tensor | None, factors: Tensor, norms: Any
) -> tuple[Tensor, Tensor]:
    """(distances, gradient of their sum times the factors) in the arithmetic of the inputs."""
    wide = s.dtype if s.dtype is torch.float64 else torch.float32
    s = s.detach().to(wide).requires_grad_()
    shifted = s if bias is None else s + bias.to(wide)
    distance = reference.DISTANCES[config["distance"]](
        reference.NORMS[norms[0]](shifted), reference.NORMS[norms[1]](t.to(wide))
    )
    distance = torch.where(factors == 0, 0.0, distance)
    (grad,) = torch.autograd.grad((distance * factors.to(wide)).sum(), s)
    return distance.detach(), grad


def check_rows(module: ModuleType, config: Config) -> None:
    """Distances and gradient within the suite's budget of float64."""
    from budget import assert_within

    inputs = row_inputs(config)
    s, t, bias, factors, grad, loss = inputs
    of_rows(module, config, inputs)
    norms = (config["student_norm"], config["teacher_norm"])
    own = torch.float64 if double(config) else torch.float32
    want = oracle(config, s.double(), t.double(), bias, factors, norms)
    native = oracle(config, s.to(own), t.to(own), bias, factors, norms)
    assert_within("distance", *(x.unsqueeze(-1) for x in (loss, want[0], native[0])))
    if grad is not None:
        assert_within("gradient", grad, want[1], native[1])


def project_inputs(config: Config) -> list[Any]:
    """(student, weight, bias or None, teacher, factors, residual or None, distances)."""
    torch.manual_seed(0)
    rows, narrow, features = SHAPES[config["shape"]]
    dtype = DTYPES[config["student"]]
    s, w = torch.randn(rows, narrow).to(dtype), torch.randn(features, narrow).to(dtype) / 8
    t = torch.randn(rows, features).to(DTYPES[config["teacher"]])
    factors = torch.full((rows,), HIGH)
    factors[1], factors[-1] = 0.0, 0.5
    bias = torch.randn(features) if config["bias"] else None
    residual = torch.empty(rows, features, dtype=dtype) if config["grad"] else None
    s[1] = t[1] = float("nan")  # dropped
    if config["layout"] == "padded":
        s, t = (torch.cat([x, torch.full((rows, 16), float("nan")).to(x)], 1) for x in (s, t))
        s, t = s[:, :narrow], t[:, :features]
    elif config["layout"] == "far":
        s, t = far_apart(s), far_apart(t)
    return [s, w, bias, t, factors, residual, torch.empty(rows)]


def of_project(module: ModuleType, config: Config, inputs: list[Any]) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = config["tf32"]
    try:
        module._project(config["distance"], *inputs)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def call_project(module: ModuleType, config: Config) -> None:
    of_project(module, config, project_inputs(config))


def check_project(module: ModuleType, config: Config) -> None:
    """Distances and residual within the suite's budget of float64."""
    from budget import assert_within

    inputs = project_inputs(config)
    s, w, bias, t, factors, residual, loss = inputs
    of_project(module, config, inputs)
    kept = factors != 0

    def project(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        p = torch.where(kept[:, None], s, 0).to(dtype) @ w.to(dtype).t()
        wanted = torch.where(kept[:, None], t, 0).to(dtype)
        return oracle(config, p, wanted, bias, factors, ("none", "none"))

    want, native = project(torch.float64), project(torch.float32)
    loss = torch.where(kept, loss, 0.0)
    assert_within("distance", *(x.unsqueeze(-1) for x in (loss, want[0], native[0])))
    if residual is not None:
        assert_within("residual", residual, want[1], native[1])


# ----------------------------------------------------------------------------------------------
# Entries.


def row_passes(arguments: Mapping[str, Any]) -> float:
    """How often a row is read: the passes of the kernel's own comments."""
    centred = 1 in (arguments["S_NORM"], arguments["T_NORM"])
    cosine = arguments["DISTANCE"] == 3
    sized = cosine or arguments["S_NORM"] != 0 or arguments["T_NORM"] != 0
    late = arguments["g_ptr"] is not None and (cosine or arguments["S_NORM"] != 0)
    return 1 + centred + sized + late * (1 + (arguments["S_NORM"] != 0))


def least_rows(config: Config) -> Least:
    student = DTYPES[config["student"]].itemsize
    return Least(student + DTYPES[config["teacher"]].itemsize, student * config["grad"])


def least_project(config: Config) -> Least:
    """Of one multiply-add, of rows x features x narrow: each operand is read once."""
    rows, _, features = SHAPES[config["shape"]]
    width = DTYPES[config["student"]].itemsize
    return Least(width / features + width / rows, 0.0, 0.0, 2.0)


def project_passes(arguments: Mapping[str, Any]) -> float:
    """A tile of the product reads its own rows of both operands."""
    rows, features = arguments["rows"], arguments["features"]
    tile = 1 / arguments["BLOCK_M"] + 1 / arguments["BLOCK_N"]
    return tile / (1 / rows + 1 / features)


def project_tile(arguments: Mapping[str, Any]) -> int:
    return arguments["BLOCK_M"] * arguments["BLOCK_N"] * arguments["BLOCK_K"]


_WIDENED = "it meets a float32 in the next operation, which widens it as this does"
_TOO_LARGE = (
    "it differs where a weight, or a part for each tile and row, has 2^31 elements: no test can"
)
_NARROW = "arithmetic in the narrow type: "
HARMLESS_ROWS = {
    _NARROW + "_pair: tl.load(s_ptr + column, mask=inside, other=0.0).to(DTYPE)": _WIDENED,
    _NARROW + "_pair: tl.load(t_ptr + column, mask=inside, other=0.0).to(DTYPE)": _WIDENED,
    _NARROW + "_pair: tl.load(bias_ptr + column, mask=inside, other=0.0).to(DTYPE)":
        "it has that type already",
    _NARROW + "_rows_kernel: tl.load(factor_ptr + row).to(DTYPE)": "it has that type already",
}  # fmt: skip
HARMLESS_PROJECT = {
    f"offset of 32 bits: _project_kernel: tl.int64 (#{nth})": _TOO_LARGE for nth in (2, 3)
}

TRITON = (
    TritonKernel(
        name="_rows_kernel",
        module=MODULE,
        factors={
            "student": tuple(DTYPES),
            "teacher": tuple(DTYPES),
            "cols": (10, 100, 768, 1041, 2048),
            "distance": DISTANCES,
            "student_norm": NORMS,
            "teacher_norm": NORMS,
            "bias": (True, False),
            "grad": (True, False),
            "layout": ("dense", "padded"),
            "target": TARGETS,
        },
        possible=lambda config: True,
        call=call_rows,
        check=check_rows,
        tile=lambda arguments: arguments["BLOCK"],
        least=least_rows,
        passes=row_passes,
        headlines={
            "bf16-1024": ROW,
            "fp32-1024-cosine": {
                **ROW, "student": "fp32", "teacher": "fp32", "distance": "cosine",
                "student_norm": "layer_norm", "teacher_norm": "layer_norm",
            },
        },
        architecture="architecture",
        faults=(
            {**ROW, "cols": 100, "student": "fp32", "bias": True, "layout": "padded",
             "student_norm": "l2", "teacher_norm": "layer_norm"},
            {**ROW, "cols": 1041, "student": "fp16", "distance": "cosine",
             "student_norm": "layer_norm", "bias": True},
            {**ROW, "cols": 1041, "distance": "smooth_l1", "layout": "padded"},
            {**ROW, "cols": 2048, "layout": "far", "student": "fp32", "distance": "l1"},
            {**ROW, "cols": 2100, "distance": "cosine", "teacher_norm": "l2"},
            {**ROW, "cols": 10, "student": "fp32", "teacher": "fp32",
             "student_norm": "layer_norm"},
        ),
        harmless=HARMLESS_ROWS,
        not_sanitized="it branches on the row's factor, which is loaded",
    ),
    TritonKernel(
        name="_project_kernel",
        module=MODULE,
        factors={
            "student": ("fp32", "bf16", "fp16"),
            "teacher": ("fp32", "bf16", "fp16"),
            "shape": ("small", "tiles"),
            "distance": DISTANCES[:3],
            "tf32": (True, False),
            "bias": (True, False),
            "grad": (True, False),
            "layout": ("dense", "padded"),
            "target": TARGETS,
        },
        possible=lambda config: True,
        call=call_project,
        check=check_project,
        tile=project_tile,
        least=least_project,
        passes=project_passes,
        headlines={"bf16": PROJECT},
        architecture="architecture",
        faults=(
            {**PROJECT, "shape": "small", "student": "fp32", "tf32": False},
            {**PROJECT, "shape": "tiles"},
            {**PROJECT, "shape": "small", "student": "fp16", "distance": "smooth_l1",
             "layout": "far"},
        ),
        harmless=HARMLESS_PROJECT,
        not_sanitized="its masks are of the rows' factors, which are loaded",
    ),
)  # fmt: skip

_NO_CHUNK = "a chunk beyond the row's end reads nothing and stores nothing"
HARMLESS_CUDA = {
    "tail missing: chunk.cuh: for (int i = 0; i < kChunk; i += 2) "
    "round_pair(x[i], x[i + 1], y + i);":
        "steps of 2 up to 8: the last is at 6",
    "mask loosened: hint.cuh: for (int j = Group::rank(); j < chunks; j += Group::size()) {":
        _NO_CHUNK,
    "mask loosened: hint.cuh: for (int j = Group::rank(); j < row.chunks; j += Group::size()) {":
        _NO_CHUNK,
}  # fmt: skip

CUDA = (
    CudaKernel(
        name="hint_rows",
        room="hint",
        source="hint.cuh",
        probe="probe_hint.cu",
        headers=("hint.cuh", "chunk.cuh", "group.cuh"),
        harmless=HARMLESS_CUDA,
    ),
)

KERNELS = (*TRITON, *CUDA)
