"""Rows as text."""

from __future__ import annotations

from collections.abc import Iterator


def table(found: dict) -> str:
    """What one worker has found, for people."""
    return "\n".join(_lines(found))


def title(row: dict) -> str:
    """Shape, dtype, threads and so on of a row."""
    shape = "x".join(map(str, row["shape"]))
    where = f"{row['isa']}, {row['threads']} threads, {row['allocator']} allocator"
    return f"{row['op']} {shape} {row['dtype']} ({'GPU' if row['device'] == 'cuda' else where})"


def wrong(results: dict, *names: str) -> bool:
    """Whether one of these contenders was wrong anywhere."""
    return any(row["right"].get(name) is False for row in results["rows"] for name in names)


def _lines(found: dict) -> Iterator[str]:
    groups: dict[tuple, dict[str, dict]] = {}
    for row in found["rows"]:
        groups.setdefault((row["dtype"], row["threads"]), {})[row["pass"]] = row
    for rows in groups.values():
        yield from _group(rows)
        yield ""


def _group(rows: dict[str, dict]) -> Iterator[str]:
    both = rows["both"]
    dropped = f", {both['dropped']} more dropped (others at work)" if both["dropped"] else ""
    yield f"{title(both)}, {both['repetitions']} repetitions{dropped}"
    yield (
        f"  {'':20}{'error: loss':>11}{'gradient':>9}{'forward':>10}{'backward':>10}{'both ms':>10}"
        f"{'IQR':>6}{'GB/s':>7}{'x limit':>9}{'peak MB':>9}"
    )
    for name, error in both["error"].items():
        ms = both["ms"][name]
        ratio = f"{ms / both['ms']['limit']:9.2f}" if both["limit"] else f"{'?':>9}"
        peak = both["peak_mb"][name]
        yield (
            f"  {name:20}{error['loss']:11.1e}{error['gradient']:9.1e}"
            f"{rows['forward']['ms'][name]:10.3f}{rows['backward']['ms'][name]:10.3f}{ms:10.3f}"
            f"{both['iqr_ms'][name] / ms:6.0%}{both['gb_per_s'][name]:7.1f}{ratio}"
            + (f"{peak:9.1f}" if peak is not None else f"{'?':>9}")
            + ("" if both["right"][name] else "  WRONG")
        )
    if both["limit"]:
        parts = {k: v for k, v in both["limit"].items() if k not in ("ms", "traffic")}
        text = ", ".join(f"{name.replace('_', ' ')} {ms:.3f}" for name, ms in parts.items())
        yield f"  {'limit':20}{both['limit']['ms']:50.3f}  ({text})"
    for name, reason in both["skipped"].items():
        yield f"  {name:20}skipped: {reason}"
    if both["noisy"]:
        yield f"  noisy: {'; '.join(both['noisy'])}"
