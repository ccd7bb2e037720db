"""How time is taken: contenders in turn, medians and quartiles."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from statistics import median, quantiles

import torch

from bench.cases import Contender, Inputs

PASSES = ("forward", "backward", "both")

Sample = dict[str, float]  # pass -> seconds
Step = Callable[[], Sample]


def cpu_step(contender: Contender, x: Inputs) -> Step:
    """One training step: the old gradient let go, forward, backward, the graph let go."""

    def step() -> Sample:
        start = time.perf_counter()
        x.student.grad = None
        begin = time.perf_counter()
        loss = contender.loss(x)
        between = time.perf_counter()
        loss.backward()
        del loss
        end = time.perf_counter()
        return {"forward": between - begin, "backward": end - between, "both": end - start}

    return step


class CudaSteps:
    """Device events around each pass, with the caches cold and the launches queued ahead.

    A flush of twice the L2 before each step takes the inputs out of it. The device then sleeps
    until the host has queued the whole step: events would otherwise time Python, which a training
    loop hides behind other kernels.
    """

    sleep_cycles = 2_000_000  # about 1 ms

    def __init__(self) -> None:
        size = torch.cuda.get_device_properties("cuda").L2_cache_size
        self.flush = torch.empty(2 * size, dtype=torch.int8, device="cuda")

    def _queue(self) -> list[torch.cuda.Event]:
        self.flush.zero_()
        torch.cuda._sleep(self.sleep_cycles)
        return [torch.cuda.Event(enable_timing=True) for _ in range(3)]

    def step(self, contender: Contender, x: Inputs) -> Step:
        """As `cpu_step`."""

        def step() -> Sample:
            x.student.grad = None
            begin, between, end = self._queue()
            begin.record()
            loss = contender.loss(x)
            between.record()
            loss.backward()
            del loss
            end.record()
            end.synchronize()
            return {
                "forward": begin.elapsed_time(between) / 1e3,
                "backward": between.elapsed_time(end) / 1e3,
                "both": begin.elapsed_time(end) / 1e3,
            }

        return step

    def call(self, work: Callable[[], object]) -> Step:
        """Time of one piece of work."""

        def step() -> Sample:
            begin, end, _ = self._queue()
            begin.record()
            work()
            end.record()
            end.synchronize()
            return {"both": begin.elapsed_time(end) / 1e3}

        return step


def cpu_call(work: Callable[[], object], scale: float = 1.0) -> Step:
    """Time of one piece of work, times `scale`."""

    def step() -> Sample:
        begin = time.perf_counter()
        work()
        return {"both": (time.perf_counter() - begin) * scale}

    return step


def in_turn(
    steps: dict[str, Step], seconds: float, least: int, most: int
) -> dict[str, dict[str, list[float]]]:
    """{step: {pass: seconds of each repetition}}, as A B C, A B C, ...: drift meets all alike.

    As many rounds as fit into `seconds`, within `least` and `most`, after two that do not count.
    """
    for step in steps.values():
        step()
    begin = time.perf_counter()
    for step in steps.values():
        step()
    one = time.perf_counter() - begin
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in steps}
    gc.collect()
    gc.disable()
    try:
        for _ in range(max(least, min(most, int(seconds / one)))):
            for name, step in steps.items():
                for kind, value in step().items():
                    samples[name].setdefault(kind, []).append(value)
    finally:
        gc.enable()
    return samples


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, distance of the quartiles (both ms) and count."""
    if len(seconds) == 1:
        return {"median": seconds[0] * 1e3, "iqr": 0.0, "repetitions": 1}
    low, _, high = quantiles(seconds, n=4, method="inclusive")
    return {
        "median": median(seconds) * 1e3,
        "iqr": (high - low) * 1e3,
        "repetitions": len(seconds),
    }
