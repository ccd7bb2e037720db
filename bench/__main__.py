"""The command: `python -m bench kd`, `all`, `instructions`, `bars`, ... (--help)."""

import argparse
import functools
import importlib.util
import json
import sys
from pathlib import Path

import torch

from bench import (
    bars,
    cases,
    compare,
    instructions,
    page,
    plots,
    privacy,
    report,
    run,
    schema,
)

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.command == "bars":
        return _bars(options)
    if options.command == "clip_and_noise":
        return _clip_and_noise(options)
    if options.command == "page":
        return _page(options)
    if options.command == "compare":
        return _compare(options)
    if options.command == "instructions":
        return _instructions(options)
    ops = list(cases.OPS) if options.command == "all" else [options.command]
    status = 0
    for op in ops:
        settings = run.Settings(
            op=op,
            device=options.device,
            shapes=options.shapes or cases.OPS[op].shapes,
            dtypes=options.dtypes,
            threads=options.threads,
            allocators=[options.allocator] if options.allocator else None,
            contenders=options.contenders,
            quick=options.quick,
            patience=options.patience,
        )
        results = run.measure(settings, functools.partial(print, flush=True))
        if options.json or options.command == "all":
            path = options.json or RESULTS / f"{op}-{options.device}.json"
            path.parent.mkdir(parents=True, exist_ok=True)  # before minutes of measuring
            path.write_text(json.dumps(results, indent=1) + "\n")
            print(f"written: {path}")
        if options.command == "all":
            target = (options.json or RESULTS / "x").parent
            for picture in plots.draw(results, target):
                print(f"drawn: {picture}")
            if options.device == "cpu" and op == "kd":  # the others have no bars
                print("\n".join(bars.lines(results)))
        status |= report.wrong(results, "fastdistill", "triton", "cuda")
    return int(status)


def _bars(options: argparse.Namespace) -> int:
    path = options.json or RESULTS / "kd-cpu.json"
    if not path.exists():
        print(f"{path}: not there; run `python -m bench all` first", file=sys.stderr)
        return 2
    print("\n".join(bars.lines(json.loads(path.read_text()))))
    return 0


def _clip_and_noise(options: argparse.Namespace) -> int:
    threads = options.threads or sorted({torch.get_num_threads(), 1}, reverse=True)
    say = functools.partial(print, flush=True)
    results = privacy.measure(threads, options.dtypes, options.quick, say)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")
        print(f"written: {options.json}")
    return int(privacy.wrong(results))


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    described = {op: f"measure {op}" for op in cases.OPS}
    described["all"] = "measure every op; JSON and plots into bench/results/"
    for name, text in described.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--json", type=Path, metavar="F", help="write the rows there")
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        command.add_argument("--threads", type=_numbers, help="such as 2,1; default: all and 1")
        command.add_argument("--shapes", type=_shapes, help="such as 512x32000,128x10")
        command.add_argument("--dtypes", type=_dtypes, default=["fp32", "bf16"], help="fp32,bf16")
        command.add_argument(
            "--allocator",
            choices=run.ALLOCATORS,
            help="thp: THP_MEM_ALLOC_ENABLE=1 for every contender; default: both in turn",
        )
        command.add_argument(
            "--contenders", type=_names, help="only these; 'wrong' is the negative control"
        )
        command.add_argument(
            "--patience",
            type=float,
            default=240,
            metavar="S",
            help="wait up to S seconds in all while other processes are at work (default: 240)",
        )
        command.add_argument("--quick", action="store_true", help="a glance: few repetitions")
    text = "measure privacy.clip_and_noise on the CPU: its noise, and clipped sums"
    command = commands.add_parser("clip_and_noise", help=text, description=text)
    command.add_argument("--json", type=Path, metavar="F", help="write the rows there")
    command.add_argument("--threads", type=_numbers, help="such as 2,1; default: all and 1")
    command.add_argument("--dtypes", type=_dtypes, default=["fp32", "bf16"], help="fp32,bf16")
    command.add_argument("--quick", action="store_true", help="a glance: few repetitions")
    text = "docs/benchmarks.md with its pictures, and README's figures, from bench/results/*.json"
    command = commands.add_parser("page", help=text, description=text)
    command.add_argument("--no-pictures", action="store_true", help="leave the PNGs as they are")
    text = "what became slower, larger or wrong between two results files, beyond noise; 1 if any"
    command = commands.add_parser("compare", help=text, description=text)
    command.add_argument("before", type=Path, metavar="A.json")
    command.add_argument("after", type=Path, metavar="B.json")
    command.add_argument(
        "--contenders", type=_names, help="judge by these; default: the library's own"
    )
    text = "instructions per element of the CPU kernels' inner loops, next to their budgets"
    command = commands.add_parser("instructions", help=text, description=text)
    command.add_argument("--record", action="store_true", help="make what is found the budgets")
    command = commands.add_parser("bars", help="the measured ratios next to the promised ones")
    command.add_argument("--json", type=Path, metavar="F", help="default: results/kd-cpu.json")
    return parser


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _shapes(text: str) -> list[tuple[int, ...]]:
    return [tuple(int(n) for n in shape.split("x")) for shape in text.split(",")]


def _dtypes(text: str) -> list[str]:
    for name in text.split(","):
        if name not in cases.DTYPES:
            raise argparse.ArgumentTypeError(f"expected {', '.join(cases.DTYPES)}; got {name!r}")
    return text.split(",")


if __name__ == "__main__":
    sys.exit(main())
