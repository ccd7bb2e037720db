"""A modelled roofline of each kernel's headlines on A100, H100, H200 and B200. Nothing is timed.

For one element, the time of the slowest of four resources:
  bytes          what the loops load and store, over the memory bandwidth (the repeated reads of a
                 kernel of two passes all counted: none is assumed to hit L2)
  exponentials   over the rate of the special-function units
  matrix         FLOPs over the dense rate of the tensor cores in bfloat16
  instructions   all that is issued, over the issue rate
and the least that any implementation needs, of the first three. Their quotient is how near the
compiled kernel can come to the hardware, before latency, occupancy or anything else that only a
run can show.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import triton_budgets as budgets
from entries import Config, Least, TritonKernel


class GPU(NamedTuple):
    """Peak rates, from NVIDIA's data sheets and architecture white papers (SXM boards)."""

    name: str
    target: str
    bandwidth: float  # bytes a second
    processors: int
    clock: float  # Hz, boost
    matrix: float  # FLOP a second: bfloat16, dense

    @property
    def exponentials(self) -> float:
        """16 results a clock and multiprocessor (CUDA programming guide, arithmetic throughput)."""
        return 16 * self.processors * self.clock

    @property
    def issue(self) -> float:
        """Instructions of one thread a second: 4 warps a clock and multiprocessor."""
        return 4 * 32 * self.processors * self.clock


GPUS = (
    GPU("A100", "sm_80", 2.039e12, 108, 1.410e9, 312e12),  # SXM, 80 GB
    GPU("H100", "sm_90", 3.35e12, 132, 1.830e9, 989e12),  # SXM5
    GPU("H200", "sm_90", 4.8e12, 132, 1.830e9, 989e12),
    GPU("B200", "sm_100", 8.0e12, 148, 1.850e9, 2250e12),
)


class Model(NamedTuple):
    """Modelled seconds an element."""

    parts: dict[str, float]  # resource -> time of the compiled kernel
    least: float  # of any implementation

    @property
    def bound(self) -> str:
        return max(self.parts, key=lambda name: self.parts[name])

    @property
    def seconds(self) -> float:
        return self.parts[self.bound]

    @property
    def share(self) -> float:
        """1: as near as the hardware allows."""
        return self.least / self.seconds


def model(gpu: GPU, figures: dict[str, float], least: Least) -> Model:
    """`figures` are those of the budgets, for the GPU's own architecture."""
    matrix = least.matrix_flops / gpu.matrix

    def moved(kind: str, needed: float) -> float:
        # A kernel without loops: not the row's own values, which each thread reads for itself.
        wide = figures["wide_" + kind]
        return wide if wide >= needed else figures[kind]

    return Model(
        {
            "bytes": (moved("load", least.load) + moved("store", least.store)) / gpu.bandwidth,
            "exponentials": figures["ex2"] / gpu.exponentials,
            "matrix": matrix,
            "instructions": figures["instructions"] / gpu.issue,
        },
        max(
            (least.load + least.store) / gpu.bandwidth,
            least.exponentials / gpu.exponentials,
            matrix,
        ),
    )


def models() -> Iterator[tuple[TritonKernel, str, Config, GPU, Model]]:
    """(kernel, headline, configuration, GPU, model) from the committed budgets."""
    committed = budgets.read() or {}
    for job in budgets.jobs():
        headline, _, target = job.name.partition("/")
        figures = committed.get(job.kernel.name, {}).get(job.name)
        if target == job.target and figures:
            for gpu in GPUS:
                if gpu.target == target:
                    found = model(gpu, figures, job.kernel.least(job.config))
                    yield job.kernel, headline, job.config, gpu, found


def of_name(device: str) -> GPU | None:
    """The GPU that torch calls `device`, such as "NVIDIA H100 80GB HBM3"."""
    return next((gpu for gpu in GPUS if gpu.name in device), None)


def predict(op: str, shape: tuple[int, ...], dtype: str, gpu: GPU) -> tuple[str, Model] | None:
    """(kernel, model of an element) of what `bench` measures, compiled here for that GPU."""
    for kernel in budgets.table.TRITON:
        if kernel.room == op and kernel.measured is not None:
            config = {**kernel.measured(shape, dtype), "target": gpu.target}
            if kernel.possible(config):
                job = budgets.Job(kernel, "measured", config, gpu.target)
                (compiled,) = budgets.compile_all([job])
                return kernel.name, model(gpu, compiled.figures(), kernel.least(config))
    return None


def lines() -> Iterator[str]:
    """A table."""
    yield f"{'kernel':27} {'headline':20} {'GPU':5} {'modelled':>13}  {'bound':13} of the least"
    for kernel, headline, _, gpu, m in models():
        yield (
            f"{kernel.name:27} {headline:20} {gpu.name:5} {1e-9 / m.seconds:6.0f} G elem/s"
            f"  {m.bound:13} {m.share:5.0%}   "
            + "  ".join(f"{k} {v * 1e12:.2f}" for k, v in m.parts.items() if v)
            + " ps"
        )
