"""Files that are either the old ones or the new ones, never half of each; tensors in them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdistill.distill.errors import JobError

if TYPE_CHECKING:
    from torch import Tensor

TEMPORARY = ".fastdistill-tmp"
KEY = "fastdistill"  # of our JSON in the safetensors header, whose values must be text


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data` so that a kill or a power cut leaves the old or the new file.

    The data reach the disk before the name does: a rename alone may be flushed first.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C included: leave no litter
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # elsewhere a directory cannot be opened to be flushed
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON for people: indented, with a newline at the end, without NaN."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (text + "\n").encode())


def save(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and a JSON description into one safetensors file, atomically."""
    import safetensors.torch

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {KEY: json.dumps(about, allow_nan=False)}
    write_atomic(path, safetensors.torch.save(plain, header))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU, in memory of their own) and the description that `save` wrote.

    Raises:
        JobError: the file is missing, damaged, or not one of ours.
    """
    import safetensors

    title = f"The checkpoint {path} cannot be read."
    if not path.is_file():
        raise JobError(title, "There is no such file.", "Check the path.")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            about = json.loads((file.metadata() or {}).get(KEY, "null"))
            # clone(): a view into the file is aligned to 8 bytes, torch's own memory to 64
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, json.JSONDecodeError, OSError) as error:
        raise JobError(
            title,
            f"It is damaged or no safetensors file: {error}.",
            "Delete it and continue with --resume: that network is trained again.",
        ) from None
    if not isinstance(about, dict):
        raise JobError(
            title,
            f"Its header has no {KEY!r} entry: fastdistill did not write it.",
            "Give a checkpoint that `fastdistill distill` wrote.",
        )
    return tensors, about
