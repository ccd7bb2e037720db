"""The aggregate release of knowledge perturbation: each query answered once, debited before."""

from __future__ import annotations

import hashlib
import hmac
import math
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from fastdistill import _validate
from fastdistill.distill import extras, store
from fastdistill.distill.errors import JobError
from fastdistill.distill.private.committee import Committee, digest, raw_digest
from fastdistill.distill.private.journal import exclusive
from fastdistill.distill.private.ledger import Ledger
from fastdistill.distill.private.mechanism import Mechanism
from fastdistill.distill.private.provenance import DisjointShards
from fastdistill.privacy import noisy_softmax_sum

SECRET = ".secret"
"""File in the folder of the answers; it is not to be given away, the answers may be."""

BLOCK = 1 << 24
"""Logits that are made at once."""

SENSITIVITY = math.sqrt(2)
"""L2, of one query: one teacher changes, from one distribution to any other, whether a record is
added, removed or replaced."""


class Answers:
    """What teachers on disjoint parts say of public queries: a sum of distributions, with noise.

    Each query row x has a(x) = sum_k softmax(z_k(x) / T) + N(0, noise_std^2 I), released once:
    n rows together are Gaussian DP with mu = sqrt(2 n) / noise_std. Everything later that sees
    nothing but a(x), for any student, temperature and number of epochs, is post-processing.

    A release goes: the debit is written and flushed, the noise is drawn, the answer is written and
    flushed, the answer is returned. A kill in between leaves a debit without an answer: asking
    again is a second release, since the first noise may have been seen, and is debited again. An
    answer that was kept is never drawn or debited again.

    Args:
        committee: the teachers.
        provenance: k must be theirs.
        queries: [N, ...], the public pool, in a public order.
        temperature: T > 0, public.
        noise_std: > 0, of the sum.
        ledger: is debited. With `folder` it must have a journal: an answer may not outlive its
            debit.
        folder: where answers are kept; None: in memory only.
        generator: of the noise; None is the secure one (see `privacy.noisy_softmax_sum`). The
            release's place in the ledger is mixed in: a seed that begins again after a restart
            does not repeat its noise on other queries, whose difference would then have none.

    Raises:
        TypeError, ValueError: an argument, or kept answers whose debit the ledger does not have.
    """

    def __init__(
        self,
        committee: Committee,
        provenance: DisjointShards,
        queries: Tensor,
        *,
        temperature: float,
        noise_std: float,
        ledger: Ledger,
        folder: str | os.PathLike[str] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(provenance, DisjointShards):
            raise TypeError(f"provenance: expected DisjointShards, got {type(provenance).__name__}")
        if committee.k != provenance.k:
            raise ValueError(
                f"provenance: expected DisjointShards({committee.k}), one part per teacher, got "
                f"{provenance}"
            )
        self.committee = committee
        self.provenance = provenance
        self.queries = queries
        self.temperature = _validate.positive("temperature", temperature)
        self.noise_std = _validate.positive("noise_std", noise_std)
        self.ledger = ledger
        self.generator = generator
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            extras.require("Keeping answers", "safetensors")
            if not ledger.durable:
                raise ValueError(
                    "ledger: answers that are kept need a ledger with a journal (path=...): a kill "
                    "would lose the debit and keep the answer"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
        self.identity = hmac.new(
            self._secret(),
            digest(
                committee.fingerprint().encode(),
                raw_digest(queries).encode(),
                repr((self.temperature, self.noise_std, provenance)).encode(),
            ).encode(),
            hashlib.sha256,
        ).hexdigest()
        self._answered: dict[int, Tensor] = {}
        self._load()

    @property
    def answered(self) -> Tensor:
        """Rows that have an answer, int64, ascending."""
        return torch.tensor(sorted(self._answered), dtype=torch.int64)

    def mechanism(self, rows: int) -> Mechanism:
        """What the release of so many new rows is."""
        return Mechanism(
            "aggregate release", self.provenance.dataset_id, SENSITIVITY, self.noise_std, None, rows
        )

    def ask(self, rows: Tensor) -> Tensor:
        """The answers [n, classes] of these rows, float32; those that are new are debited.

        Args:
            rows: int64 [n] of the pool, chosen from public data and earlier answers only.

        Raises:
            BudgetExceeded: nothing was debited or released.
        """
        if rows.dtype is not torch.int64 or rows.ndim != 1:
            raise TypeError(f"rows: expected int64 [n], got {rows.dtype} {list(rows.shape)}")
        wanted = rows.tolist()
        if wanted and not 0 <= min(wanted) <= max(wanted) < len(self.queries):
            raise ValueError(f"rows: expected rows in [0, {len(self.queries) - 1}]")
        with self._exclusive():
            self._load()
            new = [row for row in dict.fromkeys(wanted) if row not in self._answered]
            if new:
                self._release(new)
        return torch.stack([self._answered[row] for row in wanted]) if wanted else torch.empty(0)

    def _release(self, rows: list[int]) -> None:
        index = torch.tensor(rows, dtype=torch.int64)
        key = digest(self.identity.encode(), repr(rows).encode())
        with torch.no_grad():
            first = self.committee.logits(self.queries[index[:1]])  # before the debit: it may fail
        block = max(BLOCK // max(first.numel(), 1), 1)
        generator = self._stream(key)
        self.ledger.spend(self.mechanism(len(rows)), key=key)
        sums = torch.cat([self._draw(part, generator) for part in index.split(block)])
        if self.folder is not None:
            about = {"kind": "answers", "identity": self.identity, "key": key}
            path = self.folder / f"{self._prefix}{key[:16]}.safetensors"
            store.save(path, {"rows": index, "sums": sums}, about)
        self._answered |= dict(zip(rows, sums, strict=True))

    def _stream(self, key: str) -> torch.Generator | None:
        """Of the noise of one release: the same answer again, or noise that no other had."""
        if self.generator is None:
            return None
        drawn = torch.empty((), dtype=torch.int64, device=self.generator.device)
        drawn.random_(generator=self.generator)
        place = list(dict.fromkeys((*self.ledger.keys, key))).index(key)
        seed = hashlib.sha256(f"{int(drawn)} {place}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(seed[:8], "little"))

    def _draw(self, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        logits = self.committee.logits(self.queries[rows])
        return noisy_softmax_sum(
            logits, self.temperature, self.noise_std, generator=generator
        ).float()

    def _secret(self) -> bytes:
        """Keys the digest of the teachers, which would otherwise be a release without noise."""
        if self.folder is None:
            return os.urandom(32)
        path = self.folder / SECRET
        with self._exclusive():
            if not path.exists():
                store.write_atomic(path, os.urandom(32))
                path.chmod(0o600)
            return path.read_bytes()

    @property
    def _prefix(self) -> str:
        return f"answers-{self.identity[:16]}-"

    def _load(self) -> None:
        """Take up what was kept, also by another process meanwhile."""
        if self.folder is None:
            return
        debited = self.ledger.reload()
        for path in sorted(self.folder.glob(f"{self._prefix}*.safetensors")):
            try:
                tensors, about = store.load(path)
            except JobError as error:
                raise ValueError(f"folder: {path} is damaged: {error.cause}") from None
            if about.get("identity") != self.identity:
                continue
            if about["key"] not in debited:
                raise ValueError(
                    f"ledger: {path} holds an answer that this ledger was never debited for: its "
                    "journal is another one, or was cut"
                )
            for row, total in zip(tensors["rows"].tolist(), tensors["sums"], strict=True):
                self._answered.setdefault(row, total)

    def _exclusive(self) -> AbstractContextManager[None]:
        return nullcontext() if self.folder is None else exclusive(self.folder / ".answers.lock")


def target_logits(sums: Tensor, k: int, noise_std: float) -> Tensor:
    """Logits of the class probabilities that a noisy answer leaves; post-processing.

    If the teachers' mean were LIKELIEST on the true class and equal elsewhere, the posterior under
    the noise s = noise_std / k would be softmax of LIKELIEST a / k / s^2. SPREAD keeps what they
    disagree about where there is little noise. So an answer that is mostly noise is nearly uniform,
    whatever k, the noise and the number of queries are, and nothing has to be tuned to them.

    Args:
        sums: a(x), [n, classes].
        k: number of teachers.
        noise_std: of the sum.

    Returns:
        [n, classes], to be distilled at temperature 1.
    """
    return (sums / k) / (SPREAD + (noise_std / k) ** 2 / LIKELIEST)


def trust(k: int, noise_std: float) -> float:
    """Weight of the answers beside public labels: the share of `target_logits` not due to noise.

    So answers that are noise alone leave a student that its labels have taught.
    """
    return SPREAD / (SPREAD + (noise_std / k) ** 2 / LIKELIEST)


SPREAD, LIKELIEST = 0.1, 0.8
