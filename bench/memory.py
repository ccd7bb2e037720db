"""Peak memory of one step: how far it rises above what was there before the step."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench.op import Contender, Inputs, Op

STATUS = Path("/proc/self/status")


def cpu_peak(op: Op, contender: str, shape: tuple[int, ...], dtype: str) -> float | None:
    """MB, in a process of its own: a fork made before this one has started a thread.

    Linux only, elsewhere None. The step before the one that is watched pays for what is kept for
    good (code, thread pools); what malloc keeps of it is given back first.
    """
    if not STATUS.exists():
        return None

    def work() -> float:
        x = op.inputs(shape, dtype, "cpu")
        found: Contender = op.contenders("cpu", dtype)[contender]
        _step(found, x)
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        before = _status("VmRSS")
        _step(found, x)
        return max(0.0, (_status("VmHWM") - before) / 1024)

    return _in_fork(work)


def rise(build: Callable[[], Callable[[], object]]) -> float | None:
    """MB by which two steps rise above what there was once the step was built.

    In a process of its own, as `cpu_peak`. What the first step keeps for the next ones counts.
    """
    if not STATUS.exists():
        return None

    def work() -> float:
        step = build()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        step()
        step()
        return max(0.0, (_status("VmHWM") - before) / 1024)

    return _in_fork(work)


def cuda_peak(contender: Contender, x: Inputs) -> float:
    """MB of the caching allocator."""
    x.forget()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _step(contender, x)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _step(contender: Contender, x: Inputs) -> None:
    loss = contender.loss(x)
    loss.backward()
    del loss
    x.forget()


def _status(key: str) -> float:
    for line in STATUS.read_text().splitlines():
        if line.startswith(key + ":"):
            return float(line.split()[1])  # kB
    raise RuntimeError(f"{STATUS}: no {key}")


def _in_fork(work: Callable[[], float]) -> float | None:
    """The result of `work`, or None if it failed (the reason goes to stderr)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            os.write(writer, json.dumps(work()).encode())
        except Exception as error:  # the timing that follows tells it in full
            print(f"memory: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else None
