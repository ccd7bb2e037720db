"""Pairwise covering sets: few configurations in which each two values of two factors meet.

All configurations of the kernels would take hours to compile; most faults of a configuration come
from one or two of its factors. The sets are committed in covering.json, so that a test's name means
the same tomorrow; `python tests/gpuless/triton_budgets.py --covering` writes them anew.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from entries import Config, TritonKernel

PATH = Path(__file__).with_name("covering.json")
TRIES = 500
Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairs(factors: Mapping[str, tuple[Any, ...]]) -> Iterator[Pair]:
    for f, g in itertools.combinations(sorted(factors), 2):
        for a, b in itertools.product(factors[f], factors[g]):
            yield (f, a), (g, b)


def met(config: Config) -> set[Pair]:
    return set(itertools.combinations(sorted(config.items()), 2))


def complete(kernel: TritonKernel, pair: Pair, draw: random.Random, count: int) -> list[Config]:
    """Up to `count` possible configurations with that pair; none where the pair is impossible."""
    found: list[Config] = []
    for _ in range(TRIES):
        config = {name: draw.choice(values) for name, values in kernel.factors.items()}
        config.update(pair)
        if kernel.possible(config):
            found.append(config)
            if len(found) == count:
                break
    return found


def make(kernel: TritonKernel) -> list[Config]:
    """Greedy: of 60 configurations that meet the next pair, the one that meets the most new ones.

    It begins with the values that came last: their pairs are the rarest.
    """
    draw = random.Random(0)
    waiting = dict.fromkeys(reversed(list(pairs(kernel.factors))))
    chosen: list[Config] = []
    while waiting:
        candidates = complete(kernel, next(iter(waiting)), draw, 60)
        if not candidates:
            del waiting[next(iter(waiting))]  # impossible
            continue
        best = max(candidates, key=lambda c: len(met(c) & waiting.keys()))
        chosen.append(best)
        for pair in met(best):
            waiting.pop(pair, None)
    return chosen


def missing(kernel: TritonKernel, chosen: list[Config]) -> set[Pair]:
    """Possible pairs that no configuration meets."""
    draw = random.Random(0)
    absent = set(pairs(kernel.factors)) - set().union(*map(met, chosen))
    return {pair for pair in absent if complete(kernel, pair, draw, 1)}


def read(kernel: TritonKernel) -> list[Config]:
    """The committed set; empty for a kernel that is new."""
    stored = json.loads(PATH.read_text()).get(kernel.name) if PATH.exists() else None
    return (
        [dict(zip(stored["factors"], row, strict=True)) for row in stored["rows"]] if stored else []
    )


def write(kernels: tuple[TritonKernel, ...]) -> None:
    parts = []
    for kernel in kernels:
        rows = [json.dumps([c[f] for f in kernel.factors]) for c in make(kernel)]
        head = f'  "factors": {json.dumps(list(kernel.factors))},\n  "rows": [\n   '
        parts.append(f' "{kernel.name}": {{\n{head}' + ",\n   ".join(rows) + "\n  ]\n }")
    PATH.write_text("{\n" + ",\n".join(parts) + "\n}\n")
