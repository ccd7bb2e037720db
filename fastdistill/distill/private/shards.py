"""Which teacher sees a record: decided by the record's own id, so that no other record matters."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistill.distill.private.mechanism import count as _count


def shard_of(record_id: str | bytes | int, k: int, salt: str = "") -> int:
    """The part, 0..k - 1, of a record: a hash of its id that anyone can compute.

    A shuffle of all records, or a stratification by class, would move other records when one is
    added or removed, and change every teacher.

    Args:
        record_id: the record's name for life: it must not depend on other records (a row number
            that closes up behind a removed record does). Records of one id go to one part, so
            with a person's id for all of their records the unit is a person.
        k: number of parts.
        salt: public, and fixed before the records are looked at.
    """
    k = _count("k", k)
    kind, raw = _bytes(record_id)
    digest = hashlib.blake2b(kind + raw, digest_size=16, key=hashlib.sha256(salt.encode()).digest())
    return int.from_bytes(digest.digest(), "big") % k


def assign(record_ids: Sequence[str | bytes | int], k: int, salt: str = "") -> list[Tensor]:
    """The rows of each part: k tensors int64, in the order of the records. Parts may be empty."""
    rows: list[list[int]] = [[] for _ in range(_count("k", k))]
    for row, record_id in enumerate(record_ids):
        rows[shard_of(record_id, k, salt)].append(row)
    return [torch.tensor(part, dtype=torch.int64) for part in rows]


def _bytes(record_id: object) -> tuple[bytes, bytes]:
    if isinstance(record_id, bool) or not isinstance(record_id, (str, bytes, int)):
        raise TypeError(f"record_id: expected a str, bytes or int, got {type(record_id).__name__}")
    if isinstance(record_id, bytes):
        return b"b", record_id
    return (b"s" if isinstance(record_id, str) else b"i"), str(record_id).encode()
