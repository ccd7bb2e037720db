"""What nvcc makes of the CUDA kernels: the same figures and budgets as of the Triton kernels.

    python tests/gpuless/cuda_static.py             compile, show what moved, rewrite the budgets
    python tests/gpuless/cuda_static.py --check     show what moved; 1 where a budget is exceeded

For the probes' instances (cuemu/), one of each kind. nvcc comes from a toolkit or from PyPI
(`pip install -e ".[sass]"`); where there is none the tests say so. Runs nothing on a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a program, from anywhere

import machine_code
import table
import triton_budgets as budgets

HERE = Path(__file__).parent

PATH = HERE / "cuda_budgets.json"
ARCHITECTURES = ("sm_80", "sm_90")
FLAGS = ["-O3", "-std=c++17", "-ftz=true"]


def nvcc() -> list[str] | None:
    """The command: of a toolkit, or of the PyPI packages, which lie in one folder."""
    if found := machine_code.tool("nvcc"):
        return [found]
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for program in sorted(Path(root).glob("*/bin/nvcc")):
            return [str(program)]
    return None


def missing() -> str | None:
    """Why the compiled code cannot be looked at here, or None."""
    absent = [x for x in ("cuobjdump", "nvdisasm", "c++filt") if machine_code.tool(x) is None]
    absent += [] if nvcc() else ["nvcc"]
    return f'not found: {", ".join(absent)} (pip install ".[sass]")' if absent else None


def _short(symbol: str) -> str:
    name = re.sub(r"\(fd::\w+(Params|Args)\)|^void |\(fd::(Divergence|Distance)\)|fd::", "", symbol)
    return name.replace("__nv_bfloat16", "bf16").replace("__half", "f16").replace("> >", ">>")


def compile_for(
    architecture: str, probe: str, folder: Path, *flags: str, sources: Path = table.CSRC
) -> dict[str, machine_code.Code]:
    """Demangled name -> code, of every kernel of a probe, on the kernels in `sources`."""
    command = nvcc()
    assert command is not None
    binary = folder / f"{architecture}.cubin"
    command += [*FLAGS, *flags, f"-arch={architecture}", "-cubin", "-I", str(sources)]
    source = HERE / "cuemu" / probe
    subprocess.run([*command, str(source), "-o", str(binary)], check=True, capture_output=True)
    found = machine_code.sass(binary)
    names = subprocess.run(
        ["c++filt"], input="\n".join(found), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return {_short(name): code for name, code in zip(names, found.values(), strict=True)}


def figures(code: machine_code.Code) -> dict[str, float]:
    """What is budgeted: as of Triton's kernels, but for what needs the elements of a tile."""
    wide = max((w for _, w in code.everything.accesses), default=0)
    return {
        "registers": code.registers,
        "stack": code.stack,
        "spills": code.spills,
        "shared": code.shared,
        "width": wide,
        **{f"mix.{kind}": n for kind, n in sorted(code.everything.mix.items())},
    }


def everything() -> budgets.Budgets:
    """architecture -> kernel -> figures."""
    found: budgets.Budgets = {}
    with tempfile.TemporaryDirectory() as folder:
        for probe in dict.fromkeys(k.probe for k in table.CUDA):
            for architecture in ARCHITECTURES:
                rows = found.setdefault(architecture, {})
                for name, code in compile_for(architecture, probe, Path(folder)).items():
                    rows[name] = figures(code)
    return found


def version() -> str:
    """Of nvcc: each has its own compiler."""
    command = nvcc()
    assert command is not None
    text = subprocess.run(
        [*command, "--version"], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"release (\S+),", text)
    assert found, text
    return found[1]


def read() -> budgets.Budgets | None:
    return json.loads(PATH.read_text()).get(version()) if PATH.exists() else None


def main(arguments: list[str]) -> int:
    reason = missing()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    old, found, worse = read() or {}, everything(), 0
    for architecture, rows in found.items():
        for name, now in rows.items():
            before = old.get(architecture, {}).get(name)
            over = budgets.exceeded(before, now) if before else {}
            worse += bool(over) or before is None
            print(f"{architecture} {name}: {now['registers']} registers{'' if before else ', new'}")
            for figure, (a, b) in budgets.moved(before or now, now).items():
                print(f"  {'OVER ' if figure in over else 'moved'} {figure} {a} -> {b}")
    if "--check" in arguments:
        return int(worse > 0)
    stored = json.loads(PATH.read_text()) if PATH.exists() else {}
    PATH.write_text(json.dumps({**stored, version(): found}, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
