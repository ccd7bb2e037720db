"""What a Triton launch compiles to, found without a GPU.

`recording` runs a launcher on CPU tensors with its kernels replaced by recorders, so that what is
compiled is what would be launched; `compile_launch` compiles it ahead of time for a target, and
`measure` reads the machine code.
"""

from __future__ import annotations

import contextlib
import importlib
import tempfile
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import machine_code
import triton
from entries import Config, TritonKernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ARCHITECTURES = {"sm_80": "sm_8", "sm_90": "sm_9", "sm_100": "sm_10", "gfx942": "gfx9"}
"""target -> what a launcher calls it."""

OPTIONS = {"num_warps", "num_stages", "num_ctas", "enable_fp_fusion", "maxnreg"}


class Launch(NamedTuple):
    """One recorded launch."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


@contextlib.contextmanager
def recording(module: ModuleType) -> Iterator[list[Launch]]:
    """Replace every kernel of `module` by one that records its launches and runs nothing."""
    recorded: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*args: Any, **kwargs: Any) -> None:
                arguments = dict(zip(self.kernel.arg_names, args, strict=False))
                options = {k: v for k, v in kwargs.items() if k in OPTIONS}
                arguments.update((k, v) for k, v in kwargs.items() if k not in OPTIONS)
                recorded.append(Launch(self.kernel, grid, arguments, options))

            return launch

    kernels = {n: k for n, k in vars(module).items() if isinstance(k, triton.JITFunction)}
    with mock.patch.multiple(module, **{n: Recorder(k) for n, k in kernels.items()}):
        yield recorded


@contextlib.contextmanager
def on(target: str, module: ModuleType, name: str) -> Iterator[None]:
    """The launchers of `module` see the configurations of `target`."""

    def forget() -> None:
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()

    forget()
    with mock.patch.object(module, name, lambda *_: ARCHITECTURES[target]):
        yield
    forget()


def record(
    kernel: TritonKernel,
    config: Config,
    target: str | None = None,
    module: ModuleType | None = None,
) -> Launch:
    """The launch of this kernel that the configuration leads to, maybe in a copy of its module."""
    module = module or importlib.import_module(kernel.module)
    with on(target or config["target"], module, kernel.architecture), recording(module) as launches:
        kernel.call(module, config)
    found = [x for x in launches if x.kernel.__name__ == kernel.name]
    assert found, f"{config} launches {[x.kernel.__name__ for x in launches]}, not {kernel.name}"
    return found[0]


def compile_launch(launch: Launch, target: str) -> Any:
    """Compile a recorded launch as the just-in-time compiler would, for `target`."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name] = "constexpr"
            constants[name] = value
        elif parameter.annotation_type:
            signature[name] = parameter.annotation_type
        elif hasattr(value, "data_ptr"):
            signature[name] = triton.runtime.jit.mangle_type(value)
            if value.data_ptr() % 16 == 0:
                aligned[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            if not parameter.do_not_specialize and value == 1:
                signature[name], constants[name] = "constexpr", 1
            elif not parameter.do_not_specialize and value % 16 == 0:
                aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, aligned)
    return triton.compile(source, target=TARGETS[target], options=launch.options)


def read(compiled: Any) -> machine_code.Code:
    """The machine code of a compiled kernel."""
    if "cubin" not in compiled.asm:
        return machine_code.amdgcn(compiled.asm["amdgcn"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (code,) = machine_code.sass(file.name).values()
        return code


class Cost(NamedTuple):
    """What a kernel does for each element of its tile, all its passes together."""

    load: float  # bytes; of a kernel without loops also the ends and the row's own values
    store: float
    wide_load: float  # the part of it that is read 16 bytes at a time
    wide_store: float
    ex2: float  # exponentials
    instructions: float


def passes(code: machine_code.Code) -> list[machine_code.Loop]:
    """The loops that read, or all the code where there is none."""
    loops = [x for x in code.loops if any(kind == "load" for kind, _ in x.accesses)]
    return loops or [code.everything]


def unrolled(code: machine_code.Code, compiled: Any) -> list[float]:
    """How often ptxas has unrolled each of `passes`; 1 for other compilers."""
    parts = passes(code)
    if "ptx" not in compiled.asm:
        return [1.0] * len(parts)
    moved = [sum(w * n for (_, w), n in p.accesses.items()) for p in parts]
    before = machine_code.ptx_bytes(compiled.asm["ptx"])
    if len(before) != len(moved):
        return [max(sum(moved) / sum(before), 1.0)] * len(parts)
    return [max(m / b, 1.0) for m, b in zip(moved, before, strict=True)]


def cost(
    kernel: TritonKernel, launch: Launch, compiled: Any, code: machine_code.Code, target: str
) -> Cost:
    """From the counts of the loops. Modelled: nothing is run."""
    threads = launch.options.get("num_warps", 4) * TARGETS[target].warp_size
    share = threads / kernel.tile(launch.arguments)
    parts = list(zip(passes(code), unrolled(code, compiled), strict=True))

    def moved(kind: str, least: int) -> float:
        return share * sum(
            w * n / times
            for part, times in parts
            for (k, w), n in part.accesses.items()
            if k == kind and w >= least
        )

    return Cost(
        moved("load", 1), moved("store", 1), moved("load", 16), moved("store", 16),
        sum(p.mix["ex2"] / times for p, times in parts) * share,
        sum(sum(p.mix.values()) / times for p, times in parts) * share,
    )  # fmt: skip


def narrowest(code: machine_code.Code) -> int:
    """Bytes of the narrowest access in a loop; without loops, of the widest access there is."""
    if code.loops:
        return min((w for x in code.loops for _, w in x.accesses), default=0)
    return max((w for _, w in code.everything.accesses), default=0)
