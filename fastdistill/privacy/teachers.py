"""`noisy_softmax_sum` and `noisy_gradient_sum`: what teachers on disjoint shards say, privately.

Each private record is in the shard of one teacher, so that adding, removing or replacing a record
changes one teacher, in any way. Their number is fixed and public.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistill import _validate
from fastdistill.privacy import mechanism, ops, reference, release


def noisy_softmax_sum(
    teacher_logits: Tensor | Sequence[Tensor],
    temperature: float,
    noise_std: float,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Differentially private sum of the teachers' distributions: softmax, sum, noise in one pass.

    With k teachers' logits z_k on n query rows of C classes, T = `temperature` and sigma =
    `noise_std`::

        sum_k softmax(z_k / T) + N(0, sigma^2 I)                     [n, C]

    Divide by k for a target (of about a distribution: entries may be negative).

    Guarantee: where one teacher's row changes in any way, its row of the sum moves by at most
    sqrt(2) in L2, every rounding counted (`fastdistill.privacy.mechanism` has the proof; for it
    the sum is lowered by 0.003 % at most). So each query row is one Gaussian mechanism of noise
    multiplier sigma / sqrt(2), under add, remove and replace alike, and n rows in all calls
    together are Gaussian DP with mu = sqrt(2 n) / sigma. It holds where the teachers share
    nothing that was computed from private data, and the queries depend on no teacher but through
    noisy answers. The time that a call takes is not protected.

    Args:
        teacher_logits: [k, n, C], or a list of k tensors [n, C], one per teacher, of one device
            and one dtype: float32, bfloat16, float16 or float64; k <= 2^16, C <= 2^20, n may be 0.
            They are detached.
        temperature: T, between 2^-64 and 2^64; public, like k.
        noise_std: sigma >= 0, the standard deviation on each of the n C values. With 0 nothing is
            private: no noise, and no grid.
        generator: as for `clip_and_noise`: None is ChaCha20 (for release), a `torch.Generator`
            is Philox (for reproducible runs, not for release).

    Returns:
        [n, C], float32 (float64 for float64), contiguous: neither divided by k nor clipped. With
        noise all bits are the same on every backend and for any number of threads: values are
        multiples of a grid of about 2^-17 / sqrt(C), whose sums are exact. A teacher's row with a
        NaN or an infinity (-inf included) contributes zero; the other teachers' rows stay.

    Raises:
        TypeError, ValueError: the argument's name, what was expected and what came.
        RuntimeError: as for `clip_and_noise`.
    """
    teachers = _check_teachers("teacher_logits", teacher_logits)
    temperature = _validate.positive("temperature", temperature)
    if not mechanism.SMALLEST_NORM <= temperature <= mechanism.LARGEST_NORM:
        raise ValueError(f"temperature: expected a number from 2^-64 to 2^64, got {temperature}")
    noise_std = release.noise("noise_std", noise_std)
    release.check_generator(generator)
    planned = mechanism.plan_answers(noise_std, teachers[0].shape[1])
    backend = release.choose("noisy_softmax_sum", teachers)
    bits = release.stream(noise_std, generator)
    with torch.no_grad():
        if backend == "reference":
            return reference.noisy_softmax_sum(teachers, temperature, planned, bits)
        return ops.noisy_softmax_sum(teachers, temperature, *planned, *bits, backend)


