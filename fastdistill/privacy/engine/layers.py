"""The layers whose per-sample gradients are known as products or sums, and a way for the others.

`LAYERS` is looked up by the exact type of a layer, as Opacus does. A layer that is not in it goes
by Opacus's own sampler for its type, or else by functorch, which runs the layer again for each
sample; `find` says which.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient, prepare_layer
from opacus.layers import DPMultiheadAttention
from opacus.layers.dp_rnn import RNNLinear
from torch import Tensor, nn

from fastdistill.privacy import products
from fastdistill.privacy.engine.capture import Rule
from fastdistill.privacy.engine.gradients import Dense, Images, Lookups, Pairs, Piece, wide
from fastdistill.privacy.products import Patches

Kept = tuple[Tensor, ...]
Pieces = list[tuple[Tensor, Piece]]


class _Layer:
    """What most rules share."""

    def prepare(self, layer: Any, x: Tensor) -> Tensor:
        """The input as `run` takes it."""
        return x

    def input_gradient(self, layer: Any, x: Tensor, kept: Kept, grad: Tensor) -> Tensor | None:
        """The gradient of the input."""
        raise NotImplementedError


def _rows(x: Tensor) -> Tensor:
    """[B, d], [B, T, d] or [B, ..., d] as [B, T, d]."""
    return x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)


def _summed(x: Tensor) -> Tensor:
    """The sum over the rows of [B, ..., d], [B, d]."""
    x = wide(x)
    return x if x.ndim == 2 else x.flatten(1, -2).sum(1)


class _Linear(_Layer):
    """g_i = sum_t G_it A_it'; the bias: sum_t G_it."""

    def run(self, layer: nn.Linear, x: Tensor) -> tuple[Tensor, Kept]:
        """The output."""
        return F.linear(x, layer.weight, layer.bias), ()

    def input_gradient(self, layer: nn.Linear, x: Tensor, kept: Kept, grad: Tensor) -> Tensor:
        """G W."""
        return (grad @ layer.weight.to(grad.dtype)).to(x.dtype)

    def pieces(self, layer: nn.Linear, x: Tensor, kept: Kept, grad: Tensor) -> Pieces:
        """Of weight and bias."""
        out: Pieces = []
        if layer.weight.requires_grad:
            out.append((layer.weight, Pairs(_rows(x), _rows(grad))))
        if layer.bias is not None and layer.bias.requires_grad:
            out.append((layer.bias, Dense(_summed(grad))))
        return out


class _Embedding(_Layer):
    """Row `token` gets what the output at the token gets; the row of `padding_idx` nothing."""

    def run(self, layer: nn.Embedding, x: Tensor) -> tuple[Tensor, Kept]:
        """The output."""
        return F.embedding(x, layer.weight, layer.padding_idx), ()

    def input_gradient(self, layer: nn.Embedding, x: Tensor, kept: Kept, grad: Tensor) -> None:
        """Tokens have none."""

    def pieces(self, layer: nn.Embedding, x: Tensor, kept: Kept, grad: Tensor) -> Pieces:
        """Of the table."""
        tokens = x.reshape(len(x), x.shape[1:].numel())
        g = grad.reshape(*tokens.shape, grad.shape[-1])
        return [(layer.weight, Lookups(tokens, g, layer.num_embeddings, layer.padding_idx))]


def _of_both(layer: nn.LayerNorm | nn.GroupNorm, sums: tuple[Tensor, Tensor]) -> Pieces:
    """Weight and bias of a normalisation, as far as they are there and trained."""
    return [
        (p, Dense(total.view(len(total), *p.shape)))
        for p, total in zip((layer.weight, layer.bias), sums, strict=True)
        if p is not None and p.requires_grad
    ]


