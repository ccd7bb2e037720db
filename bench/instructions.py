"""Instructions per element of the kernels' inner loops, counted in the compiled module.

`python -m bench instructions` prints them, `--record` writes them as the budgets of the compiler
that built the module. A test holds the module to them: a loop that got longer fails without
anything being timed, on any machine.

The loops are found by program: a jump backwards closes one, and one that holds no other is an inner
loop. The elements of a turn are read off the same code: by how many bytes its farthest stream moves
on, over the bytes of an element.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fastdistill import _native

BUDGETS = Path(__file__).parent / "instructions.json"
LEVELS = ("baseline", "avx2", "avx512")

_STRAIGHT = (
    "straight_chunks<(fd::Type){0}, (fd::Type){0}, (fd::Type){0}, (fd::Distance)0, true, false>("
)
KERNELS = {
    "exponential": ("exp_loop(", 4),
    "kd exponentials": ("Pass<float>::step1<true, true, 2>(", 4),
    "kd gradient": ("gradient<float, (fd::Divergence)1, true, 2, true, fd::L::Same<float> >(", 4),
    "kd gradient, reverse": (
        "gradient<float, (fd::Divergence)2, true, 2, true, fd::L::Same<float> >(",
        4,
    ),
    "kd few, gradient": (
        "gradient<float, (fd::Divergence)1, true, 2, true, fd::L::Lanes<float> >(",
        4,
    ),
    "kd few, exponentials": ("exponentials<float, true, true, 2, fd::L::Lanes<float> >(", 4),
    "kd backward": ("scale_rows<float>(", 4),
    "softmax": ("SoftmaxPass<float>::forward<false>(", 4),
    "log softmax": ("SoftmaxPass<float>::forward<true>(", 4),
    "softmax backward": ("SoftmaxPass<float>::backward<false>(", 4),
    "log softmax backward": ("SoftmaxPass<float>::backward<true>(", 4),
    "log softmax, few": ("SoftmaxPass<float>::forward_tile<true>(", 4),
    "softmax few, backward": ("SoftmaxPass<float>::backward_tile<false>(", 4),
    "hint distance": ("HintPass<float>::row(", 4),
    "hint distance, straight": (_STRAIGHT.format(0), 4),
    "hint distance, bf16": (_STRAIGHT.format(2), 2),
    "load": ("load<float>(", 4),
    "store": ("store<float>(", 4),
    "transpose in": ("load_tile<true>(", 0),
    "transpose out": ("store_tile(", 0),
    "privacy norm": ("square_of<fd::L::FromF32>(", 4),
    "privacy sum": ("privacy_add(", 8),
    "product, 6x4 vectors": ("product_tile<float, 6, 4>(", 4),
    "product, 6x2 vectors": ("product_tile<float, 6, 2>(", 4),
    "product, 4x2 vectors": ("product_tile<float, 4, 2>(", 4),
    "product, weighted sum": ("product_weighted_sum(", 4),
    "norm sums": ("norm_sums(", 4),
    "noise philox": ("philox_groups<fd::L::Release<fd::L::FromF32, float>, ", 0),
    "noise chacha20": ("chacha20_groups<fd::L::Release<fd::L::FromF32, float>, ", 0),
    "noise release": ("release_to<fd::L::FromF32, float>(", 4),
    "traffic": ("read_read_write(", 4),
}
"""Name -> (how the function's name begins, L for the level; bytes of an element of its widest
stream, 0 where a turn is a tile or a round; other loops of less than 4 elements are over rows).
The instances are those of the common call: float32, forward KL, T = 2, a hard term."""


# Arithmetic or moves of several elements at once.
PACKED = re.compile(
    r"v?(add|sub|mul|div|max|min|mova|movu|fn?m(add|sub)\d+)p[sd]|v?(p(add|mul|sub|xor|or)|movdq)"
)


class Instruction(NamedTuple):
    """One line of a disassembly."""

    address: int
    name: str
    operands: str


class Loop(NamedTuple):
    """An inner loop."""

    instructions: int
    elements: int  # of a turn; 0 where no stream moves

    def each(self) -> float:
        """Instructions an element, or a turn."""
        return self.instructions / (self.elements or 1)

    def __str__(self) -> str:
        what = f"{self.elements}" if self.elements else "turn"
        return f"{self.instructions}/{what}"


Counts = dict[str, dict[str, list[Loop]]]
"""level -> kernel -> its loops, the costliest first."""


def unavailable() -> str | None:
    """Why nothing can be counted here."""
    if _native.cpu().module is None:
        return f"no CPU kernels: {_native.cpu().reason}"
    return None if shutil.which("objdump") else "needs objdump (binutils)"


def compiler(path: str | Path | None = None) -> str:
    """What built the module, such as "GCC 12.2.0": compilers leave their name in it."""
    text = _objdump("-s", "-j", ".comment", path=path)
    dump = "".join(re.findall(r"^ [0-9a-f]+ (?:[0-9a-f]+ )+ *(.{1,16})$", text, re.M))
    found = re.findall(r"(GCC|clang)(?::| version) (?:\([^)]*\) )?(\d+\.\d+\.\d+)", dump)
    return ", ".join(dict.fromkeys(" ".join(x) for x in found)) or "an unknown compiler"


def count(path: str | Path | None = None) -> Counts:
    """Of every level and kernel that the module has."""
    text = _objdump("-d", "--no-show-raw-insn", "-C", path=path)
    found: Counts = {}
    for header, code in _functions(text):
        level = re.search(r"fd::(avx512|avx2|baseline)::", header)
        if level is None:
            continue
        plain = header.replace(f"fd::{level[1]}::", "fd::L::")
        for name, (start, size) in KERNELS.items():
            if re.match(r"(?:[\w:<>]+ (?:const)?\*? ?)?fd::L::" + re.escape(start), plain):
                loops = [Loop(*x) for x in inner_loops(code, size)]
                loops = sorted((x for x in loops if x.elements >= 4 or not size), key=_cost)
                found.setdefault(level[1], {}).setdefault(name, []).extend(loops)
    return found


def _cost(loop: Loop) -> tuple[float, int]:
    return -loop.each(), loop.instructions


def inner_loops(code: list[Instruction], size: int) -> Iterator[tuple[int, int]]:
    """(instructions, elements a turn) of each loop of vectors without a loop or a call in it."""
    where = {x.address: i for i, x in enumerate(code)}
    spans: dict[int, int] = {}  # first -> last
    for i, x in enumerate(code):
        target = re.match(r"([0-9a-f]+)\b", x.operands) if x.name.startswith("j") else None
        first = where.get(int(target[1], 16)) if target else None
        if first is not None and first <= i:
            spans[first] = max(i, spans.get(first, 0))
    for first, last in spans.items():
        inside = any(first <= a and b <= last for a, b in spans.items() if (a, b) != (first, last))
        body = code[first : last + 1]
        vectors = any(PACKED.match(x.name) for x in body)
        if not inside and vectors and not any(x.name == "call" for x in body):
            padding = sum(x.name.startswith(("nop", "data16", "cs")) for x in body)
            yield len(body) - padding, _step(body) // size if size else 0


def _step(body: list[Instruction]) -> int:
    """The bytes by which the farthest stream of a loop moves on in a turn."""
    moves: dict[str, int] = {}
    for x in body:
        if by := re.fullmatch(r"\$(-?0x[0-9a-f]+),%(r\w+)", x.operands):
            amount = int(by[1], 16)
            amount -= 1 << 64 if amount >= 1 << 63 else 0
            sign = {"add": 1, "addq": 1, "sub": -1, "subq": -1}.get(x.name, 0)
            moves[by[2]] = moves.get(by[2], 0) + sign * amount
        elif x.name == "lea" and (
            by := re.fullmatch(r"(-?0x[0-9a-f]+)\(%(r\w+)\),%\2", x.operands)
        ):
            moves[by[2]] = moves.get(by[2], 0) + int(by[1], 16)
    steps = [0]
    for x in body:
        if "%" not in x.operands or not re.search(r"[xyz]mm", x.operands):
            continue  # of the streams of vectors, not of a table of rows
        for base, index, scale in re.findall(r"\((%\w+)?(?:,(%\w+),(\d))?\)", x.operands):
            step = moves.get(base[1:], 0) + moves.get(index[1:], 0) * int(scale or 0)
            steps.append(abs(step))
    return max(steps)


def _functions(text: str) -> Iterator[tuple[str, list[Instruction]]]:
    header, code = "", []
    for line in text.splitlines():
        if begin := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            yield header, code
            header, code = begin[1], []
        elif found := re.match(r"\s*([0-9a-f]+):\t(\S+)\s*(.*)", line):
            code.append(Instruction(int(found[1], 16), found[2], found[3]))
    yield header, code


def _objdump(*arguments: str, path: str | Path | None) -> str:
    module = _native.cpu().module
    target = str(path or (module.__file__ if module else ""))
    command = ["objdump", *arguments, target]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def known() -> dict[str, Counts]:
    """What was recorded, by compiler."""
    return {
        built_by: {
            level: {
                kernel: [Loop(*map(int, loop.split("/"))) for loop in loops]
                for kernel, loops in kernels.items()
            }
            for level, kernels in levels.items()
        }
        for built_by, levels in _recorded().items()
    }


def budgets(built_by: str) -> Counts | None:
    """What was recorded for this compiler; None if nothing was."""
    return known().get(built_by)


def _recorded() -> dict[str, dict]:
    return json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}


def record(built_by: str, counts: Counts) -> None:
    """Make `counts` the budgets of this compiler."""
    everything = _recorded()
    everything[built_by] = {
        level: {
            kernel: [f"{x.instructions}/{x.elements}" for x in loops]
            for kernel, loops in kernels.items()
        }
        for level, kernels in counts.items()
    }
    BUDGETS.write_text(json.dumps(dict(sorted(everything.items())), indent=1) + "\n")


def over(counts: Counts, allowed: Counts) -> list[str]:
    """Each kernel whose loops are longer than allowed, or not the loops that were recorded."""
    found = []
    for level in LEVELS:
        kernels, limits = counts.get(level, {}), allowed.get(level, {})
        for kernel in dict.fromkeys([*limits, *kernels]):
            have, may = kernels.get(kernel, []), limits.get(kernel, [])
            texts = [" ".join(map(str, x)) or "none" for x in (have, may)]
            where = f"{level} {kernel}: {texts[0]}, recorded {texts[1]} (instructions/elements)"
            if len(have) != len(may):
                found.append(f"{where}: other loops")
            elif any(a.each() > b.each() + 1e-9 for a, b in zip(have, may, strict=True)):
                found.append(f"{where}: longer")
    return found


def lines(counts: Counts) -> Iterator[str]:
    """A line per kernel: its costliest loops at each level."""
    levels = [x for x in LEVELS if x in counts]
    yield f"{'instructions an element':26}" + "".join(f"{x:>26}" for x in levels)
    for kernel in KERNELS:
        texts = []
        for level in levels:
            found = counts[level].get(kernel, [])
            wide = [f"{x.each():.2f}" for x in found if x.elements]
            turns = [f"{x.instructions}/turn" for x in found if not x.elements]
            texts.append(" ".join(wide[:4] or turns[:2]) or "-")
        yield f"{kernel:26}" + "".join(f"{x:>26}" for x in texts)
