"""Rows as text."""

from __future__ import annotations

from collections.abc import Iterator

from bench import schema


def table(found: dict) -> str:
    """What one worker has found, for people."""
    return "\n".join(_lines(found))


def wrong(results: dict, *names: str) -> bool:
    """Whether one of these contenders was wrong anywhere."""
    return any(
        (row.get(key) or {}).get(name) is False
        for row in results["rows"]
        for key in ("right", "near_right")
        for name in names
    )


def _lines(found: dict) -> Iterator[str]:
    groups: dict[tuple, dict[str, dict]] = {}
    for row in found["rows"]:
        case = tuple(x for x in schema.key(row) if x[0] != "pass")
        groups.setdefault(case, {})[row["pass"]] = row
    for rows in groups.values():
        yield from _group(rows)
        yield ""


def _group(rows: dict[str, dict]) -> Iterator[str]:
    both = rows["both"]
    dropped = f", {both['dropped']} more dropped (others at work)" if both["dropped"] else ""
    yield f"{schema.title(both)}, {both['repetitions']} repetitions{dropped}"
    near = f"{'near: loss':>11}{'gradient':>9}" if both.get("near") else ""
    yield (
        f"  {'':20}{'error: loss':>11}{'gradient':>9}{near}{'forward':>10}{'backward':>10}"
        f"{'both ms':>10}{'IQR':>6}{'GB/s':>7}{'x limit':>9}{'peak MB':>9}"
    )
    for name in both["error"]:
        yield _contender(name, rows)
    if both["limit"]:
        skipped = ("ms", "traffic")
        parts = {k: v for k, v in both["limit"].items() if k not in skipped}
        text = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in parts.items())
        yield f"  {'limit':20}{both['limit']['ms']:50.3f}  ({text})"
    for name, ms in rows.get("replay", {"ms": {}})["ms"].items():
        yield f"  {name + ', as a graph':20}{ms:50.3f}"
    if modelled := both.get("modelled"):
        yield f"  {'modelled':20}{_modelled(modelled)}"
    for name, reason in both["skipped"].items():
        yield f"  {name:20}skipped: {reason}"
    if both["noisy"]:
        yield f"  noisy: {'; '.join(both['noisy'])}"


def _contender(name: str, rows: dict[str, dict]) -> str:
    both = rows["both"]
    error, near, ms = both["error"][name], (both.get("near") or {}).get(name), both["ms"][name]
    close = f"{near['loss']:11.1e}{near['gradient']:9.1e}" if near else " " * 20
    ratio = f"{ms / both['ms']['limit']:9.2f}" if both["limit"] else f"{'?':>9}"
    peak = both["peak_mb"][name]
    wrong = "" if both["right"][name] else "  WRONG"
    if (both.get("near_right") or {}).get(name) is False:
        wrong += "  WRONG where student and teacher are nearly alike"
    return (
        f"  {name:20}{error['loss']:11.1e}{error['gradient']:9.1e}"
        + (close if both.get("near") else "")
        + f"{rows['forward']['ms'][name]:10.3f}{rows['backward']['ms'][name]:10.3f}{ms:10.3f}"
        f"{both['iqr_ms'][name] / ms:6.0%}{both['gb_per_s'][name]:7.1f}{ratio}"
        + (f"{peak:9.1f}" if peak is not None else f"{'?':>9}")
        + wrong
    )


def _modelled(found: dict) -> str:
    """What the roofline says, and how the figures are to it."""
    if "skipped" in found:
        return f"skipped: {found['skipped']}"
    ratios = ", ".join(f"{n} x {v:.2f}" for n, v in found["measured_over_modelled"].items())
    return (
        f"{found['ms']:50.3f}  ({found['kernel']} on {found['gpu']}, bound by {found['bound']}; "
        f"any implementation {found['least_ms']:.3f}; measured: {ratios})"
    )
