"""The oracle: exact integer and float64 arithmetic, one operation at a time. Also the fallback.

Each noise value is a fixed sequence of IEEE operations without contraction, so that every backend
has the same bits: elements e with e // 32 = t, e % 32 = j or j + 16 (0 <= j < 16) are the two
results of the Box-Muller pair of lane j. Philox makes that pair from block 16 t + j; ChaCha20 from
words 4 q to 4 q + 3 of block 16 (t // 4) + j, q = t % 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistill.privacy.mechanism import EPS, Mechanism
from fastdistill.privacy.source import CHACHA20, NONE, Source, counter

_MASK = 0xFFFFFFFF

LOG = (
    0.6666666666666208, 0.40000000011206505, 0.2857142413832416,
    0.22222862280108716, 0.18140193802865992, 0.16621817152858928,
)  # fmt: skip
"""(2 atanh(s) - 2 s) / s^3 in s^2, |s| < 3 - 2 sqrt(2): the logarithm errs by 7e-16 of itself.

These three are interpolated at Chebyshev's points."""

COS = (
    -0.30842513753404227, 0.0158543442438019, -0.00032599188676870125,
    3.5908597712602535e-06, -2.461006226754435e-08, 1.1384778780982284e-10,
)  # fmt: skip
"""(cos(x pi / 4) - 1) / x^2 in x^2, 0 < x < 1 (error 2e-16)."""

SIN = (
    0.7853981633974483, -0.08074551218828054, 0.002490394570188844, -3.657620415891387e-05,
    3.133616225433416e-07, -1.7571500746983935e-09, 6.877360573166326e-12,
)  # fmt: skip
"""sin(x pi / 4) / x in x^2 (error 3e-17)."""


def philox(key: Sequence[int], words: Sequence[Tensor]) -> list[Tensor]:
    """Philox-4x32-10 (Salmon et al. 2011): four counter words to four random words, as int64."""
    k0, k1 = key
    c0, c1, c2, c3 = words
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64 bits: they wrap into the sign
        c0, c1, c2, c3 = (
            (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        )  # fmt: skip
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return [c0, c1, c2, c3]


def chacha20(key: Sequence[int], words: Sequence[Tensor]) -> list[Tensor]:
    """The ChaCha20 block function (RFC 8439, 2.3): counter and nonce to 16 words, as int64."""
    constants = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)
    start = [torch.full_like(words[0], w) for w in (*constants, *key)] + list(words)
    x = list(start)

    def half(a: int, b: int, d: int, left: int) -> None:
        x[a] = (x[a] + x[b]) & _MASK
        y = x[d] ^ x[a]
        x[d] = (y << left | y >> 32 - left) & _MASK

    columns = [(i, i + 4, i + 8, i + 12) for i in range(4)]
    diagonals = [(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4) for i in range(4)]
    for _ in range(10):
        for a, b, c, d in columns + diagonals:
            half(a, b, d, 16)
            half(c, d, b, 12)
            half(a, b, d, 8)
            half(c, d, b, 7)
    return [(a + b) & _MASK for a, b in zip(x, start, strict=True)]


def box_muller(w0: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals from four words: float64, up to 9.49 in magnitude.

    (w1, w0) is the uniform of the radius: 64 bits, or the tail beyond 6.66 would be missing. Three
    bits of w3 choose the octant of the angle by reflection, the other 61 the angle in it.
    """
    u = w1.double() * 2.0**-32 + (w0.double() + 0.5) * 2.0**-64
    bits = u.view(torch.int64)
    k = (bits + (0x3FF0000000000000 - 0x3FE6A09E667F3BCD) >> 52) - 1023
    m = (bits - (k << 52)).view(torch.float64)  # u = m 2^k, sqrt(1/2) <= m < sqrt(2)
    s = (m - 1) / (m + 1)
    log_m = (s + s) + s * (s * s * _horner(LOG, s * s))
    radius = (-2 * (k.double() * math.log(2) + log_m)).sqrt()

    x = (w3 & 0x1FFFFFFF).double() * 2.0**-29 + (w2.double() + 0.5) * 2.0**-61
    y = x * x
    cos, sin = y * _horner(COS, y) + 1, x * _horner(SIN, y)
    swap = (w3 & 0x20000000) != 0
    a, b = torch.where(swap, sin, cos), torch.where(swap, cos, sin)
    a = torch.where((w3 & 0x80000000) != 0, -a, a)
    b = torch.where((w3 & 0x40000000) != 0, -b, b)
    return radius * a, radius * b


def _horner(coefficients: Sequence[float], x: Tensor) -> Tensor:
    y = torch.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        y = y * x + c
    return y


def normals(source: Source, parameter: int, n: int, device: torch.device) -> Tensor:
    """The first n standard normals of a parameter, float64 [n]."""
    chacha = source.kind == CHACHA20
    rows = -(-n // 128) if chacha else -(-n // 32)
    block = torch.arange(rows * 16, device=device)
    first, low, high = counter(source, parameter)
    words = [block & _MASK, first + (block >> 32)]
    words += [torch.full_like(block, w) for w in (low, high)]
    key = source.key.tolist()
    random = chacha20(key, words) if chacha else philox(key[:2], words)
    pairs = [box_muller(*random[i : i + 4]) for i in range(0, len(random), 4)]
    halves = [x.view(rows, 1, 16) for pair in pairs for x in pair]
    return torch.cat(halves, 1).flatten()[:n]


def on_grid(x: Tensor, grid: float) -> Tensor:
    """X rounded to the nearest multiple of a power of two, ties to even; as it is where 0."""
    magic = 1.5 * 2.0**52 * grid
    return x + magic - magic if grid else x


_SLAB = 1 << 20
"""Elements of the samples that are taken at once."""


def clip_and_noise(
    grad_samples: Sequence[Tensor], mechanism: Mechanism, source: Source
) -> list[Tensor]:
    """The release that `mechanism` describes: a list of [*shape], float32 or float64."""
    m = mechanism
    rows = [x.detach().reshape(x.shape[0], x.shape[1:].numel()) for x in grad_samples]
    square = torch.zeros(rows[0].shape[0], dtype=torch.float64, device=rows[0].device)
    for x in rows:
        square += (x.double() * m.unit).square().sum(1)
    norm = square.sqrt() / m.unit
    factor = (m.clip / (norm + EPS)).clamp(max=1)
    kept = norm.isfinite().nonzero().flatten()
    released = []
    for parameter, x in enumerate(rows):
        total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        for some in kept.split(max(_SLAB // max(x.shape[1], 1), 1)):
            total += on_grid(x[some].double() * factor[some, None], m.fine).sum(0)
        total = on_grid(total, m.grid)
        if source.kind != NONE:
            z = normals(source, parameter, total.numel(), x.device)
            total += on_grid(z * m.scale, m.grid)
        like = grad_samples[parameter]
        dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
        released.append((total * m.inverse).to(dtype).view(like.shape[1:]))
    return released
