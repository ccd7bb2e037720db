"""The command: `python -m bench all`, `kd`, `curves`, `compare`, `page`, ... (--help)."""

import argparse
import functools
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench import bars, callgrind, cases, compare, instructions, page, privacy, report, run, schema

RESULTS = Path(__file__).parent / "results"
SUITES = {op: ("main", "isa", "peers", "grid") for op in cases.OPS} | {"curves": ("curves",)}
"""Of each command, what `all` measures; by itself, a command measures the first."""
say = functools.partial(print, flush=True)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    options.arguments = arguments
    return options.run(options)


def _measure(options: argparse.Namespace) -> int:
    name = options.command
    suites = options.suites or SUITES[name][:1]
    results = run.measure(_settings(options, name, suites), say)
    if options.json:
        _write(results, options.json)
    return int(report.wrong(results, "fastdistill", "triton", "cuda"))


def _settings(options: argparse.Namespace, name: str, suites: tuple[str, ...]) -> run.Settings:
    op = "kd" if name == "curves" else name
    return run.Settings(
        op=op,
        device=options.device,
        shapes=options.shapes or cases.OPS[op].shapes,
        dtypes=options.dtypes or (["fp32"] if name == "curves" else ["fp32", "bf16"]),
        threads=options.threads,
        allocators=[options.allocator] if options.allocator else None,
        contenders=options.contenders,
        quick=options.quick,
        patience=options.patience,
        suites=suites,
        memory_gb=options.memory_gb,
    )


def _all(options: argparse.Namespace) -> int:
    """Everything, then the page; the status is whether all of ours was right."""
    begin, status = time.perf_counter(), 0
    folder = options.folder or RESULTS
    for name, suites in SUITES.items():
        results = run.measure(_settings(options, name, suites), say)
        _write(results, folder / f"{name}-{options.device}.json")
        if name in ("kd", "softmax", "hint") and options.device == "cpu":
            say("\n".join(bars.lines(results)))
        status |= report.wrong(results, "fastdistill", "triton", "cuda")
    if options.device == "cpu":
        for name in ALONE:  # in processes of their own: they set the number of threads
            path = folder / f"{name}-cpu.json"
            command = [sys.executable, "-m", "bench", name, "--json", str(path)]
            done = subprocess.run([*command, *["--quick"] * options.quick], cwd=run.ROOT)
            status |= done.returncode != 0
        status |= _instructions(argparse.Namespace(record=False)) == 1
        if options.callgrind:
            status |= _callgrind(options) == 1
    if folder == RESULTS:
        _page(argparse.Namespace(no_pictures=False))
    say(f"all: {time.perf_counter() - begin:.0f} s")
    return int(status)


ALONE = ("clip_and_noise", "private")
"""Commands that measure by themselves and write their results with --json."""


