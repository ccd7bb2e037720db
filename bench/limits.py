"""The physical limit of a fused loss with its gradient, measured in the same rounds.

Whatever computes it reads two arrays of logits, writes one gradient, and takes two exponentials an
element (student and teacher at T; the student at 1 is a power of the one at T). On the CPU the
limit is the larger of
  read_read_write  that traffic and nothing else, by the same vectors, into memory obtained as
                   the contender obtains it; plain or past the caches, whichever is faster
  exponentials     as many as needed, by the kernels' own loop over a block in L1
On a GPU exponentials are not the bottleneck: the limit there is bandwidth, as the better of a
three-operand addition and a copy.
"""

from __future__ import annotations

import torch

from bench.cases import Inputs
from bench.timing import CudaSteps, Step, cpu_call
from fastdistill import _native

EXP_BLOCK = 1024  # floats; with their results 8 KB
LEAST_EXPONENTIALS = 1 << 20  # fewer would time the call
SERIAL_ELEMENTS = 16384  # below this a second thread costs more than it gives (csrc/cpu/kd.cpp)

PREFIX = "limit:"


def cpu_steps(x: Inputs) -> dict[str, Step]:
    """The pieces of the limit at the present number of threads; none without native kernels."""
    module = _native.cpu().module
    if module is None:
        return {}
    student, teacher = x.student.detach(), x.teacher
    elements, threads = student.numel(), torch.get_num_threads()
    copiers = threads if elements >= SERIAL_ELEMENTS else 1
    kept = {}

    def copy(stream: bool) -> None:
        kept.clear()  # as `grad = None`: the last output is returned before the next is taken
        out = kept["out"] = torch.empty_like(student)
        addresses = (student.data_ptr(), teacher.data_ptr(), out.data_ptr())
        module.copy_limit(*addresses, out.nbytes, copiers, stream)

    wanted = 2 * elements
    repeats = max(wanted, LEAST_EXPONENTIALS) // EXP_BLOCK
    return {
        PREFIX + "read_read_write": cpu_call(lambda: copy(False)),
        PREFIX + "read_read_write_streamed": cpu_call(lambda: copy(True)),
        PREFIX + "exponentials": cpu_call(
            lambda: module.exp_loop(EXP_BLOCK, repeats, threads), wanted / (repeats * EXP_BLOCK)
        ),
    }


def cuda_steps(x: Inputs, steps: CudaSteps) -> dict[str, Step]:
    """Bandwidth, by two of torch's kernels."""
    student, teacher = x.student.detach(), x.teacher
    out = torch.empty_like(student)
    return {
        PREFIX + "read_read_write": steps.call(lambda: torch.add(student, teacher, out=out)),
        PREFIX + "copy": steps.call(lambda: out.copy_(student)),  # reads one, writes one
    }


def combine(pieces: dict[str, float], device: str) -> dict[str, float] | None:
    """The limit in ms with its parts, from the medians of the pieces; None if there are none."""
    at = {name.removeprefix(PREFIX): ms for name, ms in pieces.items()}
    if not at:
        return None
    if device == "cuda":
        traffic = min(at["read_read_write"], at["copy"] * 3 / 2)
        return {"ms": traffic, "traffic": traffic, **at}
    traffic = min(at["read_read_write"], at["read_read_write_streamed"])
    return {"ms": max(traffic, at["exponentials"]), "traffic": traffic, **at}
