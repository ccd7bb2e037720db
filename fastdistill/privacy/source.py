"""Where the random bits of a release come from: a key, and a counter that is never used twice.

Both generators map (key, 128-bit counter) to a block of words. The counter's words are

    0  block of elements, low 32 bits
    1  purpose (8 bits) | parameter: index in the list (16 bits) | block, high 8 bits
    2  stream, low 32 bits
    3  stream, high 32 bits

and the stream is engine (24 bits) | step (39 bits) under the secure generator. With ChaCha20 the
first word is RFC 8439's block counter and the others are its nonce.
"""

from __future__ import annotations

import os
import threading
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

NONE, PHILOX, CHACHA20 = 0, 1, 2

GRADIENT_NOISE, ANSWER_NOISE, ROW_GRADIENT_NOISE = 1, 2, 3
"""Purposes: with equal keys and streams their counters still differ."""

MOST_PARAMETERS = 1 << 16
_STEP_BITS = 39
_MASK = 0xFFFFFFFF


class Source(NamedTuple):
    """One stream of random bits. The key is a tensor so that no profiler or log prints it."""

    kind: int  # NONE, PHILOX or CHACHA20
    key: Tensor  # int64 [8], words of 32 bits, on the CPU; Philox takes the first two
    stream: int  # 63 bits


def counter(source: Source, purpose: int, parameter: int = 0) -> tuple[int, int, int]:
    """Words 1, 2 and 3 of the counters of a parameter's blocks below 2^32."""
    first = purpose << 24 | parameter << 8
    return first, source.stream & _MASK, source.stream >> 32


class _Secure:
    """The process's ChaCha20 key, from the operating system, and its step.

    The key never leaves the process: it has no repr, is not pickled, and a forked child draws its
    own, since it would otherwise go on with the parent's counters.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: Tensor | None = None
        self._step = 0

    def next(self) -> Source:
        with self._lock:
            if self._key is None or self._step >> _STEP_BITS:
                self._key = _words(os.urandom(32))
                self._step = 0
            step = self._step
            self._step += 1  # before any noise is drawn: a failure skips a step, never repeats one
            return Source(CHACHA20, self._key, step)

    def __repr__(self) -> str:
        return "<secure generator>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("the secure generator cannot be pickled: its key stays in the process")


def _words(raw: bytes) -> Tensor:
    words = [int.from_bytes(raw[i : i + 4], "little") for i in range(0, len(raw), 4)]
    return torch.tensor(words + [0] * (8 - len(words)), dtype=torch.int64)


def _after_fork() -> None:
    global _secure
    _secure = _Secure()  # with its own lock: the parent's may be held by a thread that is not here


_secure = _Secure()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

_silent = Source(NONE, torch.zeros(8, dtype=torch.int64), 0)


def silent() -> Source:
    """No noise."""
    return _silent


def secure() -> Source:
    """The next stream of the secure generator."""
    return _secure.next()


def seeded(generator: torch.Generator) -> Source:
    """Philox keyed by the generator's seed; the stream is drawn from the generator itself.

    So the generator advances with each call, `manual_seed` starts again, and a restored state
    repeats what followed it.
    """
    key = _words((generator.initial_seed() & (2**64 - 1)).to_bytes(8, "little"))
    if generator.device.type == "cuda":  # reading a number from the GPU would synchronise
        stream = generator.get_offset()
        generator.set_offset(stream + 4)  # it counts in fours
    else:
        stream = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
    return Source(PHILOX, key, stream)


def nonce() -> int:
    """64 fresh bits of the operating system."""
    return int.from_bytes(os.urandom(8), "little")


def mixed(source: Source, nonce: int) -> Source:
    """The same generator under another key: for a seeded run that begins again from a checkpoint.

    Its generator would repeat the noise that the interrupted run has added to other gradients.
    """
    if source.kind != PHILOX or nonce == 0:
        return source
    words = _words(nonce.to_bytes(8, "little"))
    return source._replace(key=source.key ^ words)
