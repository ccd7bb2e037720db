"""Other libraries' losses, each through its public API: `pip install ".[peers]"`.

One that is not installed, or needs a GPU, is skipped and says so. None of them computes quite the
same thing: `truth` has what each should compute, and it is held to that. They are imported at their
first call, which is not timed: importing all takes seconds.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bench.op import HARD_WEIGHT, SOFT_WEIGHT, TEMPERATURE, Contender, Inputs

ONE_OVER_T2 = 1 / TEMPERATURE**2
"""Of T² KL, for those that leave T² out."""


def kd_contenders(device: str) -> dict[str, Contender]:
    """Losses of logits."""
    modelopt = functools.partial(_loss, _modelopt)
    torchdistill = functools.partial(_loss, _torchdistill)
    trl = functools.partial(_loss, _trl)
    kl, jsd = functools.partial(_loss, _liger_kl), functools.partial(_loss, _liger_jsd)
    no_t2 = (0.0, ONE_OVER_T2)
    triton = None if device == "cuda" else "its Triton kernels need a GPU"
    return {
        "torchdistill": _peer(
            "torchdistill",
            Contender(
                torchdistill,
                near=lambda x: torchdistill(x, hard=0.0),
                near_truth=no_t2,  # without labels it leaves T² out
            ),
        ),
        "trl": _peer("trl", Contender(trl, no_t2)),
        "modelopt": _peer("modelopt", Contender(modelopt, (0.0, 1.0))),
        "liger_kl": _peer("liger_kernel", Contender(kl, no_t2, unavailable=triton)),
        "liger_jsd": _peer("liger_kernel", Contender(jsd, no_t2, unavailable=triton)),
    }


def linear_contenders() -> dict[str, Contender]:
    """Losses of hidden states and output weights."""
    return {"liger_chunked": _peer("liger_kernel", Contender(_liger_chunked))}


def installed(package: str) -> bool:
    """Whether it can be looked for at the first call."""
    return importlib.util.find_spec(package) is not None


def _peer(package: str, contender: Contender) -> Contender:
    if not installed(package):
        return contender._replace(unavailable=f"{package} is not installed (extra: peers)")
    return contender._replace(needs=package)


def _loss(make: Callable[..., Callable[[Inputs], Tensor]], x: Inputs, **settings: Any) -> Tensor:
    return make(**settings)(x)


@functools.cache
def _torchdistill(hard: float = HARD_WEIGHT) -> Callable[[Inputs], Tensor]:
    """KDLoss(T, alpha), weights alpha and 1 - alpha; T² only with labels."""
    from torchdistill.losses.mid_level import KDLoss

    loss = KDLoss("m", "output", "m", "output", temperature=TEMPERATURE, alpha=hard)
    return lambda x: loss(
        {"m": {"output": x.student}}, {"m": {"output": x.teacher}}, x.labels if hard else None
    )


@functools.cache
def _trl() -> Callable[[Inputs], Tensor]:
    """GKDTrainer's loss at beta = 0, forward KL; no label is ignored, so none is given."""
    from trl.experimental.gkd import GKDTrainer

    return lambda x: GKDTrainer.generalized_jsd_loss(
        x.student, x.teacher, beta=0, temperature=TEMPERATURE, reduction="batchmean"
    )


@functools.cache
def _modelopt() -> Callable[[Inputs], Tensor]:
    from modelopt.torch.distill import LogitsDistillationLoss

    loss = LogitsDistillationLoss(temperature=TEMPERATURE, reduction="batchmean")
    return lambda x: loss(x.student, x.teacher)


@functools.cache
def _liger_kl() -> Callable[[Inputs], Tensor]:
    """It takes log-probabilities, which torch makes."""
    from liger_kernel.transformers import LigerKLDIVLoss

    loss = LigerKLDIVLoss(reduction="batchmean", log_target=True)
    return lambda x: loss(*_log_probabilities(x))


@functools.cache
def _liger_jsd() -> Callable[[Inputs], Tensor]:
    """At beta = 0, forward KL."""
    from liger_kernel.transformers import LigerJSD

    loss = LigerJSD(beta=0.0)
    return lambda x: loss(*_log_probabilities(x))


def _log_probabilities(x: Inputs) -> tuple[Tensor, Tensor]:
    return (
        F.log_softmax(x.student / TEMPERATURE, -1),
        F.log_softmax(x.teacher / TEMPERATURE, -1),
    )


@functools.cache
def _liger_chunk_loss() -> Any:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    return LigerFusedLinearJSDLoss(
        weight_hard_loss=HARD_WEIGHT,
        weight_soft_loss=SOFT_WEIGHT * TEMPERATURE**2,
        beta=0.0,
        temperature=TEMPERATURE,
        compiled=True,
    )


def _liger_chunked(x: Inputs) -> Tensor:
    """At beta = 0, forward KL; compiled, as by default, in its chunks of 1024 rows."""
    return _liger_chunk_loss()(x.student, x.weights[0], x.teacher, x.frozen[0], x.labels)


OF_LOGITS = tuple(kd_contenders("cpu"))
"""Their names; they have a suite of their own, so that the main one does not wait for them."""
