"""Per-sample gradients of one parameter, kept as what they are made of.

A private gradient needs two things of the samples' gradients g_1 ... g_B: their square norms, and
then sum_i c_i g_i. Neither needs a tensor [B, *shape] if g_i is known as a product. Each class here
is a form in which a layer knows them, with

- `square()`: float64 [B], the square norms of what `total` adds (never less than them by more than
  float64's rounding);
- `select(kept)`: samples that are not kept become zero, whatever they hold (0 times NaN is NaN);
- `total(factor)`: sum_i c_i g_i, of the parameter's shape; the factors are float64 [B], and numbers
  of float32 where any gradient is.
  Every summand is one sample's own contribution, computed as for `square`, times its factor, and
  there is one for each sample: the error of the sum is then that of adding B numbers (`rounding`).
- `dense()`: [B, *shape].

All arithmetic is in float32, or float64 for float64: half types are widened first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastdistill.privacy import products
from fastdistill.privacy.products import Patches
from fastdistill.privacy.sums import square_norms

EPS64 = 2.0**-53
SHORT = 32
"""Rows of a sample below which its product is not made, but its Gram matrices are."""

GRAM_MARGIN = 2.0**-42
"""Added to the square norm of a Gram matrix, in units of (sum_t |a_t| |g_t|)^2.

It covers float64's rounding, (d + p + T^2) 2^-53 of it for T < 32 and d + p < 1000; and it keeps
c sum_t |a_t| |g_t| <= 2^21 C, so that the rounding of a float64 sum over samples stays small
however much cancels inside one."""


def rounding(samples: int, chunk: int) -> float:
    """By how much, in clip norms, the rounding of the sum can change with one sample.

    A sum of m numbers, in any order and any grouping, errs by at most e times the sum of the
    magnitudes of all its partial sums (e = 2^-24): with all samples at C, e C m (m + 1) / 2. Two
    neighbouring batches may err in opposite directions: twice that, over chunks of m of `samples`;
    chunks are added in float64. The second term is that of float64 sums under `GRAM_MARGIN`.
    """
    m = min(chunk, samples)
    exact = SHORT * samples * (m + 1) * EPS64 / GRAM_MARGIN**0.5
    return (2.0**-24 * samples * (m + 5) + exact) * (1 + 2.0**-10)


FAR = 2.0**80
"""A float32 input of larger norm counts as not finite where T = 1: its factor times the output's
gradient would be below float32's normal numbers and lose the bits that the bounds are of."""


def twice(terms: int, like: Tensor) -> float:
    """By how much, in units of sum_t |a_t| |g_t|, a product can differ from itself made again.

    The library may take another order for another alignment or batch; each errs by n u.
    """
    return 2 * (terms + 2) * torch.finfo(like.dtype).eps / 2


def wide(x: Tensor) -> Tensor:
    """In the type that sums are taken in."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the type that their product is taken in."""
    a, b = wide(a), wide(b)
    return (a, b) if a.dtype is b.dtype else (a.double(), b.double())


def only(kept: Tensor, x: Tensor) -> Tensor:
    """X [B, ...] with zeros for samples that are not kept: a select, not a product."""
    return torch.where(kept.view(-1, *(1,) * (x.ndim - 1)), x, torch.zeros((), dtype=x.dtype))


def add_rows(size: int, index: Tensor, rows: Tensor) -> Tensor:
    """[size, d] with each of `rows` [n, d] added at its index [n]; the same bits each time."""
    out = torch.zeros(size, rows.shape[1], dtype=rows.dtype, device=rows.device)
    if rows.device.type == "cpu":
        return out.index_add_(0, index, rows)
    return out.index_put_((index,), rows, accumulate=True)  # index_add_ has atomics on a GPU


