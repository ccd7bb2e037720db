"""Per-sample gradients of weights, made in memory that is given, with their square norms.

The kernels of the CPU take each sample by itself, in one order of additions: the bits of its
product depend on no other sample, on no number of threads, and are the same when it is made again.
Elsewhere torch.bmm makes them, which may take another order for another batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill.privacy import native_products, release, sums

Pair = tuple[int, int]


def by_kernel(x: Tensor) -> bool:
    """Whether the CPU's kernels make the products of such tensors.

    Raises:
        RuntimeError: the backend that is asked for cannot run here.
    """
    return release.choose(sums.OP, [x]) == "cpu"


def linear(a: Tensor, g: Tensor, made: Tensor) -> Tensor:
    """G_i' A_i for each sample i.

    Args:
        a: inputs [B, T, d], float32 or float64.
        g: gradients of the outputs [B, T, p], likewise.
        made: dense [B, p, d], written.

    Returns:
        The square norms of what was written, float64 [B].
    """
    if by_kernel(a):
        return native_products.linear(a, g, made)
    torch.bmm(g.mT, a, out=made)
    return sums.square_norms(made)


def outer_sum(a: Tensor, g: Tensor, factor: Tensor) -> Tensor:
    """sum_i c_i g_i' a_i, for samples of one row each.

    Args:
        a: inputs [B, d], float32 or float64.
        g: gradients of the outputs [B, p], likewise.
        factor: c [B], float64, and numbers of the type of the others.

    Returns:
        [p, d], added up in that type, each number in the order of the samples where the kernels of
        the CPU do it.
    """
    g = g * factor.to(g.dtype)[:, None]
    if not by_kernel(a):
        return g.t() @ a
    out = a.new_empty(g.shape[1], a.shape[1])
    # One sample of B rows; threads share samples, so the kernel gets parts of the outputs as such.
    parts = min(torch.get_num_threads() * 4, max(len(out) // 24, 1))
    size = len(out) // parts
    native_products.linear(
        a.expand(parts, *a.shape),
        g[:, : parts * size].unflatten(1, (parts, size)).transpose(0, 1),
        out,
    )
    if rest := len(out) - parts * size:
        native_products.linear(a[None], g[None, :, -rest:], out[-rest:])
    return out


class Patches(NamedTuple):
    """What a convolution's output is made of; Conv1d is Conv2d of images one pixel high."""

    kernel: Pair  # height, width
    stride: Pair
    dilation: Pair
    padding: Pair  # with zeros, on both sides
    groups: int

    @classmethod
    def of(
        cls,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        dilation: tuple[int, ...],
        padding: tuple[int, ...],
        groups: int,
    ) -> Patches:
        """From a layer's own numbers, of one dimension or two."""

        def pair(numbers: tuple[int, ...], other: int) -> Pair:
            return numbers[0] if len(numbers) == 2 else other, numbers[-1]

        return cls(pair(kernel, 1), pair(stride, 1), pair(dilation, 1), pair(padding, 0), groups)

    def outputs(self, images: Tensor) -> tuple[int, int]:
        """Height and width of what the convolution makes of [b, C, H, W]."""
        rows, columns = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, d, p in zip(
                images.shape[2:], self.kernel, self.stride, self.dilation, self.padding, strict=True
            )
        )
        return rows, columns

    def unfold(self, images: Tensor) -> Tensor:
        """[b, C, H, W] or [b, C, W] as [b, C k, L], columns for `groups` products.

        Copied through a view of strides: F.unfold takes up to twice as long.
        """
        images = images.unsqueeze(2) if images.ndim == 3 else images
        (kh, kw), (sh, sw), (dh, dw), (ph, pw), _ = self
        rows, columns = self.outputs(images)
        images = F.pad(images.contiguous(), (pw, pw, ph, ph))
        b, c = images.shape[:2]
        n, of_c, of_h, of_w = images.stride()
        patches = images.as_strided(
            (b, c, kh, kw, rows, columns), (n, of_c, of_h * dh, of_w * dw, of_h * sh, of_w * sw)
        )
        return patches.reshape(b, c * kh * kw, rows * columns)

    def columns(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Patches [b groups, C k / groups, L] and output gradients [b groups, O / groups, L]."""
        patches = self.unfold(x)
        b, rows, length = patches.shape
        patches = patches.reshape(b * self.groups, rows // self.groups, length)
        return patches, g.reshape(b * self.groups, g.shape[1] // self.groups, length)


def convolution(x: Tensor, g: Tensor, patches: Patches, made: Tensor, kernel: bool) -> Tensor:
    """The weight's gradient for each sample.

    Args:
        x: inputs [B, C, H, W] or [B, C, W], float32 or float64.
        g: gradients of the outputs [B, O, ...], likewise.
        patches: of the layer.
        made: dense [B, numel of the weight], written: in the order that `weights` knows.
        kernel: what `by_kernel` said.

    Returns:
        The square norms of what was written, float64 [B].
    """
    if kernel:
        return native_products.convolution(x, g, patches, made)
    columns, g = patches.columns(x, g)
    torch.bmm(g, columns.mT, out=made.view(len(g), g.shape[1], columns.shape[1]))
    return sums.square_norms(made)


def weights(made: Tensor, shape: torch.Size, groups: int, kernel: bool) -> Tensor:
    """What `convolution` made, or a sum of it, [..., numel], as [..., *shape]."""
    if not kernel:
        return made.view(*made.shape[:-1], *shape)
    outputs = shape[0] // groups
    inner = made.view(*made.shape[:-1], groups, made.shape[-1] // max(shape[0], 1), outputs)
    return inner.mT.reshape(*made.shape[:-1], *shape)


def weighted_sum(factor: Tensor, x: Tensor) -> Tensor:
    """sum_i c_i x_i.

    Args:
        factor: float64 [B], numbers of float32 where `x` is.
        x: [B, ...], float32 or float64, finite.

    Returns:
        [...], of the type of `x`, added up in it.
    """
    if by_kernel(x):
        return native_products.weighted_sum(factor, x)
    rows = x.reshape(len(x), x.shape[1:].numel())
    return (factor.to(x.dtype)[None] @ rows).view(x.shape[1:])


def norm_sums(
    x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """The gradients of LayerNorm's or GroupNorm's weight and bias for each sample.

    Args:
        x: inputs [B, rows, cols], float32 or float64; the others are of its type.
        g: gradients of the outputs, likewise.
        mean, rstd: of each row, [B, rows]; or of each group of rows, [B, groups].
        groups: 0 for LayerNorm, which has a weight for each column; GroupNorm has one for each row.

    Returns:
        sum (x - mean) rstd g, and sum g: over rows [B, cols], or over columns [B, rows].
    """
    if by_kernel(x):
        return native_products.norm_sums(x, g, mean, rstd, groups)
    blocks = x.reshape(len(x), groups, x.shape[1] // groups * x.shape[2]) if groups else x
    normal = ((blocks - mean[..., None]) * rstd[..., None]).view(x.shape)
    over = 2 if groups else 1
    return (normal * g).sum(over), g.sum(over)
