"""The physical limit of an op with its gradient, measured in the same rounds.

A hint with a regressor is bound by its three matrix products (the projection, the gradients of the
features and of the weight): the limit is those three, bare. Whatever computes another fused loss
reads two arrays and writes one gradient; of logits it takes two exponentials an element (student
and teacher at T; the student at 1 is a power of the one at T). On the CPU the limit is the larger
of
  read_read_write  that traffic and nothing else, by the same vectors, into memory obtained as
                   the contender obtains it; plain or past the caches, whichever is faster
  exponentials     as many as needed, by the kernels' own loop over a block in L1
On a GPU exponentials are not the bottleneck: the limit there is bandwidth, as the better of a
three-operand addition and a copy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.cases import Inputs
from bench.timing import CudaSteps, Step, cpu_call
from fastdistill import _native

EXP_BLOCK = 1024  # floats; with their results 8 KB
LEAST_EXPONENTIALS = 1 << 20  # fewer would time the call
SERIAL_ELEMENTS = 16384  # below this a second thread costs more than it gives (csrc/cpu/kd.cpp)

PREFIX = "limit:"


def steps(limit: str, x: Inputs, cuda: CudaSteps | None) -> dict[str, Step]:
    """The pieces of an op's limit; none where none is known."""
    if not limit:
        return {}
    if x.weights:
        work = _products(x)
        return {PREFIX + "products": cuda.call(work) if cuda else cpu_call(work)}
    return cuda_steps(x, cuda) if cuda else cpu_steps(x, "exponentials" in limit)


def _products(x: Inputs) -> Callable[[], object]:
    student, weight = x.student.detach(), x.weights[0].detach()
    residual = torch.randn(x.teacher.shape, device=student.device).to(student.dtype)

    def work() -> object:
        return student @ weight.T, residual @ weight, residual.T @ student

    return work


def cpu_steps(x: Inputs, exponentials: bool) -> dict[str, Step]:
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
        wanted = 2 * elements
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


def combine(pieces: dict[str, float], device: str) -> dict[str, float] | None:
    """The limit in ms with its parts, from the medians of the pieces; None if there are none."""
    at = {name.removeprefix(PREFIX): ms for name, ms in pieces.items()}
    if not at:
        return None
    if "products" in at:
        return {"ms": at["products"], **at}
    if device == "cuda":
        traffic = min(at["read_read_write"], at["copy"] * 3 / 2)
        return {"ms": traffic, "traffic": traffic, **at}
    traffic = min(at["read_read_write"], at["read_read_write_streamed"])
    return {"ms": max(traffic, at.get("exponentials", 0.0)), "traffic": traffic, **at}
