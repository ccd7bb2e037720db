"""`clip_and_noise`: validate, plan the release, take a fresh stream of noise, choose a backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistill import _validate
from fastdistill.privacy import mechanism, ops, reference, release, source

OP = "clip_and_noise"


def clip_and_noise(
    grad_samples: Sequence[Tensor],
    max_norm: float,
    noise_multiplier: float,
    *,
    expected_batch_size: float,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Differentially private mean of per-sample gradients: clip, sum, add noise, divide.

    With the samples' gradients g_i, C = `max_norm` and sigma = `noise_multiplier`::

        (sum_i c_i g_i + N(0, (sigma C)^2 I)) / expected_batch_size
        c_i = min(1, C / (norm(g_i) + 1e-6)), the norm over all tensors jointly

    (Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1, with the factor of
    Opacus.) The tensors are read twice and the result is written once.

    Guarantee: the sum has L2 sensitivity at most C when a sample is added, removed or zeroed out,
    and 2 C when one is replaced, with every rounding counted (`fastdistill.privacy.mechanism` has
    the proof; for it C is lowered by 0.12 % at most where there is noise, and by 1e-7 of itself,
    1e-10 for float64, where there is none). One call is one Gaussian mechanism of noise multiplier
    sigma under add/remove or zero-out adjacency; account for it with the probability by which your
    sampler includes a sample. The batch's actual size enters nothing but the sum. The time that a
    call takes is not protected, and neither is what you compute from `grad_samples` yourself.

    Args:
        grad_samples: tensors [B, *shape] of one B <= 2^20 and one device, each of float32,
            bfloat16, float16 or float64: row i of all of them is the gradient of sample i. B may
            be 0 (an empty Poisson batch): the result is then noise alone. They are detached.
        max_norm: C > 0, between 2^-64 and 2^64.
        noise_multiplier: sigma >= 0. With 0 nothing is private: no noise, and no grid.
        expected_batch_size: > 0: sample rate times size of the data set, never the actual B.
        generator: None draws the noise from ChaCha20, keyed by the operating system once per
            process (and again in a forked child); the key cannot be read or saved. A
            `torch.Generator` makes a reproducible run, not one for release: Philox-4x32-10 keyed
            by its seed, at a position drawn from it, so that the generator advances.

    Returns:
        A list of [*shape], float32 (float64 for float64), contiguous. With noise, all values are
        multiples of a grid of about C / (1000 sqrt(P)), P being the coordinates of all tensors,
        over the expected batch size. The noise has the same bits on every backend; it reaches
        9.49 sigma C, and the tail beyond has probability 3e-21 per coordinate: add P times that to
        delta. Sums are exact, or float64 where there is no noise, and do not depend on the number
        of threads. A sample with a NaN or an infinity in any tensor (or, in float64, with a norm
        above 1e150 C) contributes zero.

    Raises:
        TypeError, ValueError: the argument's name, what was expected and what came.
        RuntimeError: an explicitly requested backend cannot run the call, a functorch transform
            or `torch.compile` traces it, or a CUDA graph captures it: noise that is recorded once
            would be replayed.
    """
    samples = _check_samples(grad_samples)
    max_norm = release.clip_norm(max_norm)
    noise_multiplier = release.noise("noise_multiplier", noise_multiplier)
    expected = _validate.positive("expected_batch_size", expected_batch_size)
    release.check_generator(generator)
    planned = mechanism.plan(
        max_norm,
        noise_multiplier,
        expected,
        sum(x.shape[1:].numel() for x in samples),
        any(x.dtype is not torch.float64 for x in samples),
    )
    backend = release.choose(OP, samples)
    bits = release.stream(noise_multiplier, generator)
    with torch.no_grad():
        if backend == "reference":
            return reference.clip_and_noise(samples, planned, bits)
        return ops.clip_and_noise(samples, *planned, *bits, backend)


def _check_samples(grad_samples: object) -> list[Tensor]:
    if not isinstance(grad_samples, (list, tuple)):
        raise TypeError(
            "grad_samples: expected a list of tensors [B, *shape], got "
            f"{type(grad_samples).__name__}"
        )
    if not grad_samples:
        raise ValueError("grad_samples: expected at least one tensor, got an empty list")
    if len(grad_samples) > source.MOST_PARAMETERS:
        raise ValueError(
            f"grad_samples: expected at most {source.MOST_PARAMETERS} tensors, "
            f"got {len(grad_samples)}"
        )
    samples: list[Tensor] = []
    for i, value in enumerate(grad_samples):
        name = f"grad_samples[{i}]"
        x = _validate.floating(name, value)
        if x.ndim == 0:
            raise ValueError(f"{name}: expected a shape [B, ...], got a scalar")
        first = samples[0] if samples else x
        if x.shape[0] != first.shape[0]:
            raise ValueError(
                f"{name}: expected {first.shape[0]} samples (as in grad_samples[0]), "
                f"got {x.shape[0]} in shape {list(x.shape)}"
            )
        _validate.same_device(name, x, first.device, "grad_samples[0]")
        samples.append(x.detach())
    if samples[0].shape[0] > mechanism.MOST_SAMPLES:
        raise ValueError(
            f"grad_samples: expected at most {mechanism.MOST_SAMPLES} samples, "
            f"got {samples[0].shape[0]}"
        )
    return samples


release.register(OP)
