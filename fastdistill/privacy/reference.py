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

from fastdistill.privacy.mechanism import EPS, EXPONENTIALS, Mechanism
from fastdistill.privacy.source import (
    ANSWER_NOISE,
    CHACHA20,
    GRADIENT_NOISE,
    NONE,
    ROW_GRADIENT_NOISE,
    Source,
    counter,
)

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

EXP = (
    0.5000000000000001, 0.16666666666666669, 0.04166666666662413, 0.008333333333330062,
    0.0013888888917213717, 0.00019841269863053618, 2.4801521295954376e-05,
    2.7557268459997064e-06, 2.7620088445409746e-07, 2.510038549551032e-08,
)  # fmt: skip
"""(exp(r) - 1 - r) / r^2 in r, |r| <= log(2) / 2: exp(r) errs by 2e-17."""

LN2_HIGH, LN2_LOW = 0.6931471805592082, 7.371002565167799e-13
"""log(2): its first 40 bits, so that their product with a whole number is exact, and the rest."""

_ROUND = 1.5 * 2.0**52
"""Adding it rounds a float64 to a whole number, which is then in its low bits."""


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


def normals(source: Source, purpose: int, parameter: int, n: int, device: torch.device) -> Tensor:
    """The first n standard normals of a parameter, float64 [n]."""
    chacha = source.kind == CHACHA20
    rows = -(-n // 128) if chacha else -(-n // 32)
    block = torch.arange(rows * 16, device=device)
    first, low, high = counter(source, purpose, parameter)
    words = [block & _MASK, first + (block >> 32)]
    words += [torch.full_like(block, w) for w in (low, high)]
    key = source.key.tolist()
    random = chacha20(key, words) if chacha else philox(key[:2], words)
    pairs = [box_muller(*random[i : i + 4]) for i in range(0, len(random), 4)]
    halves = [x.view(rows, 1, 16) for pair in pairs for x in pair]
    return torch.cat(halves, 1).flatten()[:n]


def on_grid(x: Tensor, grid: float) -> Tensor:
    """X rounded to the nearest multiple of a power of two, ties to even; as it is where 0."""
    magic = _ROUND * grid
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
        out = _release(total, m, source, GRADIENT_NOISE, parameter, x.dtype)
        released.append(out.view(grad_samples[parameter].shape[1:]))
    return released


def _release(
    total: Tensor,
    m: Mechanism,
    source: Source,
    purpose: int,
    parameter: int,
    dtype: torch.dtype,
) -> Tensor:
    """The sum with its noise, divided: float32, or float64 for float64."""
    total = on_grid(total, m.grid)
    if source.kind != NONE:
        z = normals(source, purpose, parameter, total.numel(), total.device)
        total += on_grid(z * m.scale, m.grid).view(total.shape)
    return (total * m.inverse).to(torch.float64 if dtype is torch.float64 else torch.float32)


def add_noise_(sums: Sequence[Tensor], mechanism: Mechanism, source: Source) -> None:
    """Each sum, float32 or float64, becomes its release."""
    for parameter, x in enumerate(sums):
        x.copy_(_release(x.double(), mechanism, source, GRADIENT_NOISE, parameter, x.dtype))


def exponential(x: Tensor) -> Tensor:
    """e^x, float64, for -708 <= x <= 0: a fixed sequence of IEEE operations."""
    shifted = x * (1 / math.log(2)) + _ROUND
    k = shifted - _ROUND
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    power = ((shifted.view(torch.int64) << 52) + 0x3FF0000000000000).view(torch.float64)
    return (((r * r) * _horner(EXP, r) + r) + 1) * power


def noisy_softmax_sum(
    teachers: Sequence[Tensor], temperature: float, mechanism: Mechanism, source: Source
) -> Tensor:
    """The sum over teachers of softmax(z / T) of [n, C], with noise: float32 or float64."""
    m, inverse = mechanism, 1 / temperature
    total = torch.zeros(teachers[0].shape, dtype=torch.float64, device=teachers[0].device)
    for logits in teachers:
        z = logits.detach().double()
        kept = z.isfinite().all(1, keepdim=True)
        e = exponential(((z - z.amax(1, keepdim=True)) * inverse).clamp(min=-708))
        e = on_grid(e, EXPONENTIALS if m.grid else 0.0)
        s = e.sum(1, keepdim=True)
        p = on_grid(e * (torch.full_like(s, m.clip) / s), m.fine)
        total += torch.where(kept, p, 0.0)
    return _release(total, m, source, ANSWER_NOISE, 0, teachers[0].dtype)


def noisy_gradient_sum(teachers: Sequence[Tensor], m: Mechanism, source: Source) -> Tensor:
    """The sum over teachers of their rows of [n, C], clipped one by one, with noise."""
    total = torch.zeros(teachers[0].shape, dtype=torch.float64, device=teachers[0].device)
    for gradients in teachers:
        x = gradients.detach().double()
        norm = (x * m.unit).square().sum(1, keepdim=True).sqrt() / m.unit
        factor = (m.clip / (norm + EPS)).clamp(max=1)
        total += torch.where(norm.isfinite(), on_grid(x * factor, m.fine), 0.0)
    return _release(total, m, source, ROW_GRADIENT_NOISE, 0, teachers[0].dtype)
