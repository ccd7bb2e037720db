"""How much faster the student answers than the teacher."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP_S = 0.2
MEASURE_S = 1.0
FEWEST_REPEATS = 20
BATCH = 256


def compare(teacher: nn.Module, student: nn.Module, images: Tensor) -> dict[str, Any]:
    """Median time of a forward pass of both, taken in turns so that a busy moment meets both.

    Args:
        teacher: in any mode; it is measured in evaluation and inference mode.
        student: the same.
        images: what both take, such as [N, C, H, W], on their device; the first `BATCH` are used.

    Returns:
        batch_size, repeats, teacher_ms and student_ms (medians), speed_up (their ratio).
    """
    batch = images[:BATCH].contiguous()
    teacher.eval()
    student.eval()
    times: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        _turns((teacher, student), batch, WARM_UP_S, 2, ([], []))
        _turns((teacher, student), batch, MEASURE_S, FEWEST_REPEATS, times)
    slow, fast = (1000 * statistics.median(t) for t in times)
    return {
        "batch_size": len(batch),
        "repeats": len(times[0]),
        "teacher_ms": slow,
        "student_ms": fast,
        "speed_up": slow / fast,
    }


def _turns(
    models: tuple[nn.Module, nn.Module],
    batch: Tensor,
    seconds: float,
    fewest: int,
    times: tuple[list[float], list[float]],
) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times[0]) < fewest:
        for model, record in zip(models, times, strict=True):
            _wait(batch)
            start = time.perf_counter()
            model(batch)
            _wait(batch)  # a launch on a GPU returns before the work is done
            record.append(time.perf_counter() - start)


def _wait(batch: Tensor) -> None:
    if batch.is_cuda:
        torch.cuda.synchronize(batch.device)
