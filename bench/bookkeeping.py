"""Book-keeping (Bu et al. 2023) as one writes it in eager PyTorch: the rival of `bench private`.

One backward pass through frozen layers, hooks that keep inputs and output gradients, norms by Gram
matrices, sums by weighted products; all in the models' own type, noise by torch.normal.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kept = tuple[nn.Module, Tensor, Tensor]


class BookKeeping:
    """A model whose `backward` leaves private gradients in `parameters`."""

    def __init__(self, model: nn.Module, norm: float, sigma: float, expected: int) -> None:
        self.model, self.norm, self.sigma, self.expected = model, norm, sigma, expected
        self.kept: list[Kept] = []
        self.parameters = list(model.parameters())
        for p in self.parameters:
            p.requires_grad_(False)
        for layer in model.modules():
            if list(layer.parameters(recurse=False)):
                layer.register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output = output if output.requires_grad else output.requires_grad_()
        x = inputs[0].detach()
        output.register_hook(lambda g: self.kept.append((layer, x, g)))
        return output

    def backward(self, loss: Tensor) -> None:
        self.kept.clear()
        loss.backward()
        with torch.no_grad():
            found = [_Layer(*kept) for kept in self.kept]
            norms = torch.stack([f.square() for f in found]).sum(0).clamp(min=0).sqrt()
            factor = (self.norm / (norms + 1e-6)).clamp(max=1)
            for f in found:
                for p, total in f.sums(factor):
                    noise = torch.normal(0.0, self.sigma * self.norm, total.shape)
                    p.grad = ((total + noise) / self.expected).view_as(p)


class _Layer:
    """What one layer adds to the square norms, and its weighted sums."""

    def __init__(self, layer: nn.Module, x: Tensor, g: Tensor) -> None:
        self.layer, self.x, self.g = layer, x, g
        if isinstance(layer, nn.Linear) and x.ndim == 2:
            self.x, self.g = x.unsqueeze(1), g.unsqueeze(1)
        if isinstance(layer, nn.Conv2d):
            patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            self.each = torch.einsum("bol,bkl->bok", g.flatten(2), patches)
        if isinstance(layer, nn.LayerNorm):
            self.each = (F.layer_norm(x, layer.normalized_shape) * g).flatten(1, -2).sum(1)
            self.bias = g.flatten(1, -2).sum(1)
        if isinstance(layer, nn.GroupNorm):
            self.each = (F.group_norm(x, layer.num_groups) * g).flatten(2).sum(2)
            self.bias = g.flatten(2).sum(2)

    def square(self) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            gram = self.g @ self.g.mT
            return ((self.x @ self.x.mT) * gram).sum((1, 2)) + gram.sum((1, 2))
        if isinstance(self.layer, nn.Embedding):
            same = self.x.unsqueeze(1) == self.x.unsqueeze(2)
            return ((self.g @ self.g.mT) * same).sum((1, 2))
        found = self.each.flatten(1).square().sum(1)
        return found if isinstance(self.layer, nn.Conv2d) else found + self.bias.square().sum(1)

    def sums(self, c: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        layer = self.layer
        if isinstance(layer, nn.Linear):
            g = self.g * c[:, None, None]
            weight = g.flatten(0, 1).t() @ self.x.flatten(0, 1)
            return [(layer.weight, weight), (layer.bias, g.sum((0, 1)))]
        if isinstance(layer, nn.Embedding):
            rows = (self.g * c[:, None, None]).flatten(0, 1)
            out = torch.zeros_like(layer.weight).index_add_(0, self.x.flatten(), rows)
            return [(layer.weight, out)]
        found = [(layer.weight, (c @ self.each.flatten(1)))]
        return found if isinstance(layer, nn.Conv2d) else [*found, (layer.bias, c @ self.bias)]
