"""Faults put by program into copies of the CUDA kernels: the negative controls of the probes.

Every place in a kernel's sources where a fault of one of these kinds can be made gets one, all of
them in one build: each is made only in the run that asks for it by number (CUEMU_FAULT). So a
kernel's dozens of faults cost one compilation. A fault that no check reports fails the suite,
unless the table says why it changes nothing.

    python tests/gpuless/cuda_faults.py     the faults and who caught them
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a program, from anywhere

import cuda_emulation as emulation
import table

MEMORY = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
MEMORY += ["-ftrivial-auto-var-init=pattern"]  # what is not written holds -1.7e38
RACES = ["-O0", "-fsanitize=thread", "-DCUEMU_THREADS", "-pthread"]


class Fault(NamedTuple):
    """One place, and what happens there."""

    number: int
    kind: str
    file: str
    code: str
    nth: int  # of this kind in lines that read the same

    def __str__(self) -> str:
        again = f" (#{self.nth})" if self.nth > 1 else ""
        return f"{self.kind}: {self.file}: {self.code}{again}"


Made = Callable[[re.Match[str], int], str]

NAME = r"[a-z]\w*(?:\.[a-z]\w*)?"
BARRIER = r"(?:__syncthreads\(\)|\w+\.sync\(\));"
KINDS: tuple[tuple[str, str, Made], ...] = (
    # kind, where, what stands there instead; one after the other, so a later one sees the earlier
    ("barrier removed", BARRIER, lambda m, n: f"if (!cuemu::fault({n})) {m[0]}"),
    ("barrier for one warp", BARRIER,
     lambda m, n: f"if (!cuemu::fault({n}) || threadIdx.x < 32) {m[0]}"),
    ("tail missing", rf" < {NAME}(?=; )", lambda m, n: f"{m[0]} - cuemu::fault({n})"),
    ("mask loosened", rf" (?:<|<=|>=) {NAME}(?=\)|;| &&| \?| \|\|| - cuemu)",
     lambda m, n: f"{m[0]} + cuemu::fault({n})"),
    ("offset of 32 bits", r"\b\w+ \* (?:a|p)\.\w*(?:cols|outer|step|pitch|stride)\w*\b",
     lambda m, n: f"cuemu::narrow({n}, {m[0]})"),
    ("false alignment", r"\breturn ([^;]*% sizeof\(\w+\) == 0)(?=;)",
     lambda m, n: f"return cuemu::fault({n}) || {m[1]}"),
    ("shared memory too small", r"(?<=FD_SHARED\()(\w+, \w+, )([^)]*)(?=\))",
     lambda m, n: f"{m[1]}cuemu::fault({n}) ? 1 : {m[2]}"),
    ("lane out of range", r"(?<=\[)threadIdx\.x % \w+(?=\])",
     lambda m, n: f"cuemu::fault({n}) ? threadIdx.x : {m[0]}"),
)  # fmt: skip


def _shared_stores(text: str) -> tuple[str, str, Made]:
    """What should be put into shared memory, itself or through a pointer into it, is not."""
    names = re.findall(r"FD_(?:DYNAMIC_)?SHARED\(\w+, (\w+)", text)
    pointers = [p for n in names for p in re.findall(rf"\* (\w+) = {n}\b", text)]
    places = [rf"\b{name}\[[^\]]*\]" for name in names] + [rf"\*{p}\b" for p in pointers]
    where = rf"(?:{'|'.join(places)}) = [^;=]*;" if places else "(?!)"
    return "stale shared memory", where, lambda m, n: f"if (!cuemu::fault({n})) {m[0]}"


def put_in(folder: Path, files: tuple[str, ...]) -> list[Fault]:
    """Make all faults in the files of `folder`; comments and the preprocessor are left alone."""
    faults: list[Fault] = []
    for file in files:
        path = folder / file
        text = path.read_text()
        lines = text.split("\n")
        for at, line in enumerate(lines):
            code, slashes, comment = line.partition("//")
            reads = code.strip()
            if line.startswith("#"):
                continue
            for kind, where, made in (*KINDS, _shared_stores(text)):

                def make(match: re.Match[str]) -> str:
                    here = (kind, file, reads)  # noqa: B023
                    nth = 1 + sum((f.kind, f.file, f.code) == here for f in faults)
                    faults.append(Fault(len(faults), *here, nth))
                    return made(match, len(faults) - 1)  # noqa: B023

                code = re.sub(where, make, code)
            lines[at] = code + slashes + comment
        path.write_text("\n".join(lines))
    return faults


def build(probe: str, flags: list[str], sources: Path, program: Path) -> Path:
    """The probe as a host program, on the kernels in `sources`."""
    folder = emulation.instrumented(emulation.EMULATOR, program.parent / "probes")
    command = emulation.compile_kernels(folder / probe, program, flags, sources)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def run(program: Path, *arguments: str, **environment: str) -> str:
    """What the probe complains of; nothing where it is content."""
    command = [str(program), *arguments]
    variables = {**os.environ, **environment}
    try:
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return "timeout: it hangs"
    return done.stderr or (f"exit {done.returncode}" if done.returncode else "")


CHECKS = {
    "values": "probe: ",
    "barriers": "cuemu: ",
    "addresses": "ERROR: AddressSanitizer",
    "undefined behaviour": "runtime error: ",
    "races": "WARNING: ThreadSanitizer: data race",
}
"""check -> a word of its report."""


def caught_by(report: str) -> str | None:
    """The check whose report it is, None for no report."""
    if not report:
        return None
    found = {name: report.find(word) for name, word in CHECKS.items() if word in report}
    return min(found, key=lambda name: found[name]) if found else report.strip().split("\n")[0]


class Outcome(NamedTuple):
    """A fault, and who caught it: in the first order of threads, in the last, as a race."""

    fault: Fault
    forward: str | None
    reverse: str | None
    race: str | None  # looked at for faults of barriers only

    @property
    def caught(self) -> set[str]:
        return {c for c in (self.forward, self.reverse, self.race) if c}


def probes() -> dict[str, tuple[str, ...]]:
    """Probe -> the headers of its kernels."""
    found: dict[str, dict[str, None]] = {}
    for kernel in table.CUDA:
        found.setdefault(kernel.probe, {}).update(dict.fromkeys(kernel.headers))
    return {probe: tuple(headers) for probe, headers in found.items()}


def hunt(probe: str, headers: tuple[str, ...], folder: Path) -> list[Outcome]:
    """Make each fault in turn. The same build without a fault has to be clean."""
    sources = emulation.instrumented(emulation.SOURCES, folder / "cuda")
    faults = put_in(sources, headers)
    for name in ("memory", "races"):
        (folder / name).mkdir()
    with ThreadPoolExecutor(2) as pool:
        memory, races = pool.map(
            lambda name, flags: build(probe, flags, sources, folder / name / "probe"),
            ("memory", "races"), (MEMORY, RACES),
        )  # fmt: skip
        clean = run(memory)
        assert not clean, clean

        def one(fault: Fault) -> Outcome:
            chosen = {"CUEMU_FAULT": str(fault.number)}
            reports = [run(memory, **chosen), run(memory, **chosen, CUEMU_REVERSE="1")]
            barrier = fault.kind == "barrier removed"
            race = run(races, **chosen) if barrier else ""
            return Outcome(fault, *map(caught_by, [*reports, race]))

        return list(pool.map(one, faults))


def harmless(probe: str) -> dict[str, str]:
    """Faults of a probe's kernels that change nothing, with the reason."""
    return {place: why for k in table.CUDA if k.probe == probe for place, why in k.harmless.items()}


def main() -> int:
    for probe, headers in probes().items():
        with tempfile.TemporaryDirectory() as folder:
            for outcome in hunt(probe, headers, Path(folder)):
                caught = ", ".join(sorted(outcome.caught))
                why = harmless(probe).get(str(outcome.fault))
                fate = caught or (f"changes nothing: {why}" if why else "SURVIVES")
                print(f"{outcome.fault} -> {fate}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
