"""The physical limit of an op with its gradient, measured in the same rounds.

What has matrix products is bound by them: the limit is those, bare. Whatever computes another fused
loss reads its inputs and writes its gradient; of logits it takes two exponentials an element (kd:
student and teacher at T; the student at 1 is a power of the one at T. Softmax: one a pass). On the
CPU the limit is the larger of
  read_read_write  that traffic and nothing else, by the same vectors, into memory obtained as
                   the contender obtains it; plain or past the caches, whichever is faster
  exponentials     as many as needed, by the kernels' own loop over a block in L1
On a GPU exponentials are not the bottleneck: the limit there is bandwidth, as the better of a
three-operand addition and a copy. Beside the times are the rates that they come to.
"""

from __future__ import annotations

import torch

from bench.op import Inputs, Limit
from bench.timing import CudaSteps, Step, cpu_call
from fastdistill import _native

EXP_BLOCK = 1024  # floats; with their results 8 KB
LEAST_EXPONENTIALS = 1 << 20  # fewer would time the call
SERIAL_ELEMENTS = 16384  # below this a second thread costs more than it gives (csrc/cpu/kd.cpp)

PREFIX = "limit:"


def steps(limit: Limit, x: Inputs, cuda: CudaSteps | None) -> dict[str, Step]:
    """The pieces of an op's limit."""
    if limit.products:
        work = cuda.call(limit.products) if cuda else cpu_call(limit.products)
        return {PREFIX + "products": work}
    return cuda_steps(x, cuda) if cuda else cpu_steps(x, limit.exponentials)


def cpu_steps(x: Inputs, exponentials: int) -> dict[str, Step]:
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

    found = {
        PREFIX + "read_read_write": cpu_call(lambda: copy(False)),
        PREFIX + "read_read_write_streamed": cpu_call(lambda: copy(True)),
    }
    if exponentials:
        wanted = exponentials * elements
        repeats = max(wanted, LEAST_EXPONENTIALS) // EXP_BLOCK
        found[PREFIX + "exponentials"] = cpu_call(
            lambda: module.exp_loop(EXP_BLOCK, repeats, threads), wanted / (repeats * EXP_BLOCK)
        )
    return found


def cuda_steps(x: Inputs, steps: CudaSteps) -> dict[str, Step]:
    """Bandwidth, by two of torch's kernels."""
    student, teacher = x.student.detach(), x.teacher
    out = torch.empty_like(student)
    return {
        PREFIX + "read_read_write": steps.call(lambda: torch.add(student, teacher, out=out)),
        PREFIX + "copy": steps.call(lambda: out.copy_(student)),  # reads one, writes one
    }


def combine(
    pieces: dict[str, float], device: str, limit: Limit, x: Inputs
) -> dict[str, float] | None:
    """The limit in ms with its parts, from the medians of the pieces; None if there are none."""
    at = {name.removeprefix(PREFIX): ms for name, ms in pieces.items()}
    if not at:
        return None
    if "products" in at:
        return {"ms": at["products"], "gflops": limit.flops / at["products"] / 1e6, **at}
    share = limit.arrays / 3
    if device == "cuda":
        traffic = share * min(at["read_read_write"], at["copy"] * 3 / 2)
    else:
        traffic = share * min(at["read_read_write"], at["read_read_write_streamed"])
    elements = x.student.numel()
    found = {"ms": max(traffic, at.get("exponentials", 0.0)), "traffic": traffic, **at}
    found["gb_per_s"] = limit.arrays * elements * x.student.itemsize / traffic / 1e6
    if "exponentials" in at:
        found["exponentials_per_ns"] = limit.exponentials * elements / at["exponentials"] / 1e6
    return found