class _LayerNorm(_Layer):
    """Weight: sum over rows of x^ G, x^ the normalised input; bias: of G."""

    def prepare(self, layer: nn.LayerNorm, x: Tensor) -> Tensor:
        """In the type of the weight, as autocast has it."""
        return x.to(layer.weight.dtype)

    def run(self, layer: nn.LayerNorm, x: Tensor) -> tuple[Tensor, Kept]:
        """The output; mean and 1 / deviation are kept."""
        y, mean, rstd = torch.native_layer_norm(
            x, layer.normalized_shape, layer.weight, layer.bias, layer.eps
        )
        return y, (mean, rstd)

    def input_gradient(self, layer: nn.LayerNorm, x: Tensor, kept: Kept, grad: Tensor) -> Tensor:
        """As torch has it."""
        found: tuple[Tensor, ...] = torch.ops.aten.native_layer_norm_backward(
            grad, x, layer.normalized_shape, *kept, layer.weight, layer.bias, [True, False, False]
        )
        return found[0]

    def pieces(self, layer: nn.LayerNorm, x: Tensor, kept: Kept, grad: Tensor) -> Pieces:
        """Of weight and bias."""
        cols = layer.weight.numel()
        means = x.shape[: x.ndim - len(layer.normalized_shape)]
        shape = (len(x), means[1:].numel(), cols)
        mean, rstd = (wide(k).reshape(shape[:2]) for k in kept)
        sums = products.norm_sums(
            wide(x).reshape(shape), wide(grad).reshape(shape), mean, rstd, groups=0
        )
        return _of_both(layer, sums)


class _GroupNorm(_Layer):
    """Weight: sum over positions of x^ G, x^ the normalised input; bias: of G."""

    def prepare(self, layer: nn.GroupNorm, x: Tensor) -> Tensor:
        """In the type of the weight, as autocast has it; dense."""
        return x.to(layer.weight.dtype).contiguous()

    def _sizes(self, layer: nn.GroupNorm, x: Tensor) -> tuple[int, int, int, int]:
        return x.shape[0], x.shape[1], x.shape[2:].numel(), layer.num_groups

    def run(self, layer: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Kept]:
        """The output; mean and 1 / deviation are kept."""
        y, mean, rstd = torch.native_group_norm(
            x, layer.weight, layer.bias, *self._sizes(layer, x), layer.eps
        )
        return y, (mean, rstd)

    def input_gradient(self, layer: nn.GroupNorm, x: Tensor, kept: Kept, grad: Tensor) -> Tensor:
        """As torch has it."""
        found: tuple[Tensor, ...] = torch.ops.aten.native_group_norm_backward(
            grad.contiguous(), x, *kept, layer.weight, *self._sizes(layer, x), [True, False, False]
        )
        return found[0]

    def pieces(self, layer: nn.GroupNorm, x: Tensor, kept: Kept, grad: Tensor) -> Pieces:
        """Of weight and bias."""
        n, channels, size, groups = self._sizes(layer, x)
        shape = (n, channels, size)
        mean, rstd = (wide(k).reshape(n, groups) for k in kept)
        sums = products.norm_sums(
            wide(x).reshape(shape), wide(grad).reshape(shape), mean, rstd, groups
        )
        return _of_both(layer, sums)


class _Convolution(_Layer):
    """g_i = G_i U(x_i)' with the unfolded input U(x_i) [C k, L]; the bias: sum over positions."""

    def _padding(self, layer: nn.Conv2d) -> tuple[int, ...]:
        """What the convolution itself adds on both sides."""
        if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
            return (0,) * len(layer.kernel_size)
        return layer.padding

    def prepare(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        """With the padding that the convolution cannot add itself.

        Raises:
            ValueError: there is no batch: channels would be taken for samples.
        """
        dimensions = 2 + len(layer.kernel_size)
        if x.ndim != dimensions:
            raise ValueError(
                f"module: {type(layer).__name__}: expected an input with {dimensions} dimensions, "
                f"the batch first, got shape {list(x.shape)}"
            )
        if layer.padding_mode != "zeros":
            return F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        if layer.padding == "same":
            return F.pad(x, layer._reversed_padding_repeated_twice)
        return x

    def run(self, layer: nn.Conv2d, x: Tensor) -> tuple[Tensor, Kept]:
        """The output."""
        convolve = F.conv1d if isinstance(layer, nn.Conv1d) else F.conv2d
        y = convolve(
            x, layer.weight, layer.bias, layer.stride, self._padding(layer), layer.dilation,
            layer.groups,
        )  # fmt: skip
        return y, ()

    def input_gradient(self, layer: nn.Conv2d, x: Tensor, kept: Kept, grad: Tensor) -> Tensor:
        """As torch has it."""
        dtype = grad.dtype
        found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
            grad, x.to(dtype), layer.weight.to(dtype), None, layer.stride, self._padding(layer),
            layer.dilation, False, [0] * len(layer.kernel_size), layer.groups,
            [True, False, False],
        )  # fmt: skip
        return found[0].to(x.dtype)

    def pieces(self, layer: nn.Conv2d, x: Tensor, kept: Kept, grad: Tensor) -> Pieces:
        """Of weight and bias."""
        patches = Patches.of(
            layer.kernel_size, layer.stride, layer.dilation, self._padding(layer), layer.groups
        )
        out: Pieces = []
        if layer.weight.requires_grad:
            out.append((layer.weight, Images(x, grad, patches, layer.weight.shape)))
        if layer.bias is not None and layer.bias.requires_grad:
            out.append((layer.bias, Dense(wide(grad).flatten(2).sum(2))))
        return out


