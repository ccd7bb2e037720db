"""The budgets of the compiled Triton kernels: registers, spills, widths, bytes, instructions.

    python tests/gpuless/triton_budgets.py              compile all, show what moved, rewrite
    python tests/gpuless/triton_budgets.py --check      show what moved; 1 where one is exceeded
    python tests/gpuless/triton_budgets.py --covering   rewrite the covering sets first
    python tests/gpuless/triton_budgets.py --roofline   the modelled roofline of the headlines

Budgets are kept per version of Triton, since each has its own compiler: run the command under the
version whose budgets are meant (PYTHONPATH may name another one).
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import math
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a program, from anywhere

import covering
import table
import triton
import triton_static as static
from entries import TARGETS, Config, TritonKernel
from triton.runtime.jit import JITFunction

HERE = Path(__file__).parent

PATH = HERE / "triton_budgets.json"
AT_LEAST = ("width",)
"""Figures of which more is better; of all others a budget is the most that is allowed."""

NEITHER = ("wide_load", "wide_store")
"""Parts of "load" and "store", for the roofline."""

SLACK = 0.1
"""Of registers and counts of instructions: the compilers are not deterministic to the last one.
Of 130 kernels compiled four times three differed, by 61 registers for 56 and 18 instructions of
236. Stack, spills, shared memory, widths and bytes have none."""


class Job(NamedTuple):
    """One kernel to compile."""

    kernel: TritonKernel
    name: str
    config: Config
    target: str


def jobs() -> list[Job]:
    """The headlines for every target, then the covering sets."""
    return list(_jobs())


def _jobs() -> Iterator[Job]:
    for kernel in table.TRITON:
        for name, config in kernel.headlines.items():
            for target in TARGETS:
                if kernel.possible({**config, "target": target}):
                    yield Job(kernel, f"{name}/{target}", {**config, "target": target}, target)
        for config in covering.read(kernel):
            values = (f"no_{k}" if v is False else k if v is True else v for k, v in config.items())
            yield Job(kernel, " ".join(map(str, values)), config, config["target"])


class Compiled(NamedTuple):
    """What one job gave."""

    job: Job
    launch: static.Launch
    code: Any
    cost: static.Cost

    def figures(self) -> dict[str, float]:
        """What is budgeted."""
        code = self.code
        return {
            "registers": code.registers,
            "stack": code.stack,
            "spills": code.spills,
            "shared": code.shared,
            "width": static.narrowest(code),
            "load": round(self.cost.load, 3),
            "store": round(self.cost.store, 3),
            "wide_load": round(self.cost.wide_load, 3),
            "wide_store": round(self.cost.wide_store, 3),
            "ex2": round(self.cost.ex2, 3),
            "instructions": round(self.cost.instructions, 3),
            **{f"mix.{kind}": n for kind, n in sorted(code.everything.mix.items())},
        }


_parsing = threading.Lock()


@contextlib.contextmanager
def parsed_one_at_a_time() -> Iterator[None]:
    """Two threads in `ast.parse` end with a SystemError now and then (CPython 3.11)."""
    parse = JITFunction.parse

    def alone(kernel: JITFunction) -> ast.Module:
        with _parsing:
            return parse(kernel)

    JITFunction.parse = alone
    try:
        yield
    finally:
        JITFunction.parse = parse


def compile_all(chosen: list[Job]) -> list[Compiled]:
    """As many at a time as there are cores: the compilers hold no lock while they work."""
    launches = [static.record(job.kernel, job.config, job.target) for job in chosen]

    def one(job: Job, launch: static.Launch) -> Compiled:
        made = static.compile_launch(launch, job.target)
        code = static.read(made)
        return Compiled(job, launch, code, static.cost(job.kernel, launch, made, code, job.target))

    with parsed_one_at_a_time(), ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, chosen, launches))


Budgets = dict[str, dict[str, dict[str, float]]]  # kernel -> job -> figure -> number


def read(version: str = triton.__version__) -> Budgets | None:
    """Of one version of Triton; None where there are none."""
    return json.loads(PATH.read_text()).get(version) if PATH.exists() else None


def write(found: Budgets, version: str = triton.__version__) -> None:
    everything = json.loads(PATH.read_text()) if PATH.exists() else {}
    everything[version] = found
    versions = []
    for name, kernels in sorted(everything.items()):
        parts = []
        for kernel, rows in kernels.items():
            lines = [f"   {json.dumps(job)}: {json.dumps(row)}" for job, row in rows.items()]
            parts.append(f'  "{kernel}": {{\n' + ",\n".join(lines) + "\n  }")
        versions.append(f' "{name}": {{\n' + ",\n".join(parts) + "\n }")
    PATH.write_text("{\n" + ",\n".join(versions) + "\n}\n")


def moved(before: dict[str, float], after: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Figure -> (budget, now) where they differ."""
    names = {**before, **after}
    both = {name: (before.get(name, 0), after.get(name, 0)) for name in names}
    return {name: pair for name, pair in both.items() if pair[0] != pair[1]}


def exceeded(before: dict[str, float], after: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Those that moved for the worse, by more than what the compilers do of themselves."""

    def worse(name: str, old: float, new: float) -> bool:
        if name in AT_LEAST:
            return new < old
        if name in NEITHER:
            return False
        counted = name in ("registers", "instructions") or name.startswith("mix.")
        return new > old + (math.ceil(SLACK * old) + 2 if counted else 0)

    differing = moved(before, after)
    return {name: pair for name, pair in differing.items() if worse(name, *pair)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--covering", action="store_true", help="rewrite covering.json first")
    parser.add_argument("--roofline", action="store_true", help="print the modelled roofline")
    options = parser.parse_args(arguments)
    if options.covering:
        covering.write(table.TRITON)
    if options.roofline:
        import roofline

        print("\n".join(roofline.lines()))
        return 0
    old, found = read() or {}, {}
    worse = 0
    for result in compile_all(jobs()):
        kernel, name = result.job.kernel.name, result.job.name
        figures = found.setdefault(kernel, {})[name] = result.figures()
        before = old.get(kernel, {}).get(name)
        if before is None:
            print(f"new   {kernel} {name}: {figures['registers']} registers")
            worse += options.check
            continue
        over = exceeded(before, figures)
        worse += bool(over)
        for figure, (a, b) in moved(before, figures).items():
            print(f"{'OVER ' if figure in over else 'moved'} {kernel} {name}: {figure} {a} -> {b}")
    for kernel, rows in old.items():
        for name in rows.keys() - found.get(kernel, {}).keys():
            print(f"gone  {kernel} {name}")
    print(f"Triton {triton.__version__}: {sum(map(len, found.values()))} kernels compiled")
    if not options.check:
        write(found)
    return int(options.check and worse > 0)


if __name__ == "__main__":
    sys.exit(main())
