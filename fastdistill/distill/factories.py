"""Networks of the user's own: "module:factory", and a safetensors checkpoint for them."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.distill.errors import JobError


@dataclass(frozen=True)
class Factory:
    """A function of the user's, and what it is told of the data.

    It is called without arguments, or with those of channels, height, width and classes that it
    has parameters for, and returns a module: images [N, channels, height, width] float32 ->
    logits [N, classes].

    Attributes:
        where: "module:factory", the module found from the current directory or installed.
        channels: of the images.
        height: of the images, pixels.
        width: of the images, pixels.
        classes: number of logits.
    """

    where: str
    channels: int
    height: int
    width: int
    classes: int

    def to_json(self) -> dict[str, Any]:
        """As JSON values, for the checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Factory:
        """The inverse of `to_json`. KeyError or TypeError if `values` is something else."""
        return cls(**values)

    def __call__(self) -> nn.Module:
        """A new network.

        Raises:
            JobError: no such function, or it returns something else.
        """
        title = f"The network {self.where} cannot be used."
        function = _find(title, self.where)
        told = {k: v for k, v in asdict(self).items() if k in _parameters(function)}
        model = function(**told)
        if not isinstance(model, nn.Module):
            raise JobError(
                title,
                f"It returned a {type(model).__name__}, not a torch.nn.Module.",
                "Let it return the network.",
            )
        return model


def check(model: nn.Module, where: str, images: Tensor, classes: int) -> None:
    """Run the network on a few images [N, C, H, W], before anything is trained.

    Raises:
        JobError: it cannot take them, or does not return logits [N, classes].
    """
    title = f"The network {where} cannot be used."
    was = model.training
    try:
        with torch.no_grad():
            found = model.eval()(images)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise JobError(
            title,
            f"On images {list(images.shape)} it failed: {error}.",
            "Build it for images of that size.",
        ) from None
    finally:
        model.train(was)
    wanted = [len(images), classes]
    if not isinstance(found, Tensor) or list(found.shape) != wanted:
        got = list(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise JobError(
            title,
            f"On images {list(images.shape)} it returned {got}; expected logits {wanted}.",
            "Let it return one logit per class.",
        )


def load(model: nn.Module, path: str) -> None:
    """Load the tensors of a safetensors file, all of them and no others.

    Raises:
        JobError: no such file, damaged, or of another network.
    """
    import safetensors
    import safetensors.torch

    title = f"The checkpoint {path} cannot be used."
    if not Path(path).is_file():
        raise JobError(title, "There is no such file.", "Check the path.")
    try:
        model.load_state_dict(safetensors.torch.load_file(path))
    except safetensors.SafetensorError as error:
        raise JobError(
            title, f"It is damaged or no safetensors file: {error}.",
            "Save it with safetensors.torch.save_file(model.state_dict(), path).",
        ) from None  # fmt: skip
    except RuntimeError as error:
        raise JobError(
            title, str(error), "Give the checkpoint of this network, or another factory."
        ) from None


def sha256(path: str) -> str:
    """Of a file's content.

    Raises:
        JobError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise JobError(
            f"The checkpoint {path} cannot be used.", f"{error.strerror}.", "Check the path."
        ) from None
    return digest.hexdigest()


def _find(title: str, where: str) -> Any:
    name, colon, function = where.partition(":")
    if not (name and colon and function):
        raise JobError(
            title, "Expected module:factory.", "Write, for example, mypackage.models:make_teacher."
        )
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does; the console script does not
    try:
        found: Any = importlib.import_module(name)
    except ImportError as error:
        raise JobError(title, f"{error}.", "Check the name, or the current directory.") from None
    for part in function.split("."):
        if not hasattr(found, part):
            raise JobError(
                title, f"The module {name} has no {function}.", "Check the name after the colon."
            )
        found = getattr(found, part)
    if not callable(found):
        raise JobError(
            title, f"{function} is a {type(found).__name__}, not a function.", "Name a function."
        )
    return found


def _parameters(function: Any) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # of a built-in one: it is told nothing
        return set()
