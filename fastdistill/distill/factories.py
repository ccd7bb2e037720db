"""Networks of the user's own: "module:factory", and a safetensors checkpoint for them."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
import traceback
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
    has parameters for (all of them, if it takes any keyword), and returns a module of its own each
    time: images [N, channels, height, width] float32 -> logits [N, classes].

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
            JobError: no such function, it fails, wants something else or returns something else.
        """
        title = f"The network {self.where} cannot be used."
        function = _find(title, self.where)
        known = {k: v for k, v in asdict(self).items() if k != "where"}
        told = _told(title, function, known)
        try:
            model = function(**told)
        except (Exception, SystemExit) as error:
            raise _failed(title, "It failed", error) from error
        if not isinstance(model, nn.Module):
            raise JobError(
                title,
                f"It returned a {type(model).__name__}, not a torch.nn.Module.",
                "Let it return the network.",
            )
        return model


def check(model: nn.Module, where: str, images: Tensor, classes: int, trained: bool = True) -> None:
    """Run the network on a few images [N, C, H, W], before anything is trained.

    In evaluation mode and, if it is to be `trained`, in training mode too, which may change its
    buffers: give it a model that is not used any further.

    Raises:
        JobError: it cannot take them, does not return logits [N, classes], or cannot be trained.
    """
    title = f"The network {where} cannot be used."
    for training in (False, True) if trained else (False,):
        mode = "in training mode " if training else ""
        try:
            with torch.set_grad_enabled(training):
                found = model.train(training)(images)
        except (Exception, SystemExit) as error:
            what = f"On images {list(images.shape)} it failed {mode}".rstrip()
            raise _failed(title, what, error) from error
        wanted = [len(images), classes]
        if not isinstance(found, Tensor) or list(found.shape) != wanted:
            got = list(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise JobError(
                title,
                f"On images {list(images.shape)} it returned {mode}{got}; expected logits "
                f"{wanted}.",
                "Let it return one logit per class.",
            )
        if not found.is_floating_point():
            raise JobError(
                title,
                f"It returned {found.dtype}; expected floating-point logits.",
                "Let it return logits, not classes.",
            )
        if training and not found.requires_grad:
            frozen = not any(x.requires_grad for x in model.parameters())
            raise JobError(
                title,
                "All its parameters are frozen." if frozen else "Its logits have no gradient.",
                "Let it have parameters that require a gradient.",
            )


def check_apart(model: nn.Module, other: nn.Module, where: str) -> None:
    """Refuse networks that share parameters: one would be trained with the other.

    Raises:
        JobError: they do.
    """
    theirs = {id(x) for x in other.parameters()}
    shared = next((name for name, x in model.named_parameters() if id(x) in theirs), None)
    if shared is not None:
        raise JobError(
            f"The network {where} cannot be used.",
            f"It has its {shared} in common with another network of the job.",
            "Let it build a new one at each call.",
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
    except (Exception, SystemExit) as error:  # whatever stands in the module
        raise _failed(title, f"The module {name} cannot be imported", error) from error
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


def _failed(title: str, what: str, error: BaseException) -> JobError:
    """Of the user's own code: what it raised, and where."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename[:1] != "<"]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    said = str(error).rstrip(".")
    kind = type(error).__name__
    return JobError(
        title,
        f"{what}: {kind}{f': {said}' if said else ''}{place}.",
        "Correct it; it is told the channels, height, width and classes of the images.",
    )


def _told(title: str, function: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the known values that a function has parameters for."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of a built-in one: it is told nothing
        return {}
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    variable = [p for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [
        p.name
        for p in parameters
        if p.default is p.empty
        and p not in variable
        and (p.name not in known or p.kind is p.POSITIONAL_ONLY)
    ]
    if missing:
        raise JobError(
            title,
            f"It needs {', '.join(missing)}; it is given {', '.join(known)} by keyword.",
            "Give its other parameters defaults, or write a function around it.",
        )
    anything = any(p.kind is p.VAR_KEYWORD for p in variable)
    return {k: v for k, v in known.items() if anything or k in names}
