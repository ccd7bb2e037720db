"""A folder of pictures as arrays: one folder per class, its name the class's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdistill.distill import extras
from fastdistill.distill.errors import JobError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
TRAIN, TEST = ("train", "training"), ("test", "val", "valid", "validation")
GREY = ("1", "L")  # Pillow's modes; all others but those below become RGB
REFUSED = {"I": "32 bits", "I;16": "16 bits", "F": "floating-point"}

Part = tuple[NDArray[np.uint8], NDArray[np.int64]]


def read(folder: Path) -> tuple[Part, Part | None]:
    """Images [N, H, W] (all of them grey) or [N, 3, H, W] uint8 and labels [N], and a test part.

    Args:
        folder: holds one folder of images per class, or train/ and test/ (or val/) with these.
            Classes are numbered in the order of their names.

    Raises:
        JobError: images of several sizes (nothing is resized), a file that cannot be read, classes
            that the training part does not have.
    """
    extras.require("A folder of images", "PIL")
    title = f"The data {folder} cannot be used."
    parts = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    train = next((parts[name] for name in TRAIN if name in parts), None)
    tests = [parts[name] for name in TEST if name in parts]
    if train is None or not set(parts) <= {*TRAIN, *TEST}:
        train, tests = folder, []  # the folders are classes, whatever their names
    if len(tests) > 1:
        raise JobError(
            title,
            f"It has {' and '.join(path.name for path in tests)}; one of them is for testing.",
            "Give a folder without the other.",
        )
    classes = _classes(title, train)
    paths = [_paths(title, train, classes), *(_paths(title, test, classes) for test in tests)]
    images = _images(title, [path for part in paths for path, _ in part])
    labels = np.array([label for part in paths for _, label in part], np.int64)
    cut = len(paths[0])
    test = (images[cut:], labels[cut:]) if tests else None
    return (images[:cut], labels[:cut]), test


def _classes(title: str, folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    names = [name for name in names if not name.startswith((".", "__"))]
    if len(names) < 2:
        raise JobError(
            title,
            f"{folder} must hold one folder of images per class; it has {len(names)}.",
            "Check --data.",
        )
    return names


def _paths(title: str, folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """Each image and its class."""
    unknown = [
        path.name
        for path in sorted(folder.iterdir())
        if path.is_dir() and path.name not in classes and not path.name.startswith((".", "__"))
    ]
    if unknown:
        raise JobError(
            title,
            f"{folder} has the classes {', '.join(unknown)}, which have no training images.",
            "Use the same classes in both parts.",
        )
    found = [
        (path, label)
        for label, name in enumerate(classes)
        if (folder / name).is_dir()
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file()
    ]
    if not found:
        raise JobError(title, f"{folder} has no images ({', '.join(SUFFIXES)}).", "Check --data.")
    return found


def _images(title: str, paths: list[Path]) -> NDArray[np.uint8]:
    from PIL import Image, UnidentifiedImageError

    arrays: list[NDArray[Any]] = []
    for path in paths:
        try:
            with Image.open(path) as image:
                if image.mode in REFUSED or image.mode.startswith("I;"):
                    depth = REFUSED.get(image.mode, "16 bits")
                    raise JobError(
                        title,
                        f"{path} has {depth} per pixel; expected 8.",
                        "Convert it, or give an .npz file of floats.",
                    )
                if "A" in image.getbands() or "transparency" in image.info:
                    raise JobError(
                        title, f"{path} is transparent in part.", "Put it on a background."
                    )
                array = np.asarray(image.convert("L" if image.mode in GREY else "RGB"))
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise JobError(
                title, f"{path} cannot be read: {error}.", "Remove or replace it."
            ) from None
        if arrays and array.shape[:2] != arrays[0].shape[:2]:
            (h, w), (height, width) = array.shape[:2], arrays[0].shape[:2]
            raise JobError(
                title,
                f"{path} is {w} x {h} pixels, {paths[0].name} {width} x {height}; expected one "
                "size.",
                "Crop or resize them before.",
            )
        arrays.append(array)
    if all(array.ndim == 2 for array in arrays):
        return np.stack(arrays)
    colour = [np.stack([a] * 3, -1) if a.ndim == 2 else a for a in arrays]
    return np.ascontiguousarray(np.stack(colour).transpose(0, 3, 1, 2))