def noisy_gradient_sum(
    gradients: Tensor | Sequence[Tensor],
    max_norm: float,
    noise_multiplier: float,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Differentially private sum of the teachers' gradients of a student's logits.

    With the gradients g_k of k teachers' losses on n query rows of C classes, the norm bound
    B = `max_norm` and sigma = `noise_multiplier`::

        sum_k c_k g_k + N(0, (sigma B)^2 I),  c_k = min(1, B / (norm(g_k) + 1e-6))    row by row

    Wang et al. 2019, "Private Model Compression via Knowledge Distillation", with the noise on the
    gradient: on the loss's value, as in their program, it would not reach the student.

    Guarantee: where one teacher's row changes in any way, its row of the sum moves by at most 2 B
    in L2, every rounding counted. So each visit of a query row is one Gaussian mechanism of noise
    multiplier sigma / 2, under add, remove and replace alike, and t visits are Gaussian DP with
    mu = 2 sqrt(t) / sigma. The conditions are those of `noisy_softmax_sum`; unlike its answers,
    these depend on the student: they serve no other one, and no later step.

    Args:
        gradients: [k, n, C], or a list of k tensors [n, C], as `noisy_softmax_sum` takes them.
        max_norm: B > 0, between 2^-64 and 2^64.
        noise_multiplier: sigma >= 0, times B the standard deviation on each of the n C values.
            With 0 nothing is private: no noise, and no grid.
        generator: as for `clip_and_noise`.

    Returns:
        [n, C], float32 (float64 for float64), contiguous, not divided by k. A teacher's row that
        is not finite contributes zero. Sums are exact, the noise has the same bits everywhere.

    Raises:
        TypeError, ValueError: the argument's name, what was expected and what came.
        RuntimeError: as for `clip_and_noise`.
    """
    teachers = _check_teachers("gradients", gradients)
    max_norm = release.clip_norm(max_norm)
    noise_multiplier = release.noise("noise_multiplier", noise_multiplier)
    release.check_generator(generator)
    single = teachers[0].dtype is not torch.float64
    planned = mechanism.plan(max_norm, noise_multiplier, 1.0, teachers[0].shape[1], single)
    backend = release.choose("noisy_gradient_sum", teachers)
    bits = release.stream(noise_multiplier, generator)
    with torch.no_grad():
        if backend == "reference":
            return reference.noisy_gradient_sum(teachers, planned, bits)
        return ops.noisy_gradient_sum(teachers, *planned, *bits, backend)


def _check_teachers(name: str, value: object) -> list[Tensor]:
    """[n, C] of each teacher, detached; of one shape, dtype and device."""
    if isinstance(value, Tensor):
        x = _validate.floating(name, value)
        if x.ndim != 3:
            raise ValueError(
                f"{name}: expected a shape [teachers, rows, classes], got {list(x.shape)}"
            )
        teachers = list(x.detach().unbind(0))
    elif isinstance(value, (list, tuple)):
        teachers = []
        for i, one in enumerate(value):
            x = _validate.floating(f"{name}[{i}]", one).detach()
            if x.ndim != 2:
                raise ValueError(
                    f"{name}[{i}]: expected a shape [rows, classes], got {list(x.shape)}"
                )
            first = teachers[0] if teachers else x
            _validate.same_shape(f"{name}[{i}]", x, first.shape, f"that of {name}[0]")
            _validate.same_device(f"{name}[{i}]", x, first.device, f"{name}[0]")
            if x.dtype is not first.dtype:
                raise TypeError(
                    f"{name}[{i}]: expected dtype {first.dtype} (that of {name}[0]), got {x.dtype}"
                )
            teachers.append(x)
    else:
        raise TypeError(
            f"{name}: expected a tensor [teachers, rows, classes] or a list of tensors "
            f"[rows, classes], got {type(value).__name__}"
        )
    if not 1 <= len(teachers) <= mechanism.MOST_TEACHERS:
        raise ValueError(
            f"{name}: expected 1 to {mechanism.MOST_TEACHERS} teachers, got {len(teachers)}"
        )
    rows, classes = teachers[0].shape
    if not 1 <= classes <= mechanism.MOST_CLASSES:
        raise ValueError(f"{name}: expected 1 to {mechanism.MOST_CLASSES} classes, got {classes}")
    if rows * classes > mechanism.MOST_COORDINATES:
        raise ValueError(
            f"{name}: expected at most {mechanism.MOST_COORDINATES} values a teacher, "
            f"got {rows * classes}"
        )
    return teachers


release.register("noisy_softmax_sum")
release.register("noisy_gradient_sum")