def _write(results: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    say(f"written: {path}")


def _bars(options: argparse.Namespace) -> int:
    path = options.json or RESULTS / "kd-cpu.json"
    if not path.exists():
        print(f"{path}: not there; run `python -m bench all` first", file=sys.stderr)
        return 2
    print("\n".join(bars.lines(json.loads(path.read_text()))))
    return 0


def _clip_and_noise(options: argparse.Namespace) -> int:
    def here(threads: list[int]) -> dict:
        return privacy.measure(threads, options.dtypes, options.quick, say)

    return int(privacy.wrong(_measure_alone(options, here)))


def _measure_alone(options: argparse.Namespace, here: Callable[[list[int]], dict]) -> dict:
    """The results of `here`: in this process for its own allocator, else in fresh ones."""
    every = run.ALLOCATORS[:1] if options.quick else run.ALLOCATORS
    allocators = [options.allocator] if options.allocator else list(every)
    if allocators == [run.allocator()]:
        threads = options.threads or sorted({torch.get_num_threads(), 1}, reverse=True)
        results = here(threads)
    else:
        results = run.in_each(allocators, options.arguments)
        say("\n".join(bars.lines(results)))
    if options.json:
        _write(results, options.json)
    return results


def _private(options: argparse.Namespace) -> int:
    from bench import private, private_models  # here: Opacus takes seconds to import

    models = options.models or list(private_models.CASES)
    if unknown := [m for m in models if m not in private_models.CASES]:
        known = ", ".join(private_models.CASES)
        print(f"private: expected models of {known}; got {', '.join(unknown)}", file=sys.stderr)
        return 2

    def here(threads: list[int]) -> dict:
        return private.measure(models, threads, options.quick, say, options.contenders)

    return int(private.wrong(_measure_alone(options, here)))


def _page(options: argparse.Namespace) -> int:
    draw = importlib.util.find_spec("matplotlib") is not None
    if not draw:
        print("page: no matplotlib: the pictures stay as they are", file=sys.stderr)
    for line in page.write(draw and not options.no_pictures):
        print(line)
    return 0


def _compare(options: argparse.Namespace) -> int:
    try:
        before, after = schema.load(options.before), schema.load(options.after)
    except (OSError, ValueError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    print("\n".join(compare.lines(before, after, options.contenders)))
    found = list(compare.changes(before, after))
    if not found:
        print("compare: the two files have no case in common", file=sys.stderr)
        return 2
    return int(bool(compare.regressions(found, options.contenders)))


def _instructions(options: argparse.Namespace) -> int:
    if reason := instructions.unavailable():
        print(f"instructions: skipped: {reason}", file=sys.stderr)
        return 2
    built_by, counts = instructions.compiler(), instructions.count()
    print("\n".join(instructions.lines(counts)))
    if options.record:
        instructions.record(built_by, counts)
        print(f"written: {instructions.BUDGETS} ({built_by})")
    allowed = instructions.budgets(built_by)
    if allowed is None:
        print(f"no budgets of {built_by}; `python -m bench instructions --record` writes them")
        return 0
    found = instructions.over(counts, allowed)
    print("\n".join(found or [f"within the budgets of {built_by}"]))
    return int(bool(found))


def _callgrind(options: argparse.Namespace) -> int:
    if reason := callgrind.unavailable():
        print(f"callgrind: skipped: {reason}", file=sys.stderr)
        return 2
    for line in callgrind.lines():
        say(line)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, text: str, run_it) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run_it)
        return command

    for op in cases.OPS:
        _add_choices(add(op, f"measure {op}", _measure))
    _add_choices(add("curves", "time and memory along one size at a time", _measure))
    text = "measure everything into bench/results/, then make the page: half an hour"
    command = add("all", text, _all)
    _add_choices(command)
    command.add_argument("--folder", type=Path, metavar="D", help="instead of bench/results/")
    command.add_argument("--callgrind", action="store_true", help="and count under valgrind")

    text = "measure privacy.clip_and_noise on the CPU: its noise, and clipped sums"
    command = add("clip_and_noise", text, _clip_and_noise)
    command.add_argument("--json", type=Path, metavar="F", help="write the rows there")
    command.add_argument("--threads", type=_numbers, help="such as 2,1; default: all and 1")
    command.add_argument("--dtypes", type=_dtypes, default=["fp32", "bf16"], help="fp32,bf16")
    command.add_argument("--quick", action="store_true", help="a glance: few repetitions")
    _add_allocator(command)

    text = "private training steps of three models beside non-private ones and Opacus's"
    command = add("private", text, _private)
    command.add_argument("--json", type=Path, metavar="F", help="write the rows there")
    command.add_argument("--models", type=_names, help="such as mlp,transformer; default: all")
    command.add_argument("--threads", type=_numbers, help="such as 2,1; default: all and 1")
    command.add_argument("--contenders", type=_names, help="only these, with 'non-private'")
    command.add_argument("--quick", action="store_true", help="a glance: few repetitions")
    _add_allocator(command)

    text = "docs/benchmarks.md with its pictures, and README's figures, from bench/results/*.json"
    command = add("page", text, _page)
    command.add_argument("--no-pictures", action="store_true", help="leave the PNGs as they are")

    text = "what became slower, larger or wrong between two results files, beyond noise; 1 if any"
    command = add("compare", text, _compare)
    command.add_argument("before", type=Path, metavar="A.json")
    command.add_argument("after", type=Path, metavar="B.json")
    command.add_argument(
        "--contenders", type=_names, help="judge by these; default: the library's own"
    )
    text = "instructions per element of the CPU kernels' inner loops, next to their budgets"
    command = add("instructions", text, _instructions)
    command.add_argument("--record", action="store_true", help="make what is found the budgets")
    text = "instructions executed per element at the AVX2 level, counted under valgrind's callgrind"
    add("callgrind", text, _callgrind)
    command = add("bars", "the measured ratios next to the promised ones", _bars)
    command.add_argument("--json", type=Path, metavar="F", help="default: results/kd-cpu.json")
    return parser


def _add_choices(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", type=Path, metavar="F", help="write the rows there")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    command.add_argument("--threads", type=_numbers, help="such as 2,1; default: all and 1")
    command.add_argument("--shapes", type=_shapes, help="such as 512x32000,128x10")
    command.add_argument("--dtypes", type=_dtypes, help="fp32,bf16,fp16")
    _add_allocator(command)
    command.add_argument(
        "--contenders", type=_names, help="only these; 'wrong' is the negative control"
    )
    command.add_argument(
        "--suites", type=_suites, help=f"of {', '.join(run.SUITES)}; default: main"
    )
    command.add_argument(
        "--memory-gb", type=float, metavar="G", help="of the largest case of the grid"
    )
    command.add_argument(
        "--patience",
        type=float,
        default=240,
        metavar="S",
        help="wait up to S seconds in all while other processes are at work (default: 240)",
    )
    command.add_argument("--quick", action="store_true", help="a glance: few repetitions")


def _add_allocator(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--allocator",
        choices=run.ALLOCATORS,
        help="thp: THP_MEM_ALLOC_ENABLE=1 for every contender; default: both in turn",
    )


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _shapes(text: str) -> list[tuple[int, ...]]:
    return [tuple(int(n) for n in shape.split("x")) for shape in text.split(",")]


def _suites(text: str) -> tuple[str, ...]:
    for name in text.split(","):
        if name not in run.SUITES:
            raise argparse.ArgumentTypeError(f"expected {', '.join(run.SUITES)}; got {name!r}")
    return tuple(text.split(","))


def _dtypes(text: str) -> list[str]:
    for name in text.split(","):
        if name not in cases.DTYPES:
            raise argparse.ArgumentTypeError(f"expected {', '.join(cases.DTYPES)}; got {name!r}")
    return text.split(",")


if __name__ == "__main__":
    sys.exit(main())
