"""Broken releases, made by program from the reference: each has to fail the check that it should.

The checks are those that every backend passes (test_privacy_values, _noise, _edges).
"""

import mutants
import privacy_checks as checks
import pytest

from fastdistill import privacy

FILES = mutants.Files(privacy, ("mechanism", "source", "reference"))

MUTATIONS = {
    "norm of the first tensor only": (
        "reference", "    for x in rows:\n", "    for x in rows[:1]:\n", "sensitivity",
    ),
    "norm of each tensor by itself": (
        "reference", "x[some].double() * factor[some, None]",
        "x[some].double() / x[some].double().norm(dim=1, keepdim=True).clamp(min=m.clip) * m.clip",
        "sensitivity",
    ),
    "not clipped": ("reference", ".clamp(max=1)", ".clamp(min=1)", "sensitivity"),
    "factor above 1": ("reference", ".clamp(max=1)", "", "formula"),
    "no select: 0 times NaN": (
        "reference", "norm.isfinite().nonzero()", "torch.ones_like(norm).nonzero()", "not_finite",
    ),
    "rounding of the result not paid for": (
        "mechanism", "lost = 2.0**-24 if single else 2.0**-53", "lost = 0.0", "sensitivity",
    ),
    "grid not paid for": (
        "mechanism", "lost = (grid + fine / 2) * root / max_norm + rounding", "lost = 0.0",
        "sensitivity",
    ),
    "the sum is not exact": (
        "reference", "factor[some, None], m.fine)", "factor[some, None], 0.0)", "order",
    ),
    "grid of the actual batch": (
        "reference", "m = mechanism\n",
        "m = mechanism._replace(grid=mechanism.grid * len(grad_samples[0]))\n",
        "replay",
    ),
    "divided by the actual batch": (
        "reference", "m = mechanism\n",
        "m = mechanism._replace(inverse=1 / max(len(grad_samples[0]), 1))\n", "replay",
    ),
    "noise scaled by the actual batch": (
        "reference", "m = mechanism\n",
        "m = mechanism._replace(scale=mechanism.scale * max(len(grad_samples[0]), 1)**0.5)\n",
        "replay",
    ),
    "noise per sample kept": (
        "reference", "out = _release(total, m,",
        "out = _release(total, m._replace(scale=m.scale * max(len(kept), 1)),", "replay",
    ),
    "noise without the clip norm": (
        "mechanism", "scale=noise_multiplier * max_norm", "scale=noise_multiplier", "noise",
    ),
    "noise of 0.9": (
        "mechanism", "scale=noise_multiplier * max_norm", "scale=0.9 * noise_multiplier * max_norm",
        "noise",
    ),
    "noise of 0.9, by the audit": (
        "mechanism", "scale=noise_multiplier * max_norm", "scale=0.9 * noise_multiplier * max_norm",
        "audit",
    ),
    "one counter for all tensors": (
        "reference", "GRADIENT_NOISE, parameter,", "GRADIENT_NOISE, 0,", "noise",
    ),
    "one counter for all tensors, by the audit": (
        "reference", "GRADIENT_NOISE, parameter,", "GRADIENT_NOISE, 0,", "audit",
    ),
    "one counter for all blocks": ("reference", "block & _MASK,", "block * 0,", "noise"),
    "a step is used twice": ("source", "self._step += 1 ", "self._step += 0 ", "streams"),
    "the stream is not in the counter": (
        "source", "source.stream & _MASK, source.stream >> 32", "0, 0", "streams",
    ),
    "the secure key is a constant": ("source", "os.urandom(32)", "bytes(32)", "streams"),
    "a child goes on with the parent's key": (
        "source", "    _secure = _Secure()  # with its own lock",
        "    _secure._step = 0  # with its own lock", "streams",
    ),
    "the generator does not advance": (
        "source", "random_(generator=generator)", "fill_(1)", "streams",
    ),
    "the seed is not in the key": ("source", "generator.initial_seed()", "1", "streams"),
    "uniforms of 32 bits": ("reference", "(w0.double() + 0.5) * 2.0**-64", "2.0**-33", "tail"),
    "half of the angles": (
        "reference", "b = torch.where((w3 & 0x40000000) != 0, -b, b)", "b = b.abs()", "noise",
    ),
    "sine and cosine of different lengths": (
        "reference", "radius * b", "radius * 0.97 * b", "noise",
    ),
}  # fmt: skip


def implementation(parts):
    return checks.Implementation("mutated", parts["reference"].clip_and_noise, **parts)


@pytest.fixture(autouse=True)
def quietly(one_thread):
    yield


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_release_is_caught(name):
    mutation = mutants.Mutation(*MUTATIONS[name])
    with mutants.made(FILES, mutation) as parts, pytest.raises(AssertionError):
        getattr(checks, f"check_{mutation.check}")(implementation(parts))


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda c: c.__name__)
def test_the_machinery_passes_what_is_not_broken(check):
    with mutants.made(FILES) as parts:
        check(implementation(parts))