class Workspace:
    """Memory for per-sample gradients, within a budget; its buffers last from step to step."""

    def __init__(self, budget: int) -> None:
        self.budget = budget  # bytes
        self.left = budget
        self._buffers: dict[tuple[object, torch.dtype, torch.device], Tensor] = {}

    def start(self) -> None:
        """A new backward pass: everything is free again.

        Buffers keep the size of their largest batch, and which layers fit depends on the batch: of
        batches of many sizes they come to more than any single step could take.
        """
        self.left = self.budget
        if self.held() > self.budget:
            self.release()

    def held(self) -> int:
        """Bytes of all buffers."""
        return sum(x.nbytes for x in self._buffers.values())

    def fits(self, elements: int, like: Tensor) -> bool:
        """Whether that many elements more are within the budget."""
        return elements * like.itemsize <= self.left

    def take(self, key: object, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialised tensor of the budget: the same memory each step for the same key."""
        elements = torch.Size(shape).numel()
        self.left -= elements * like.itemsize
        slot = (key, like.dtype, like.device)
        buffer = self._buffers.get(slot)
        if buffer is None or buffer.numel() < elements:
            self._buffers.pop(slot, None)
            buffer = torch.empty(elements, dtype=like.dtype, device=like.device)
            self._buffers[slot] = buffer
        return buffer[:elements].view(torch.Size(shape))

    def release(self) -> None:
        """Give the memory back."""
        self._buffers.clear()


class Gradient(ABC):
    """The per-sample gradients of one parameter from one backward pass."""

    samples: int
    shape: torch.Size  # the parameter's

    @abstractmethod
    def square(self) -> Tensor:
        """Square norms, float64 [B]."""

    @abstractmethod
    def select(self, kept: Tensor) -> None:
        """Zero for the samples that are not kept [B]."""

    @abstractmethod
    def _sum(self, factor: Tensor, part: slice) -> Tensor:
        """Of the samples in the slice, whose factors are given."""

    @abstractmethod
    def dense(self) -> Tensor:
        """[B, *shape]."""

    def total(self, factor: Tensor, chunk: int) -> Tensor:
        """The weighted sum, of the parameter's shape; float64 beyond `chunk` samples."""
        if self.samples <= chunk:
            return self._sum(factor, slice(None))
        total = torch.zeros(self.shape, dtype=torch.float64, device=factor.device)
        for i in range(0, self.samples, chunk):
            part = slice(i, min(i + chunk, self.samples))
            total += self._sum(factor[part], part)
        return total


class Dense(Gradient):
    """As they are: [B, *shape]."""

    def __init__(self, value: Tensor) -> None:
        self.value = wide(value)
        self.samples, self.shape = len(value), value.shape[1:]

    def square(self) -> Tensor:
        """Square norms, float64 [B]."""
        return square_norms(self.value)

    def select(self, kept: Tensor) -> None:
        """Zero for the samples that are not kept [B]."""
        self.value = only(kept, self.value)

    def _sum(self, factor: Tensor, part: slice) -> Tensor:
        return products.weighted_sum(factor, self.value[part])

    def dense(self) -> Tensor:
        """[B, *shape]."""
        return self.value


class Product(Gradient):
    """g_i = G_i' A_i of inputs A [B, T, d] and output gradients G [B, T, p]: [p, d] each.

    The rule, with the reason of each line:

    - T = 1: |g_i|^2 = |a|^2 |g|^2, and the sum is one matrix product.
    - T >= 32, and it fits: all g_i by one batched product. It costs what the ordinary gradient of
      the weight does, which it replaces, and gives norm and sum by one reading each.
    - T < 32, T < 2 d p / (d + p): |g_i|^2 is the sum over (A A') (G G'), in float64, since float32
      cancels there (an error of 37 % has been seen, and negative squares).
    - else: the products in tiles of rows, made twice.
    """

    def __init__(self, a: Tensor, g: Tensor, workspace: Workspace, key: object) -> None:
        self.a, self.g = alike(a, g)
        self.samples, self.rows, self.inputs = a.shape
        self.outputs = g.shape[2]
        self.shape = torch.Size((self.outputs, self.inputs))
        self.workspace, self.key = workspace, key
        self.made: Tensor | None = None
        size = self.inputs * self.outputs
        elements = self.samples * size
        if self.rows == 1:
            self.method = "outer"
        elif self.rows >= SHORT and workspace.fits(elements, self.a):
            self.method = "made"
            self.made = workspace.take(key, (self.samples, *self.shape), self.a)
            self._square = products.linear(self.a, self.g, self.made)
            del self.a, self.g  # the rest of the backward pass may have their memory
        elif self.rows < SHORT and self.rows * (self.inputs + self.outputs) < 2 * size:
            self.method = "gram"
        else:
            self.method = "tiles"

    def square(self) -> Tensor:
        """Square norms, float64 [B]."""
        if self.method == "outer":
            a = square_norms(self.a)
            if self.a.dtype is torch.float32:
                a = torch.where(a > FAR**2, torch.inf, a)
            return a * square_norms(self.g)
        if self.made is not None:
            return self._square
        if self.method == "gram":
            return self._gram()
        out = torch.zeros(self.samples, dtype=torch.float64, device=self.a.device)
        for _, _, square in self._tiles(slice(None)):
            out += square
        return (out.sqrt() + twice(self.rows, self.a) * self.reach()).square()

    def reach(self) -> Tensor:
        """sum_t |a_t| |g_t|, float64 [B]: what the product could be if nothing cancelled."""
        a, g = (x.double().square().sum(2).sqrt() for x in (self.a, self.g))
        return (a * g).sum(1)

    def _gram(self) -> Tensor:
        a, g = self.a.double(), self.g.double()
        inner = (a @ a.mT) * (g @ g.mT)
        return inner.sum((1, 2)).clamp_(min=0) + GRAM_MARGIN * self.reach().square()

    def _tiles(self, part: slice) -> _Tiles:
        return _Tiles(self.a[part], self.g[part], self.workspace.budget)

    def select(self, kept: Tensor) -> None:
        """Zero for the samples that are not kept [B]."""
        if self.made is not None:
            self.made = only(kept, self.made)
        else:
            self.a, self.g = only(kept, self.a), only(kept, self.g)

    def _sum(self, factor: Tensor, part: slice) -> Tensor:
        if self.made is not None:
            return products.weighted_sum(factor, self.made[part])
        if self.method == "tiles":
            out = self.a.new_empty(self.shape)
            for rows, tile, _ in self._tiles(part):
                out[rows] = products.weighted_sum(factor, tile)
            return out
        a, g = self.a[part], self.g[part]
        if self.method == "outer":
            return products.outer_sum(a[:, 0], g[:, 0], factor)
        if self.method == "gram":  # what cancels inside a sample does not show in float64
            a, g = a.double(), g.double()
        g = g * factor.to(g.dtype)[:, None, None]
        return g.flatten(0, 1).t() @ a.flatten(0, 1)

    def dense(self) -> Tensor:
        """[B, *shape]."""
        return self.g.mT @ self.a if self.made is None else self.made


class _Tiles:
    """The products of some samples, a range of output rows at a time."""

    def __init__(self, a: Tensor, g: Tensor, budget: int) -> None:
        self.a, self.g = a, g
        row = max(len(a) * a.shape[2] * a.itemsize, 1)
        self.step = min(max(min(budget, _TILE) // row, 1), max(g.shape[2], 1))

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Which rows, their products, and the square norms of those."""
        for i in range(0, self.g.shape[2], self.step):
            rows = slice(i, min(i + self.step, self.g.shape[2]))
            made = self.a.new_empty(len(self.a), rows.stop - i, self.a.shape[2])
            yield rows, made, products.linear(self.a, self.g[:, :, rows], made)


_TILE = 1 << 25
"""Bytes of a tile of products."""


class Rows(Gradient):
    """An embedding's: row `tokens[i, t]` of [V, d] gets g[i, t].

    A segment sum by (sample, token) gives the rows of each sample that are not zero, once each.
    """

    def __init__(self, tokens: Tensor, g: Tensor, vocabulary: int, padding: int | None) -> None:
        g = wide(g)
        self.samples, self.shape = len(tokens), torch.Size((vocabulary, g.shape[2]))
        keys = tokens + torch.arange(self.samples, device=tokens.device)[:, None] * vocabulary
        keys, g = keys.flatten(), g.flatten(0, 1)
        if padding is not None:  # its row gets no gradient in torch
            shown = (tokens != padding).flatten()
            keys, g = keys[shown], g[shown]
        self.keys, place = torch.unique(keys, return_inverse=True)
        self.values = add_rows(len(self.keys), place, g)
        self.sample, self.token = self.keys // max(vocabulary, 1), self.keys % max(vocabulary, 1)

    def square(self) -> Tensor:
        """Square norms, float64 [B]."""
        return add_rows(self.samples, self.sample, square_norms(self.values)[:, None])[:, 0]

    def select(self, kept: Tensor) -> None:
        """Zero for the samples that are not kept [B]."""
        self.values = only(kept[self.sample], self.values)

    def _sum(self, factor: Tensor, part: slice) -> Tensor:
        sample, token, values = self.sample, self.token, self.values
        if part != slice(None):  # keys are sorted by sample
            first, last = torch.searchsorted(sample, sample.new_tensor([part.start, part.stop]))
            sample, token, values = (x[first:last] for x in (sample, token, values))
            sample = sample - part.start
        return add_rows(self.shape[0], token, values * factor.to(values.dtype)[sample][:, None])

    def add_to(self, dense: Tensor) -> None:
        """Add them to [B, V, d] in place."""
        dense.view(-1, self.shape[1])[self.keys] += self.values

    def dense(self) -> Tensor:
        """[B, *shape]."""
        out = self.values.new_zeros(self.samples, *self.shape)
        self.add_to(out)
        return out


class Convolution(Gradient):
    """A convolution's weight [O, C / groups, *kernel], a slab of samples at a time.

    Kept where they fit, else made twice.
    """

    def __init__(
        self,
        x: Tensor,
        g: Tensor,
        patches: Patches,
        shape: torch.Size,
        workspace: Workspace,
        key: object,
    ) -> None:
        self.x, self.g = alike(x, g)
        self.patches, self.kernel = patches, products.by_kernel(self.x)
        self.samples, self.shape = len(x), shape
        self.made: Tensor | None = None
        if workspace.fits(self.samples * shape.numel(), self.x):
            self.made = workspace.take(key, (self.samples, shape.numel()), self.x)
        slabs = self._slabs(slice(0, self.samples))
        self._square = torch.cat([self._first(some) for some in slabs])
        if self.made is not None:
            del self.x, self.g  # the rest of the backward pass may have their memory

    def _first(self, some: slice) -> Tensor:
        """The products, kept where they are to be, and their square norms."""
        if self.made is not None:
            return self._products(some, self.made[some])[1]
        norm = self._products(some)[1].sqrt()
        patches, g = self.patches.columns(self.x[some], self.g[some])
        sizes = [torch.linalg.vector_norm(t, dim=1, dtype=torch.float64) for t in (patches, g)]
        reach = (sizes[0] * sizes[1]).sum(1).view(-1, self.patches.groups).sum(1)
        return (norm + twice(g.shape[2], g) * reach).square()

    def _slabs(self, part: slice) -> Iterator[slice]:
        """As many samples at once as have their patches in the caches of all threads."""
        patch = self.shape[1:].numel() * self.patches.groups * self.g.shape[2:].numel()
        step = torch.get_num_threads() * _PATCHES // max(patch * self.x.itemsize, 1)
        if self.made is not None and self.kernel:  # which copies no patches
            step = self.samples
        for i in range(part.start, part.stop, max(step, 1)):
            yield slice(i, min(i + max(step, 1), part.stop))

    def _products(self, some: slice, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Of some samples, and their square norms."""
        x, g = self.x[some], self.g[some]
        if out is None:
            out = x.new_empty(len(x), self.shape.numel())
        return out, products.convolution(x, g, self.patches, out, self.kernel)

    def square(self) -> Tensor:
        """Square norms, float64 [B]."""
        return self._square

    def select(self, kept: Tensor) -> None:
        """Zero for the samples that are not kept [B]."""
        if self.made is not None:
            self.made = only(kept, self.made)
        else:
            self.x, self.g = only(kept, self.x), only(kept, self.g)

    def _sum(self, factor: Tensor, part: slice) -> Tensor:
        first, last, _ = part.indices(self.samples)
        if self.made is not None:
            out = products.weighted_sum(factor, self.made[first:last])
        else:
            out = self.x.new_zeros(self.shape.numel())
            for some in self._slabs(slice(first, last)):
                weights = factor[some.start - first : some.stop - first]
                out += products.weighted_sum(weights, self._products(some)[0])
        return products.weights(out, self.shape, self.patches.groups, self.kernel)

    def dense(self) -> Tensor:
        """[B, *shape]."""
        made = self.made
        if made is None:
            slabs = self._slabs(slice(0, self.samples))
            made = torch.cat([self._products(some)[0] for some in slabs])
        return products.weights(made, self.shape, self.patches.groups, self.kernel)


_PATCHES = 1 << 21
"""Bytes of unfolded samples at once, a thread: they stay in its cache."""


class Tied(Gradient):
    """An embedding that is the output layer as well: Product + Rows, too large to be made.

    |P + R|^2 = |P|^2 + |R|^2 + 2 <P, R>; leaving out the last term is the classic mistake.
    """

    def __init__(self, product: Product, rows: Rows) -> None:
        # In float64 throughout: the two may cancel, and the factor is of what is left.
        product.a, product.g = product.a.double(), product.g.double()
        if product.method == "outer":
            product.method = "gram"
        rows.values = rows.values.double()
        self.product, self.rows = product, rows
        self.samples, self.shape = product.samples, product.shape

    def square(self) -> Tensor:
        """Square norms, float64 [B]."""
        cross, reach = [], []
        bounds = torch.searchsorted(
            self.rows.sample, torch.arange(self.samples + 1, device=self.rows.sample.device)
        ).tolist()
        for i in range(self.samples):
            mine = slice(bounds[i], bounds[i + 1])
            r, a, g = self.rows.values[mine], self.product.a[i], self.product.g[i]
            cross.append(((a @ r.t()) * g[:, self.rows.token[mine]]).sum())
            reach.append(r.square().sum(1).sqrt().sum())
        both = self.product.square() + self.rows.square() + 2 * torch.stack(cross)
        return both.clamp_(min=0) + GRAM_MARGIN * (
            (self.product.reach() + torch.stack(reach)).square()
        )

    def select(self, kept: Tensor) -> None:
        """Zero for the samples that are not kept [B]."""
        self.product.select(kept)
        self.rows.select(kept)

    def _sum(self, factor: Tensor, part: slice) -> Tensor:
        return self.product._sum(factor, part) + self.rows._sum(factor, part)

    def dense(self) -> Tensor:
        """[B, *shape]."""
        out = self.product.dense().clone()
        self.rows.add_to(out)
        return out


class Pairs:
    """A product that has not been made yet: another use of the weight may still come."""

    def __init__(self, a: Tensor, g: Tensor) -> None:
        self.a, self.g = a, g  # [B, T, d], [B, T, p]


class Lookups:
    """An embedding's tokens [B, T] and output gradients [B, T, d], likewise."""

    def __init__(self, tokens: Tensor, g: Tensor, vocabulary: int, padding: int | None) -> None:
        self.tokens, self.g, self.vocabulary, self.padding = tokens, g, vocabulary, padding

    def key(self) -> tuple[int, int | None]:
        """What has to be equal for two uses to be one."""
        return self.vocabulary, self.padding


class Images:
    """A convolution's input and output gradient, likewise."""

    def __init__(self, x: Tensor, g: Tensor, patches: Patches, shape: torch.Size) -> None:
        self.x, self.g, self.patches, self.shape = x, g, patches, shape


Piece = Pairs | Lookups | Images | Gradient
"""What one use of a parameter in a forward pass leaves behind."""


def combine(pieces: Sequence[Piece], workspace: Workspace, key: object) -> Gradient:
    """The gradients of a parameter that is used once or more: tied weights, layers called again.

    Norms are taken of the sum over all uses: adding the uses' square norms would drop what they
    have in common.
    """
    gradients: list[Gradient] = [x for x in pieces if isinstance(x, Gradient)]
    for i, piece in enumerate(pieces):
        if isinstance(piece, Images):
            gradients.append(
                Convolution(piece.x, piece.g, piece.patches, piece.shape, workspace, (key, i))
            )
    pairs = [x for x in pieces if isinstance(x, Pairs)]
    product = rows = None
    if pairs:
        a, g = (_joined([getattr(x, name) for x in pairs]) for name in ("a", "g"))
        product = Product(a, g, workspace, key)
    lookups: dict[tuple[int, int | None], list[Lookups]] = {}
    for piece in pieces:
        if isinstance(piece, Lookups):
            lookups.setdefault(piece.key(), []).append(piece)
    found = [
        Rows(_joined([x.tokens for x in some]), _joined([x.g for x in some]), *which)
        for which, some in lookups.items()
    ]
    if found:
        rows = found.pop()
    gradients += found
    if product is not None and rows is not None:
        if product.made is not None:
            rows.add_to(product.made)
            gradients.append(Dense(product.made))
        else:
            gradients.append(Tied(product, rows))
    else:
        gradients += [x for x in (product, rows) if x is not None]
    if len(gradients) == 1:
        return gradients[0]
    total = gradients[0].dense()
    for gradient in gradients[1:]:
        total = total + gradient.dense()
    return Dense(total)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)
