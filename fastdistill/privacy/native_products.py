"""Launcher of the CPU kernels that make per-sample gradients (csrc/cpu/products.h, norms.h)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdistill.privacy import native

if TYPE_CHECKING:
    from fastdistill.privacy.products import Patches


def linear(a: Tensor, g: Tensor, made: Tensor) -> Tensor:
    """`products.linear` on the CPU.

    Raises:
        ValueError: shapes that do not belong together: the kernel would leave the tensors.
    """
    a, g = _rows(a), _rows(g)
    samples, rows, inputs = a.shape
    if g.shape[:2] != a.shape[:2] or made.numel() < samples * g.shape[2] * inputs:
        raise ValueError(
            f"g, made: expected a gradient of shape {[samples, rows]} + [p] and at least "
            f"{samples} * p * {inputs} elements, got {list(g.shape)} and {made.numel()}"
        )
    square = torch.empty(samples, dtype=torch.float64)
    native._module().linear_products(
        a.dtype is torch.float64,
        a.data_ptr(),
        a.stride(0),
        a.stride(1),
        g.data_ptr(),
        g.stride(0),
        g.stride(1),
        samples,
        rows,
        inputs,
        g.shape[2],
        made.data_ptr(),
        square.data_ptr(),
        torch.get_num_threads(),
    )
    return square


def _rows(x: Tensor) -> Tensor:
    """Whose last dimension is dense."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def convolution(x: Tensor, g: Tensor, patches: Patches, made: Tensor) -> Tensor:
    """`products.convolution` on the CPU.

    Raises:
        ValueError: gradients of other outputs than the convolution has: the kernel would follow
            them out of the image.
    """
    x, g = _images(x), _images(g)  # held until the call is over
    square = torch.empty(len(x), dtype=torch.float64)
    groups = patches.groups
    (kh, kw), outputs = patches.kernel, (len(x), g.shape[1], *patches.outputs(x))
    size = len(x) * g.shape[1] * (x.shape[1] // groups) * kh * kw
    if g.shape != outputs or made.numel() != size:
        raise ValueError(
            f"g, made: expected a gradient of shape {list(outputs)} and {size} elements, got "
            f"{list(g.shape)} and {made.numel()}"
        )
    native._module().convolution_products(
        x.dtype is torch.float64,
        x.data_ptr(),
        g.data_ptr(),
        len(x),
        groups,
        x.shape[1] // groups,
        g.shape[1] // groups,
        x.shape[2:],
        g.shape[2:],
        patches.kernel,
        patches.stride,
        patches.dilation,
        patches.padding,
        made.data_ptr(),
        square.data_ptr(),
        torch.get_num_threads(),
    )
    return square


def weighted_sum(factor: Tensor, x: Tensor) -> Tensor:
    """`products.weighted_sum` on the CPU."""
    x, factor = x.contiguous(), factor.contiguous()  # held until the call is over
    size = x.shape[1:].numel()
    out = x.new_empty(x.shape[1:])
    native._module().weighted_sum(
        x.dtype is torch.float64,
        x.data_ptr(),
        factor.data_ptr(),
        len(x),
        size,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def norm_sums(
    x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """`products.norm_sums` on the CPU.

    Raises:
        ValueError: shapes that do not belong together: the kernel would leave the tensors.
    """
    x, g, mean, rstd = (t.contiguous() for t in (x, g, mean, rstd))  # held until the call is over
    samples, rows, cols = x.shape
    means = (samples, groups or rows)
    if g.shape != x.shape or mean.shape != means or rstd.shape != means:
        raise ValueError(
            f"g, mean, rstd: expected shapes {list(x.shape)} and twice {list(means)}, got "
            f"{list(g.shape)}, {list(mean.shape)} and {list(rstd.shape)}"
        )
    weight, bias = (x.new_empty(samples, rows if groups else cols) for _ in range(2))
    native._module().norm_sums(
        x.dtype is torch.float64,
        x.data_ptr(),
        g.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        samples,
        rows,
        cols,
        groups,
        weight.data_ptr(),
        bias.data_ptr(),
        torch.get_num_threads(),
    )
    return weight, bias


def _images(x: Tensor) -> Tensor:
    """Dense [B, C, H, W]."""
    return (x.unsqueeze(2) if x.ndim == 3 else x).contiguous()
