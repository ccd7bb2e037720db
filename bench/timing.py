"""How time is taken: contenders in turn, medians and quartiles."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Hashable, Mapping
from statistics import median, quantiles
from typing import NamedTuple

import torch

from bench.environment import Others
from bench.op import Contender, Inputs

PASSES = ("forward", "backward", "both")
REPLAY = "replay"  # of both, as one CUDA graph

Sample = dict[str, float]  # pass -> seconds
Step = Callable[[], Sample]


def cpu_step(contender: Contender, x: Inputs) -> Step:
    """One training step: the old gradient let go, forward, backward, the graph let go."""

    def step() -> Sample:
        start = time.perf_counter()
        x.forget()
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
            x.forget()
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

    def replay(self, contender: Contender, x: Inputs) -> Step:
        """Forward and backward captured as one graph, without Python and launches one by one.

        Raises RuntimeError where the contender can't be captured, such as for a synchronisation.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # what is made at first calls is made outside the capture
                x.forget()
                contender.loss(x).backward()
        torch.cuda.current_stream().wait_stream(side)
        x.forget()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            contender.loss(x).backward()
        x.forget()
        one = self.call(graph.replay)
        return lambda: {REPLAY: one()["both"]}

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


BLOCK_SECONDS = 0.4
QUIET = 0.06  # share of the machine that others may take in a block
PATIENCE = 2.5  # how much longer than planned to wait for quiet ones


class Turns(NamedTuple):
    """The samples of all contenders, and what became of the rounds."""

    samples: dict[Hashable, dict[str, list[float]]]  # step -> pass -> seconds of each repetition
    kept: int
    dropped: int  # rounds during which other processes were at work
    others: float | None  # the share of the machine that they took during the rounds kept


def in_turn(steps: Mapping[Hashable, Step], seconds: float, least: int, most: int) -> Turns:
    """All steps in turn, A B C, A B C, ...: drift meets all alike.

    As many rounds as fit into `seconds`, within `least` and `most`, after one that does not count.
    Rounds come in blocks, and a block during which other processes were at work is dropped: by
    that alone, never by its times, and for all contenders. Where fewer than `least` remain, all
    count, and `others` tells.
    """
    begin = time.perf_counter()
    for step in steps.values():
        _turn(step)
    one = time.perf_counter() - begin
    wanted = max(least, min(most, int(seconds / one)))
    deadline = time.perf_counter() + PATIENCE * wanted * one
    blocks: list[tuple[float | None, list[dict]]] = []
    quiet = 0
    gc.collect()
    gc.disable()
    try:
        while quiet < wanted and (time.perf_counter() < deadline or not blocks):
            share, rounds = _block(steps, wanted - quiet)
            blocks.append((share, rounds))
            quiet += len(rounds) if (share or 0.0) <= QUIET else 0
    finally:
        gc.enable()
    kept = [b for b in blocks if (b[0] or 0.0) <= QUIET] if quiet >= least else blocks
    samples: dict[Hashable, dict[str, list[float]]] = {name: {} for name in steps}
    for _, rounds in kept:
        for one_round in rounds:
            for name, sample in one_round.items():
                for kind, value in sample.items():
                    samples[name].setdefault(kind, []).append(value)
    count = sum(len(rounds) for _, rounds in kept)
    shares = [share for share, rounds in kept for _ in rounds if share is not None]
    dropped = sum(len(rounds) for _, rounds in blocks) - count
    return Turns(samples, count, dropped, sum(shares) / len(shares) if shares else None)


def _turn(step: Step) -> Sample:
    """The second of two steps: the first gets memory and caches back from the one before.

    Without it a contender pays for its neighbour's way with memory: fastdistill at 256x128256, one
    thread, took 158 ms after eager had returned 600 MB in small pages, and 67 ms by itself.
    """
    step()
    return step()


def _block(steps: Mapping[Hashable, Step], most: int) -> tuple[float | None, list[dict]]:
    others, begin = Others(), time.perf_counter()
    rounds: list[dict] = []
    while not rounds or (len(rounds) < most and time.perf_counter() - begin < BLOCK_SECONDS):
        rounds.append({name: _turn(step) for name, step in steps.items()})
    return others.share(), rounds


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and distance of the quartiles, in ms."""
    if len(seconds) == 1:
        return {"median": seconds[0] * 1e3, "iqr": 0.0}
    low, _, high = quantiles(seconds, n=4, method="inclusive")
    return {"median": median(seconds) * 1e3, "iqr": (high - low) * 1e3}
