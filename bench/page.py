"""`python -m bench page`: docs/benchmarks.md and README's figures, from bench/results/*.json.

Nothing in them is written by hand, and a test fails where they differ from the results.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from pathlib import Path

from bench import bars, plots, schema

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
README_RESULTS = RESULTS / "kd-cpu.json"


def write(draw: bool) -> Iterator[str]:
    """Write the page and README's part; the pictures too where `draw`. What was done."""
    if draw:
        for path in sorted(RESULTS.glob("*.json")):
            for picture in plots.draw(schema.load(path), RESULTS):
                yield f"drawn: {picture}"
    PAGE.write_text(page(RESULTS))
    yield f"written: {PAGE}"
    README.write_text(with_figures(README.read_text(), schema.load(README_RESULTS)))
    yield f"written: {README}"


def page(folder: Path) -> str:
    """docs/benchmarks.md from the results in a folder."""
    found = {path.name: schema.load(path) for path in sorted(folder.glob("*.json"))}
    parts = ["\n".join(_head(found))]
    for name, results in found.items():
        parts += ["\n".join(_file(name, results, folder))]
    return "\n\n".join(parts) + "\n"


def _head(found: dict[str, dict]) -> Iterator[str]:
    yield "# Benchmarks"
    yield ""
    yield (
        "Made by `python -m bench page` from [`bench/results/`](../bench/results); "
        "[`bench/NOTES.md`](../bench/NOTES.md) says what is measured and how. Times are medians in "
        "ms of forward and backward, with the distance of the quartiles; in parentheses how many "
        "times as long as the first contender. *Of the limit*: the least time that the machine "
        "allows, measured in the same rounds, over the first contender's. *(d)*: other processes "
        "were at work, and the row decides nothing."
    )
    yield ""
    yield "| File | Machine | torch | Commit | Date | Seconds | Disturbed rows |"
    yield "|---|---|---|---|---|--:|--:|"
    for name, results in found.items():
        about, rows = results["environments"][0], results["rows"]
        machine = about.get("gpu") or f"{about['cores']} cores of {about['cpu']}, {about['isa']}"
        disturbed = f"{sum(row['disturbed'] for row in rows)} of {len(rows)}"
        yield (
            f"| [{name}](../bench/results/{name}) | {machine} | {about['torch']} "
            f"| {about['commit']} | {about['date'][:10]} | {results['seconds']:.0f} | {disturbed} |"
        )


def _file(name: str, results: dict, folder: Path) -> Iterator[str]:
    both = [row for row in results["rows"] if row["pass"] == "both"]
    groups: dict[tuple, list[dict]] = {}
    for row in both:
        groups.setdefault((row["op"], row["suite"], row.get("kind"), row.get("axis")), []).append(
            row
        )
    for (op, suite, kind, axis), rows in groups.items():
        heading = " ".join(filter(None, [op, kind]))
        if suite != "main":
            heading += f": {suite}" + (f" over {axis}" if axis else "")
        yield f"## {heading} ({'GPU' if rows[0]['device'] == 'cuda' else 'CPU'})"
        yield ""
        yield from _times(rows)
        yield ""
        yield from _accuracy(rows)
        yield from _skipped(rows)
        stems = dict.fromkeys(plots.stem(row) for row in rows)
        names = [f"{stem}-{x}.png" for stem in stems for x in ("time", "memory", "curve")]
        for picture in names if suite in ("main", "curves") else ():
            if (folder / picture).exists():
                yield f"![{picture}](../bench/results/{picture})"
        yield ""
    for case in results.get("left_out", []):
        yield f"- left out: {case}"
    if any(row["op"] in ("kd", "softmax", "hint") for row in both):
        yield "<details><summary>What was promised, and what was measured</summary>"
        yield ""
        yield "```"
        yield from bars.lines(results)
        yield "```"
        yield ""
        yield "</details>"


def _times(rows: list[dict]) -> Iterator[str]:
    names = _names(rows)
    extra = [
        field
        for field in dict.fromkeys(name for row in rows for name, _ in schema.key(row))
        if field not in {*schema.KEY, "kind"} and len({str(row.get(field)) for row in rows}) > 1
    ]
    limit = ["of the limit"] if any("limit" in row["ms"] for row in rows) else []
    memory = ["peak MB"] if any(any(_peaks(row).values()) for row in rows) else []
    header = ["shape", "dtype", "threads", *extra, *names, *limit, *memory]
    yield "| " + " | ".join(header) + " |"
    yield "|---" * (3 + len(extra)) + "|--:" * (len(header) - 3 - len(extra)) + "|"
    for row in rows:
        first = next((row["ms"][name] for name in names if name in row["ms"]), None)
        cells = [_shape(row["shape"]), row["dtype"], str(row["threads"])]
        cells += [str(row.get(field, "")) for field in extra]
        cells += [_time(row, name, first) for name in names]
        if limit:
            cells.append(f"{row['ms']['limit'] / first:.2f}" if "limit" in row["ms"] else "")
        if memory:
            peaks = {name: value for name, value in _peaks(row).items() if value is not None}
            cells.append(", ".join(f"{name} {value:.0f}" for name, value in peaks.items()))
        if row["disturbed"]:
            cells[0] += " (d)"
        yield "| " + " | ".join(cells) + " |"


