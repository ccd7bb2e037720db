"""A training in progress, in one file: model, optimiser, random state, epoch and curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.distill import store
from fastdistill.distill.errors import JobError

Curve = list[dict[str, float]]
"""One entry per finished epoch: epoch, loss, seconds and what the caller measured."""


class Snapshot:
    """Where the state of one training is kept between epochs.

    One file, so that model and optimiser are always of the same epoch; safetensors and JSON, so
    that reading it runs no code.

    Args:
        path: the file.
        run: id of the job. A file of another job is taken for no file.
    """

    def __init__(self, path: Path, run: str) -> None:
        self.path = path
        self.run = run

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
        curve: Curve,
    ) -> None:
        """Write the state after the last epoch of `curve`."""
        tensors: dict[str, Tensor] = {"generator": generator.get_state()}
        tensors |= {f"model.{name}": value for name, value in model.state_dict().items()}
        state = optimizer.state_dict()
        for index, values in state["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        about = {
            "kind": "training state",
            "run": self.run,
            "groups": state["param_groups"],
            "curve": curve,
        }
        store.save(self.path, tensors, about)

    def load(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator
    ) -> Curve:
        """Restore all three in place; the curve so far, [] if there is no state of this job.

        Raises:
            JobError: the file is damaged or of another network.
        """
        if not self.path.exists():
            return []
        tensors, about = store.load(self.path)
        if about.get("run") != self.run:
            return []
        try:
            prefix = "model."
            model.load_state_dict(
                {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            )
            state: dict[int, dict[str, Any]] = {}
            for key, value in tensors.items():
                if key.startswith("optimizer."):
                    _, index, name = key.split(".")
                    state.setdefault(int(index), {})[name] = value
            optimizer.load_state_dict({"state": state, "param_groups": about["groups"]})
            generator.set_state(tensors["generator"])
            curve: Curve = about["curve"]
        except (KeyError, ValueError, RuntimeError) as error:
            raise JobError(
                f"The training state {self.path} does not fit this network.",
                f"{error}",
                "Delete it and continue with --resume: that network is trained again.",
            ) from None
        return curve

    def remove(self) -> None:
        """Delete the file: the training is finished."""
        self.path.unlink(missing_ok=True)
