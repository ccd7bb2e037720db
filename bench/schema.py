"""The one form of a results file: what every op's rows have, and what they may have.

    {"schema": 1, "seconds": s, "environments": [{...}, ...], "rows": [{...}, ...]}

A row is one case. Its strings, whole numbers and lists say what was measured (they are its key);
its mappings, by contender, say what came out. Further fields of either kind are welcome: `compare`
and `page` take them as they come.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

VERSION = 1

KEY = {
    "op": str,  # "kd"
    "suite": str,  # "main"; "isa", "grid", "curves", ...
    "shape": list,  # whole numbers
    "dtype": str,  # "fp32", "bf16", "fp16"
    "threads": int,
    "device": str,  # "cpu" or "cuda"
    "pass": str,  # "forward", "backward", "both", "replay"
}
MEASURED = {
    "ms": dict,  # contender -> median, > 0; "limit" is the machine's
    "iqr_ms": dict,  # contender -> distance of the quartiles
    "right": dict,  # contender -> whether it computes what it should
    "repetitions": int,
    "disturbed": bool,  # other processes were at work: decides nothing
    "environment": int,  # which of the environments
}
ENVIRONMENT = ("torch", "cpu", "isa", "threads", "date", "commit", "load_average")
NO_KEY = {"repetitions", "dropped", "environment", "disturbed", "noisy"}

OURS = ("fastdistill", "triton", "cuda", "philox", "chacha20")
"""How the names of the library's own contenders begin."""


def problems(results: dict) -> Iterator[str]:
    """What is not as it should be."""
    if results.get("schema") != VERSION:
        yield f"schema: expected {VERSION}, got {results.get('schema')!r}"
    environments = results.get("environments") or []
    for i, environment in enumerate(environments):
        if missing := [name for name in ENVIRONMENT if name not in environment]:
            yield f"environments[{i}]: no {', '.join(missing)}"
    rows = results.get("rows") or []
    if not rows:
        yield "rows: expected at least one"
    for i, row in enumerate(rows):
        for name, kind in {**KEY, **MEASURED}.items():
            if not isinstance(row.get(name), kind):
                yield f"rows[{i}].{name}: expected {kind.__name__}, got {row.get(name)!r}"
        ms, names = row.get("ms") or {}, set(row.get("ms") or {}) - {"limit"}
        if any(not value > 0 for value in ms.values()):
            yield f"rows[{i}].ms: expected times above 0, got {ms}"
        if names != set(row.get("right") or {}):
            yield f"rows[{i}].right: expected {sorted(names)}, got {sorted(row.get('right') or {})}"
        if not 0 <= (row.get("environment") or 0) < len(environments):
            yield f"rows[{i}].environment: expected one of {len(environments)}"


def load(path: Path) -> dict:
    """The results of a file; those of `make gpu` are inside. ValueError says what is wrong."""
    results = json.loads(path.read_text())
    if "bench" in results:
        results = {"schema": results["schema"], **results["bench"]}
    if found := list(problems(results)):
        raise ValueError(f"{path}: not as bench/schema.py describes: {'; '.join(found[:5])}")
    return results


def key(row: dict) -> tuple:
    """What was measured, without what came out."""
    return tuple(
        (name, tuple(value) if isinstance(value, list) else value)
        for name, value in sorted(row.items())
        if name not in NO_KEY and isinstance(value, (str, int, list))
    )


def is_ours(name: str) -> bool:
    """Whether a contender is the library's own."""
    return name.startswith(OURS)


def text(shape: list | tuple) -> str:
    """A shape as people write it."""
    return "x".join(map(str, shape))


def title(row: dict) -> str:
    """The key of a row, for people."""
    about = [row["op"], *filter(None, [row.get("kind")]), text(row["shape"]), row["dtype"]]
    rest = [f"{row['threads']} threads" if row["device"] == "cpu" else "GPU"]
    rest += [str(row[name]) for name in ("allocator", "isa", "suite") if row.get(name)]
    known = {*KEY, "kind", "allocator", "isa"}
    rest += [f"{name} {value}" for name, value in key(row) if name not in known]
    return f"{' '.join(about)} {row['pass']} ({', '.join(rest)})"