LAYERS: dict[type[nn.Module], Rule] = {
    nn.Linear: _Linear(),
    RNNLinear: _Linear(),
    nn.Embedding: _Embedding(),
    nn.LayerNorm: _LayerNorm(),
    nn.GroupNorm: _GroupNorm(),
    nn.Conv1d: _Convolution(),
    nn.Conv2d: _Convolution(),
}

FUSED = "ghost_fused"
"""What `find` says of a layer in `LAYERS`."""


class Sampled(_Layer):
    """A layer without a rule: Opacus's sampler for its type, or functorch."""

    def __init__(self, sampler: Callable[..., dict[Tensor, Tensor]], inputs: int | None) -> None:
        self.sampler, self.inputs = sampler, inputs  # how many inputs it can take

    def run(self, layer: nn.Module, x: Tensor) -> tuple[Tensor, Kept]:
        """Not used: the layer runs as it is (`capture`)."""
        raise NotImplementedError

    def pieces(self, layer: nn.Module, x: Tensor, kept: Kept, grad: Tensor) -> Pieces:
        """Of all parameters."""
        if self.inputs is not None and 1 + len(kept) > self.inputs:
            raise ValueError(
                f"module: {type(layer).__name__}: expected {self.inputs} input (functorch runs the "
                f"layer again for each sample), got {1 + len(kept)}"
            )
        found = self.sampler(layer, [x, *kept], grad)
        return [(p, Dense(value)) for p, value in found.items() if p.requires_grad]


def find(layer: nn.Module, name: str, batch_first: bool) -> tuple[Rule, str]:
    """The layer's rule, and in words how its per-sample gradients are found.

    Raises:
        ValueError: an embedding's setting lets one sample change what others contribute.
    """
    rule = LAYERS.get(type(layer))
    if isinstance(layer, nn.Embedding):
        for setting in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(layer, setting):
                raise ValueError(
                    f"module: {name}: {setting}={getattr(layer, setting)}: expected an embedding "
                    "without it: samples would change each other's contribution, or none be dense"
                )
    if isinstance(layer, nn.EmbeddingBag):
        raise ValueError(
            f"module: {name or 'the module'} (EmbeddingBag): expected another layer: bags of many "
            "samples are one input; use Embedding, and sum or mean its output"
        )
    if rule is not None:
        return rule, FUSED
    sampler = GradSampleModule.GRAD_SAMPLERS.get(type(layer))
    if sampler is not None:
        return Sampled(sampler, None), f"Opacus's sampler {sampler.__name__}"
    prepare_layer(layer, batch_first=batch_first)
    return Sampled(ft_compute_per_sample_gradient, 1), "functorch, the layer run again"


def check_attention(name: str, attention: DPMultiheadAttention, batch_first: bool) -> None:
    """Refuse attention whose inner layers have the batch elsewhere.

    Where T = B nothing else would notice: places would be clipped in place of samples.
    """
    if not any(p.requires_grad for p in attention.parameters()):
        return
    if attention.batch_first != batch_first:
        raise ValueError(
            f"module: {name}: expected attention with batch_first={batch_first}, as make_private "
            f"has it, got {attention.batch_first}"
        )
    if batch_first and attention.add_bias_kv:
        raise ValueError(
            f"module: {name}: expected attention without add_bias_kv where batch_first=True: "
            "Opacus adds that bias to [T, B, d]"
        )


def forget(layer: nn.Module) -> None:
    """What `find` has left in the layer."""
    vars(layer).pop("ft_compute_sample_grad", None)
