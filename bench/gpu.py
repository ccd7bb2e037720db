"""Everything that needs a GPU, in one command: `python -m bench.gpu` (`make gpu`).

The tests marked `gpu`, a part of them under compute-sanitizer where that is installed, and every
benchmark with the copy bandwidth measured in the same run and the modelled roofline beside each
figure. One JSON under bench/results/, which is committed. Needs no network and installs nothing.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

import torch

from bench import cases, report, run, schema

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
SANITIZED = "sanitized"
"""A word in the names of the tests that run under compute-sanitizer: they are small."""


def tests(*arguments: str, under: tuple[str, ...] = ()) -> dict:
    """Run pytest; {"status", "passed", "failed", "skipped": {reason: count}}."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "junit.xml"
        command = [*under, sys.executable, "-m", "pytest", f"--junitxml={path}", *arguments]
        done = subprocess.run(command, cwd=ROOT)
        found = outcomes(path.read_text()) if path.exists() else {}
    return {"status": done.returncode, **found}


def outcomes(junit: str) -> dict:
    """Counts of a JUnit file, with the names of what failed and the reasons of what was skipped."""
    passed, failed, skipped = 0, [], {}
    for case in xml.fromstring(junit).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        elif (skip := case.find("skipped")) is not None:
            reason = skip.get("message") or ""
            skipped[reason] = skipped.get(reason, 0) + 1
        else:
            passed += 1
    return {"passed": passed, "failed": failed, "skipped": skipped}


def sanitized() -> dict:
    """Each tool of compute-sanitizer over the small tests; why not, where it is not installed."""
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if program is None:
        return {"skipped": "compute-sanitizer was not found"}
    # Caching allocators hide accesses beside a tensor; the tool looks at real allocations.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    try:
        return {
            tool: tests(
                "-m", "gpu", "-k", SANITIZED,
                under=(program, f"--tool={tool}", "--error-exitcode=86"),
            )
            for tool in SANITIZERS
        }  # fmt: skip
    finally:
        del os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"]


def benchmarks(quick: bool) -> dict:
    """All ops and curves; the limit of each row is the copy bandwidth measured in its rounds."""
    rows, environments, seconds = [], [], 0.0
    suites = [(op, ("main", "peers", "grid")) for op in cases.OPS.values()]
    for op, chosen in [*suites, (cases.OPS["kd"], ("curves",))]:
        settings = run.Settings(
            op=op.name, device="cuda", shapes=op.shapes, dtypes=["fp32", "bf16"], threads=None,
            allocators=None, contenders=None, quick=quick, suites=chosen,
        )  # fmt: skip
        found = run.measure(settings, functools.partial(print, flush=True))
        for row in found["rows"]:
            row["environment"] += len(environments)
        rows += found["rows"]
        environments += found["environments"]
        seconds += found["seconds"]
    return {"seconds": seconds, "environments": environments, "rows": rows}


def main(arguments: list[str] | None = None) -> int:
    """0 where all tests pass and every contender is right."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not torch.cuda.is_available():
        print(f"make gpu: torch {torch.__version__} sees no CUDA device", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name()
    results: dict = {"schema": schema.VERSION, "gpu": device, "devices": torch.cuda.device_count()}
    path = RESULTS / f"gpu-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    steps = {
        "tests": lambda: tests("-m", "gpu"),
        "compute_sanitizer": sanitized,
        "bench": lambda: benchmarks("--quick" in arguments),
    }
    for name, step in steps.items():
        results[name] = step()
        path.write_text(json.dumps(results, indent=1) + "\n")  # what there is, also if cut short
    print(f"written: {path}")
    tools = [x for x in results["compute_sanitizer"].values() if isinstance(x, dict)]
    wrong = report.wrong(results["bench"], "triton", "cuda")
    return int(any(x["status"] != 0 for x in (results["tests"], *tools)) or wrong)


if __name__ == "__main__":
    sys.exit(main())
