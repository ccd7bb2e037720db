"""`python -m bench compare A.json B.json`: what became slower, beyond the noise of both runs.

A contender is slower where its median is more than `LEAST` up and the quartiles of the two runs do
not touch; likewise faster. A row that other processes disturbed in either run decides nothing, and
is counted. Peak memory has no noise to speak of: more than `MEMORY` and 1 MB up is a regression, as
is a result that was right and is wrong. The status is that of the library's own contenders; the
others are shown, since a machine that has become slower is slower for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

from bench import schema

LEAST = 0.05
MEMORY = 0.10


class Change(NamedTuple):
    """One contender in one case."""

    where: str
    contender: str
    verdict: str  # "slower", "faster", "same", "disturbed", "wrong", "more memory", "gone"
    before: float
    after: float

    def __str__(self) -> str:
        ratio = f"x {self.after / self.before:.2f}" if self.before > 0 else ""
        unit = "MB" if self.verdict == "more memory" else "ms"
        numbers = f"{self.before:.4g} -> {self.after:.4g} {unit} {ratio}"
        return f"{self.verdict:12}{self.contender:20}{numbers:36}{self.where}"


BAD = ("slower", "wrong", "more memory", "gone")


def changes(before: dict, after: dict) -> Iterator[Change]:
    """Of every contender of every case that both runs have."""
    found = _cases(before)
    for key, b in _cases(after).items():
        if key in found:
            yield from _row(found[key], b)


def _cases(results: dict) -> dict[tuple, dict]:
    """One row for each case: of several turns, the middle of the quiet ones."""
    turns: dict[tuple, list[dict]] = {}
    for row in results["rows"]:
        turns.setdefault(schema.key(row), []).append(row)
    return {key: _middle(rows) for key, rows in turns.items()}


def _middle(rows: list[dict]) -> dict:
    rows = [row for row in rows if not row["disturbed"]] or rows
    first, ms, iqr = rows[0], {}, {}
    for name in first["ms"]:
        times = [row["ms"][name] for row in rows if name in row["ms"]]
        spreads = [row["iqr_ms"].get(name, 0.0) for row in rows]
        ms[name] = median(times)
        iqr[name] = max([max(times) - min(times), *spreads])  # the turns', or the widest of one
    return {**first, "ms": ms, "iqr_ms": iqr}


def _row(a: dict, b: dict) -> Iterator[Change]:
    where = schema.title(b)
    for name, old in a["ms"].items():
        if name == "limit":
            continue
        new = b["ms"].get(name)
        if new is None:
            yield Change(where, name, "gone", old, float("nan"))
            continue
        if a["right"][name] and not b["right"][name]:
            yield Change(where, name, "wrong", old, new)
        touch = abs(new - old) <= (a["iqr_ms"].get(name, 0) + b["iqr_ms"].get(name, 0)) / 2
        if a["disturbed"] or b["disturbed"]:
            verdict = "disturbed"
        elif touch or abs(new - old) <= LEAST * old:
            verdict = "same"
        else:
            verdict = "slower" if new > old else "faster"
        yield Change(where, name, verdict, old, new)
        peaks = [(row.get("peak_mb") or {}).get(name) for row in (a, b)]
        if None not in peaks and peaks[1] > peaks[0] * (1 + MEMORY) + 1:
            yield Change(where, name, "more memory", *peaks)


def regressions(found: list[Change], names: list[str] | None = None) -> list[Change]:
    """Those that count: of the library's own contenders, or of `names`."""
    return [
        x
        for x in found
        if x.verdict in BAD and (x.contender in names if names else schema.is_ours(x.contender))
    ]


def lines(before: dict, after: dict, names: list[str] | None = None) -> Iterator[str]:
    """The report; its last line is the sum."""
    for field in ("cpu", "isa", "gpu", "torch"):
        values = [sorted({str(e.get(field)) for e in r["environments"]}) for r in (before, after)]
        if values[0] != values[1]:
            yield f"not the same {field}: {', '.join(values[0])}; then {', '.join(values[1])}"
    found = list(changes(before, after))
    for change in sorted(found, key=lambda x: (x.verdict not in BAD, x.contender, x.where)):
        if change.verdict not in ("same", "disturbed"):
            yield str(change)
    for name in dict.fromkeys(x.contender for x in found):
        ratios = [x.after / x.before for x in found if x.contender == name and x.verdict in TIMED]
        if ratios:
            yield f"{'':12}{name:20}x {median(ratios):.2f} in the median of {len(ratios)} cases"
    cases = [{schema.key(row) for row in r["rows"]} for r in (before, after)]
    only = [len(cases[0] - cases[1]), len(cases[1] - cases[0])]
    disturbed = sum(x.verdict == "disturbed" for x in found)
    yield (
        f"{len(regressions(found, names))} regressions in {len(cases[0] & cases[1])} cases; "
        f"{disturbed} figures disturbed, not judged; {only[0]} cases only in the first run, "
        f"{only[1]} only in the second"
    )


TIMED = ("slower", "faster", "same")