def _names(rows: list[dict]) -> list[str]:
    """The contenders, the library's own first."""
    names = dict.fromkeys(name for row in rows for name in row["ms"] if name != "limit")
    return sorted(names, key=lambda name: not schema.is_ours(name))


def _peaks(row: dict) -> dict[str, float | None]:
    return row.get("peak_mb") or {}


def _time(row: dict, name: str, first: float | None) -> str:
    if name not in row["ms"]:
        return ""
    ms, spread = row["ms"][name], row["iqr_ms"].get(name)
    text = _three(ms)
    if ms == first:
        text = f"**{text}**" + (f" ±{_three(spread)}" if spread else "")
    elif first:
        text += f" ({ms / first:.1f})"
    return text if row["right"][name] else f"{text} WRONG"


def _accuracy(rows: list[dict]) -> Iterator[str]:
    """Relative errors, the worst of all threads and allocators; of far and near inputs."""
    worst: dict[tuple, dict[str, list[float]]] = {}
    for row in rows:
        for which in ("error", "near"):
            for name, error in (row.get(which) or {}).items():
                if isinstance(error, dict):  # loss and gradient
                    at = worst.setdefault((_shape(row["shape"]), row["dtype"], name), {})
                    pair = [error["loss"], error["gradient"]]
                    old = at.setdefault(which, [0.0, 0.0])
                    at[which] = [max(a, b, key=_badness) for a, b in zip(old, pair, strict=True)]
    if not worst:
        return
    yield "<details><summary>Errors against float64</summary>"
    yield ""
    near = any("near" in errors for errors in worst.values())
    yield "| shape | dtype | contender | loss | gradient |" + (" near: loss | gradient |" * near)
    yield "|---|---|---|--:|--:|" + "--:|--:|" * near
    for (shape, dtype, name), errors in worst.items():
        cells = [f"{x:.1e}" for x in errors.get("error", [])]
        if near:
            cells += [f"{x:.1e}" for x in errors["near"]] if "near" in errors else ["", ""]
        yield f"| {shape} | {dtype} | {name} | " + " | ".join(cells) + " |"
    yield ""
    yield "</details>"
    yield ""


def _badness(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _skipped(rows: list[dict]) -> Iterator[str]:
    reasons: dict[tuple[str, str], int] = {}
    for row in rows:
        for name, reason in (row.get("skipped") or {}).items():
            reasons[name, reason] = reasons.get((name, reason), 0) + 1
    for (name, reason), count in reasons.items():
        yield f"- skipped in {count} rows: {name}: {reason}"
    if reasons:
        yield ""


def figures(results: dict) -> str:
    """README's table: all threads, torch's own allocator, float32 and wide bfloat16."""
    rows = [r for r in results["rows"] if r["suite"] == "main" and r["pass"] == "both"]
    threads = max(row["threads"] for row in rows)
    chosen = [
        row
        for row in rows
        if row["threads"] == threads
        and row["allocator"] == "default"
        and (row["dtype"] == "fp32" or (row["dtype"] == "bf16" and row["shape"][-1] >= 32000))
    ]
    about = results["environments"][chosen[0]["environment"]]
    lines = [
        "| Rows × classes | fastdistill (quartiles apart) | PyTorch, eager | torch.compile "
        "| Peak memory of a step | Error of the gradient |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in chosen:
        ms, peaks = row["ms"], row["peak_mb"]
        rivals = [f"{x} {peaks[x]:.0f}" for x in ("eager", "compile") if x in peaks]
        times = [f"{_three(ms[x])} ms" if x in ms else "skipped" for x in ("eager", "compile")]
        errors = [row["error"][x]["gradient"] for x in ("fastdistill", "eager")]
        lines.append(
            f"| {_shape(row['shape'])}, {row['dtype']} "
            f"| {_three(ms['fastdistill'])} ms ({_three(row['iqr_ms']['fastdistill'])}) "
            f"| {times[0]} | {times[1]} "
            f"| {peaks['fastdistill']:.0f} MB ({', '.join(rivals)}) "
            f"| {errors[0]:.1e} (eager {errors[1]:.1e}) |"
        )
    disturbed = sum(row["disturbed"] for row in chosen)
    quiet = (
        f"Other processes disturbed {disturbed} of these {len(chosen)} rows."
        if disturbed
        else "No other process was at work in these rows."
    )
    where = f"{threads} threads of {about['cpu']} ({about['isa']}), torch {about['torch']}"
    text = (
        f"Forward and backward of cross-entropy plus T² KL at T = 2, medians, {where}, "
        f"{about['date'][:10]}. Error: norm of the difference from float64 over its norm. {quiet} "
        "The distance between the quartiles says how far to trust a row. Every op, the machine's "
        "limits, and which of the project's own goals are missed: "
        "[docs/benchmarks.md](docs/benchmarks.md)."
    )
    command = f"python -m bench kd --threads {threads} --allocator default"
    lines += ["", "```bash", f"{command}    # this table, after checking every result", "```", ""]
    lines += textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


def with_figures(readme: str, results: dict) -> str:
    """README with its figures made anew; ValueError without the marks around them."""
    before, begin, rest = readme.partition(BEGIN + "\n")
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README: expected {BEGIN} ... {END}")
    return f"{before}{begin}{figures(results)}\n{end}{after}"


def _shape(shape: list) -> str:
    return " × ".join(map(str, shape))


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
