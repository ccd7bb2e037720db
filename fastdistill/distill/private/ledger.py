"""One account for all stages of a pipeline: every mechanism is debited before it runs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastdistill import _validate
from fastdistill.distill.private import accounting
from fastdistill.distill.private.accounting import ORDERS
from fastdistill.distill.private.journal import Journal
from fastdistill.distill.private.mechanism import Mechanism, adjacency_of, delta_of, named
from fastdistill.distill.private.provenance import DPTrained, check_sampling


class BudgetExceeded(ValueError):
    """The mechanism would pass the budget, or leave the schedule; nothing was debited."""


class Ledger:
    """What was spent, on which data, and the epsilon that may be claimed for all of it.

    Three ways to keep one:

    - *With a budget* (accountant "rdp" or "gaussian"): `spend` refuses the mechanism that would
      pass it, so (budget, delta) holds however noise and number of the mechanisms were chosen from
      earlier results. These are privacy filters: Renyi at one order fixed in advance (Feldman and
      Zrnic 2021, theorem 4.3) and Gaussian (Smith and Thakurta 2022, arXiv 2210.17520).
    - *With a schedule*: all mechanisms, fixed in advance, in their order; `spend` refuses any
      other. With this "prv" may be used, for which no filter is known to hold.
    - *With neither*: the epsilon is that of what was debited, and holds if its noise and number
      did not depend on earlier results.

    Args:
        delta: one, for the whole pipeline.
        adjacency: "add_remove", "replace" or "zero_out"; every sensitivity must hold under it.
        unit: what a record is, for people: whose data are protected.
        budget: epsilon that must not be passed.
        schedule: the mechanisms, fixed in advance.
        accountant: "gaussian", "rdp" or "prv"; None: "gaussian", or "rdp" for a history with
            sampling (with a budget it must be named).
        disjoint: no record is in two of the data sets that `dataset_id` names: epsilon is then the
            largest of theirs (parallel composition). Otherwise all mechanisms compose as if they
            were on one data set.
        order: of the Renyi filter. None: the best for a budget spent by Gaussian mechanisms alone.
        path: of the journal, which makes every debit durable before `spend` returns. A ledger on
            an existing journal goes on from it. None: in memory only.
        scope: several ledgers may share a journal, each with a name of its own.

    Raises:
        TypeError, ValueError: an argument, or a journal of other settings.
    """

    def __init__(
        self,
        *,
        delta: float,
        adjacency: str,
        unit: str = "one record",
        budget: float | None = None,
        schedule: Sequence[Mechanism] | None = None,
        accountant: str | None = None,
        disjoint: bool = False,
        order: float | None = None,
        path: str | os.PathLike[str] | None = None,
        scope: str = "ledger",
    ) -> None:
        self.delta = delta_of(delta)
        self.adjacency = adjacency_of(adjacency)
        self.unit = named("unit", unit)
        self.disjoint = _validate.boolean("disjoint", disjoint)
        self.scope = named("scope", scope)
        self.budget = None if budget is None else _validate.positive("budget", budget)
        self.schedule = None if schedule is None else tuple(schedule)
        for m in self.schedule or ():
            check_sampling(m, self.adjacency)
        self._accountant = None if accountant is None else accounting.check_accountant(accountant)
        self._check_kind()
        self.order = self._order(order)
        self._entries: list[tuple[Mechanism, str]] = []
        self._journal = None if path is None else Journal(path)
        if self._journal is not None:
            with self._journal.locked():
                self._load()

    def _check_kind(self) -> None:
        if self.budget is not None and self.schedule is not None:
            raise ValueError(
                "budget: expected a budget or a schedule, got both; the epsilon of a schedule is "
                "known before it starts"
            )
        if self.budget is not None and self._accountant not in ("rdp", "gaussian"):
            raise ValueError(
                'accountant: a budget needs "rdp" or "gaussian", whose filters hold for mechanisms '
                f'chosen from earlier results; got {self._accountant!r}. "prv" takes a schedule'
            )
        if self._accountant == "prv" and self.schedule is None:
            raise ValueError(
                'accountant: "prv" holds for mechanisms fixed in advance: give a schedule'
            )

    def _order(self, order: float | None) -> float | None:
        if self.budget is None or self._accountant != "rdp":
            if order is not None:
                raise ValueError("order: expected None but for a budget with accountant rdp")
            return None
        if order is not None:
            order = _validate.number("order", order)
            if order <= 1:
                raise ValueError(f"order: expected a number > 1, got {order}")
            return order
        # The largest slope s of a divergence s a that stays within the budget at that order.
        return max(ORDERS, key=lambda a: self._allowed(a) / a)

    def _allowed(self, order: float) -> float:
        """The Renyi divergence of that order that is (budget, delta)-private; may be < 0."""
        assert self.budget is not None
        return self.budget - accounting.rdp_excess(order, self.delta)

    def _header(self) -> dict[str, Any]:
        return {
            "delta": self.delta, "adjacency": self.adjacency, "unit": self.unit,
            "disjoint": self.disjoint,
        }  # fmt: skip

    def _load(self) -> None:
        assert self._journal is not None
        ours = [r for r in self._journal.read() if r.get("scope") == self.scope]
        for record in ours:
            if record.get("settings") != self._header():
                raise ValueError(
                    f"path: the journal {self._journal.path} has another {self.scope!r}: "
                    f"{record.get('settings')}, not {self._header()}"
                )
        held = [(Mechanism.from_json(m), r["key"]) for r in ours for m in r["mechanisms"]]
        before = len(self._entries)
        if held[:before] != self._entries:
            raise ValueError(
                f"path: the journal {self._journal.path} no longer holds the {before} debits that "
                "this ledger knows of: it was cut, replaced or removed"
            )
        if len(held) > before:
            self._entries = held
            self._check_held([m for m, _ in held])

    def _check_held(self, history: Sequence[Mechanism]) -> None:
        """A journal may hold more than this ledger would have let pass."""
        if self.schedule is not None and self.schedule[: len(history)] != tuple(history):
            raise ValueError(
                f"schedule: the journal holds {[m.name for m in history]}, which is no beginning "
                "of it: it was not fixed in advance"
            )
        if self.budget is None:
            return
        for name, part in self._parts(history).items():
            if self._passes(part):
                raise ValueError(
                    f"budget: what the journal holds on {name} has passed epsilon = "
                    f"{self.budget:g} at delta = {self.delta:g} already: {self._epsilon(part):.4g}"
                )

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        if self._journal is None:
            yield
            return
        with self._journal.locked():
            self._load()  # another process may have spent
            yield

    def _held(self) -> list[tuple[Mechanism, str]]:
        """All debits, those of other processes and ledgers on the same journal included."""
        if self._journal is not None:
            self._load()  # whole lines alone are read: no lock is needed
        return self._entries

    @property
    def history(self) -> tuple[Mechanism, ...]:
        """All that was debited, in order."""
        return tuple(m for m, _ in self._held())

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of all debits, in order."""
        return tuple(key for _, key in self._held())

    @property
    def durable(self) -> bool:
        """Whether debits survive a kill."""
        return self._journal is not None

    def reload(self) -> tuple[str, ...]:
        """Read the journal again, as another process may have spent; all keys."""
        with self._exclusive():
            return self.keys

    def spend(self, *mechanisms: Mechanism, key: str = "") -> None:
        """Debit mechanisms, durably and all or none, before their noise is drawn.

        Args:
            *mechanisms: what is about to run.
            key: names the release, so that a reader of the journal can tell what a debit is for.

        Raises:
            BudgetExceeded: they would pass the budget or leave the schedule: they must not run.
        """
        if not mechanisms:
            raise ValueError("mechanisms: expected at least one")
        for m in mechanisms:
            if not isinstance(m, Mechanism):
                raise TypeError(f"mechanisms: expected a Mechanism, got {type(m).__name__}")
            check_sampling(m, self.adjacency)
        with self._exclusive():
            self._refuse(mechanisms)
            if self._journal is not None:
                record = {
                    "scope": self.scope, "settings": self._header(), "key": key,
                    "mechanisms": [m.to_json() for m in mechanisms],
                }  # fmt: skip
                self._journal.append(record)
            self._entries += [(m, key) for m in mechanisms]

    def include(self, teacher: DPTrained, key: str) -> None:
        """Debit the history of a teacher, once for each key, which names that teacher's release.

        Raises:
            ValueError: its adjacency is another one, or `key` names another release.
            BudgetExceeded: see `spend`.
        """
        if teacher.adjacency != self.adjacency:
            raise ValueError(
                f"adjacency: the ledger's is {self.adjacency}, the teacher's "
                f"{teacher.adjacency}: their sensitivities do not add up to one statement"
            )
        if key not in self.keys:
            self.spend(*teacher.inherited, *teacher.history, key=key)
            return
        under_key = Counter(m for m, other in self._held() if other == key)
        if Counter(teacher.history) - under_key:
            raise ValueError(
                f"key: expected that of this teacher's debit, but under {key!r} the ledger holds "
                f"{[m.to_json() for m in under_key]}, not {[m.to_json() for m in teacher.history]}"
            )
        lacking = Counter((*teacher.inherited, *teacher.history)) - Counter(self.history)
        if lacking:
            self.spend(*lacking.elements(), key=key)

    def _refuse(self, mechanisms: Sequence[Mechanism]) -> None:
        before = len(self._entries)
        after = (*self.history, *mechanisms)
        if self.schedule is not None:
            if self.schedule[: len(after)] != after:
                wanted = [m.name for m in self.schedule[before : len(after)]]
                raise BudgetExceeded(
                    f"mechanisms: the schedule was fixed in advance and has {wanted or 'no more'} "
                    f"next, got {[m.to_json() for m in mechanisms]}"
                )
            return
        if self.budget is None:
            return
        over = [name for name, part in self._parts(after).items() if self._passes(part)]
        if over:
            raise BudgetExceeded(
                f"mechanisms: {', '.join(m.name for m in mechanisms)} would pass the budget "
                f"epsilon = {self.budget:g} at delta = {self.delta:g} on {', '.join(over)}; "
                f"nothing was debited. Spent so far: {self.epsilon():.4g}"
            )

    def _passes(self, history: Sequence[Mechanism]) -> bool:
        assert self.budget is not None
        if self._accountant == "gaussian":
            spent = accounting.gaussian_delta(accounting.mu(history), self.budget)
            return not spent <= self.delta  # a NaN passes it
        assert self.order is not None
        return not accounting.rdp(history, [self.order])[0] <= self._allowed(self.order)

    def _parts(self, history: Sequence[Mechanism]) -> dict[str, list[Mechanism]]:
        """What composes, by data set; all in one where the data sets may overlap."""
        names = list(dict.fromkeys(m.dataset_id for m in history))
        if not self.disjoint:
            return {" and ".join(names): list(history)} if names else {}
        return {name: [m for m in history if m.dataset_id == name] for name in names}

    def accountant_for(self, history: Sequence[Mechanism]) -> str:
        """The accountant that computes epsilon of this history."""
        if self._accountant is not None:
            return self._accountant
        return "gaussian" if all(m.sampling_rate is None for m in history) else "rdp"

    def epsilon(self) -> float:
        """Of all that was debited, at `delta`: the largest over disjoint data sets.

        For mechanisms whose noise and number did not depend on earlier results. Where they did,
        what holds is `guarantee`.
        """
        return self._epsilon(self.history)

    def _epsilon(self, history: Sequence[Mechanism]) -> float:
        return max(
            (
                accounting.epsilon(part, self.delta, self.accountant_for(part))
                for part in self._parts(history).values()
            ),
            default=0.0,
        )

    def guarantee(self) -> float:
        """The epsilon that holds whatever was chosen from earlier results.

        The budget; or that of the whole schedule, which may have been left early because of them.
        With neither nothing may be chosen so, and it is `epsilon`.
        """
        if self.schedule is not None:
            return self._epsilon(self.schedule)
        return self.epsilon() if self.budget is None else self.budget

    def accountants(self) -> str:
        """Names of the accountants behind `epsilon`, for people."""
        used = {self.accountant_for(part) for part in self._parts(self.history).values()}
        return ", ".join(sorted(used)) or "none"

    def stages(self) -> list[dict[str, Any]]:
        """One entry per debit: its mechanism, key, epsilon alone and epsilon of all up to it."""
        found = []
        held = self._held()
        history = [m for m, _ in held]
        for i, (m, key) in enumerate(held):
            alone = accounting.epsilon([m], self.delta, self._stage_accountant(m))
            found.append(
                {
                    **m.to_json(),
                    "key": key,
                    "epsilon_alone": alone,
                    "epsilon_so_far": self._epsilon(history[: i + 1]),
                }
            )
        return found

    def _stage_accountant(self, m: Mechanism) -> str:
        return "gaussian" if m.sampling_rate is None else self.accountant_for([m])

    def __str__(self) -> str:
        lines = [
            f"epsilon = {self.epsilon():.4g} at delta = {self.delta:g}, adjacency "
            f"{self.adjacency}, unit: {self.unit}, accountant {self.accountants()}"
        ]
        if self.budget is not None:
            order = "" if self.order is None else f" (order {self.order:g})"
            lines.append(f"guaranteed whatever was chosen: epsilon <= {self.budget:g}{order}")
        for i, stage in enumerate(self.stages(), 1):
            rate = stage["sampling_rate"]
            lines.append(
                f"{i}. {stage['name']} on {stage['dataset_id']}: Gaussian, noise "
                f"{stage['noise_std']:.6g} on sensitivity {stage['sensitivity']:.6g}, "
                + ("" if rate is None else f"sampled at {rate:.4g}, ")
                + f"{stage['releases']} x {stage['steps']} releases x steps: epsilon "
                f"{stage['epsilon_alone']:.4g}, with those before {stage['epsilon_so_far']:.4g}"
            )
        return "\n".join(lines)
