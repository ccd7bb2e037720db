"""The numbers of one release, and the proof that no sample contributes more than is said.

*Clipped gradients* (`plan`; the samples' gradients, or one teacher's gradient of one query row).
Let C be the clip norm, P the number of coordinates over all tensors, x a sample's gradient in R^P.

1. *Norm.* Squares and their sum are float64 (a square of float32, bfloat16 or float16 is exact), so
   whatever the order of the sum the computed norm n^ >= ||x|| (1 - (P + 2) e) with e = 2^-53. Both
   scaling by a power of two and the square root (correctly rounded) are inside the 2.
2. *Factor.* c = min(1, C' / (n^ + 1e-6)) (Opacus's formula) errs by 3 e more. A sample whose norm
   is not finite gets c = 0 and is never read again: a select, not a product with 0.
3. *Contribution.* r = round(c x) onto a fixed grid f, a power of two. The product errs by e, the
   rounding by at most f / 2 a coordinate, so ||r|| <= C' (1 + (P + 8) e) + f sqrt(P) / 2.
4. *Sum.* S = sum r_i is a sum of multiples of f below 2^53 f (B <= 2^20 samples, |r| <= C, f >= C
   2^-31): every partial sum is exact. So S does not depend on the order of the samples or on the
   number of threads, and adding or removing a sample changes S by exactly its own r: float sums,
   whose later roundings change too, have no such bound (Casacuberta et al. 2022,
   "Widespread Underestimation of Sensitivity in Differentially Private Libraries").
5. *Grid.* Q(S) rounds S to the public grid h, a power of two and a multiple of f: two sums that
   differ by r differ by at most ||r|| + h sqrt(P) afterwards.
6. *Noise.* Q(S) + Q(N) = Q(Q(S) + N), exactly: post-processing of the Gaussian mechanism on Q(S).
   The floating-point holes of N (Mironov 2012, "On Significance of the Least Significant Bits")
   are 10^-15 sigma C wide, which the grid covers.
7. The division by the expected batch size and the cast to the result's type are post-processing.

`plan` chooses C' < C so that the bound of 5 is at most C. Without noise there is no grid and
nothing is post-processing: there C' also pays for the last rounding, to the result's type.

The two grids depend on C and P alone: a grid that followed the actual batch would leak its size.

*Answers* (`plan_answers`): the sum over teachers of p = softmax(z / T) over C classes.

8. The exponentials are rounded to multiples of 2^-32: one of them is 1, none is above it, and the
   sum s of C <= 2^20 is exact. However wrong they are, r = round(e (c / s)) onto the grid f has
   r >= 0 and ||r|| <= ||e|| c / s (1 + 3 e) + f sqrt(C) / 2 <= c (1 + 3 e) + f sqrt(C) / 2.
9. For r, r' >= 0: ||r - r'||^2 <= ||r||^2 + ||r'||^2. So a teacher whose row changes in any way, or
   is dropped for not being finite (r' = 0), moves the sum by at most sqrt(2) (c (1 + 3 e) + f
   sqrt(C) / 2), and the sum on the grid h by h sqrt(C) more. `plan_answers` chooses c < 1 so that
   this is at most sqrt(2). Then 4, 6 and 7 as above.
"""

from __future__ import annotations

import math
from typing import NamedTuple

MOST_SAMPLES = 1 << 20
MOST_COORDINATES = 1 << 36
SMALLEST_NORM, LARGEST_NORM = 2.0**-64, 2.0**64
"""Between them squares, products and results stay in the normal range of every type."""

EPS = 1e-6
"""Opacus's, in the factor C / (n + 1e-6)."""

_GRID_SHARE = 2.0**-10
"""h sqrt(P) in clip norms: what the noise is too small by if the grid were not paid for."""

_MOST_NOISE = 2.0**36
"""sigma sqrt(P) below which 9.5 sigma C has its multiple of h in the 52 bits of a float64."""


MOST_TEACHERS = 1 << 16
MOST_CLASSES = 1 << 20

EXPONENTIALS = 2.0**-32
"""The grid of the exponentials."""

_ANSWER_GRID_SHARE = 2.0**-16
"""h sqrt(C) for answers: their sums have more bits to spare."""

_MOST_ANSWER_NOISE = 2.0**30
"""sigma sqrt(C) for them: with 2^16 teachers all is below 2^51 h."""


class Mechanism(NamedTuple):
    """The numbers that a kernel gets; 0 for a grid means that nothing is rounded."""

    clip: float  # C' or c, in place of the clip norm or of 1
    unit: float  # a power of two near 1 / C: squares are taken of x unit
    fine: float  # f, the grid of one sample's contribution
    grid: float  # h, the grid of the sum and of the noise
    scale: float  # sigma C, standard deviation of the noise
    inverse: float  # 1 / expected batch size


def plan(
    max_norm: float,
    noise_multiplier: float,
    expected_batch_size: float,
    coordinates: int,
    single: bool,
    rounding: float = 0.0,
) -> Mechanism:
    """The numbers of a release of `coordinates` values, some of them float32 where `single`.

    `rounding`: by how much, in clip norms, the rounding of a sum that is not exact (4) changes with
    one sample; it is paid for as the grid is.

    Raises:
        ValueError: the release is too large, or the noise too wide, for the exact arithmetic.
    """
    if coordinates > MOST_COORDINATES:
        raise ValueError(
            f"grad_samples: expected at most {MOST_COORDINATES} coordinates, got {coordinates}"
        )
    root = math.sqrt(max(coordinates, 1))
    if noise_multiplier * root > _MOST_NOISE:
        raise ValueError(
            f"noise_multiplier: expected at most {_MOST_NOISE / root:g} with {coordinates} "
            f"coordinates, got {noise_multiplier}"
        )
    log2 = math.frexp(max_norm)[1]  # max_norm <= 2^log2
    fine = grid = lost = 0.0
    if noise_multiplier > 0:
        fine = 2.0 ** (log2 - 31)
        grid = 2.0 ** (math.frexp(_GRID_SHARE * max_norm / root)[1] - 1)
        lost = (grid + fine / 2) * root / max_norm + rounding
    else:
        lost = 2.0**-24 if single else 2.0**-53
    # Room for the products of these small terms, and for the rounding of this very line.
    lost = (lost + (coordinates + 16) * 2.0**-53) * (1 + 2.0**-10)
    return Mechanism(
        clip=max_norm * (1 - lost),
        unit=2.0**-log2,
        fine=fine,
        grid=grid,
        scale=noise_multiplier * max_norm,
        inverse=1 / expected_batch_size,
    )


def plan_answers(noise_std: float, classes: int) -> Mechanism:
    """The numbers of a sum of teachers' softmax rows over `classes`; `unit` is not used.

    Raises:
        ValueError: there are too many classes, or the noise is too wide, for the exact arithmetic.
    """
    root = math.sqrt(classes)
    if noise_std * root > _MOST_ANSWER_NOISE:
        raise ValueError(
            f"noise_std: expected at most {_MOST_ANSWER_NOISE / root:g} with {classes} classes, "
            f"got {noise_std}"
        )
    fine = grid = lost = 0.0
    if noise_std > 0:
        fine = 2.0**-31
        grid = 2.0 ** (math.frexp(_ANSWER_GRID_SHARE / root)[1] - 1)
        lost = (fine / 2 + grid / math.sqrt(2)) * root + 8 * 2.0**-53
        lost *= 1 + 2.0**-10  # products of these small terms, and the rounding of these lines
    return Mechanism(1 - lost, 1.0, fine, grid, noise_std, 1.0)
