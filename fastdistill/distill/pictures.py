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

    Names that begin with . or __ are passed over. Pictures are turned as their EXIF data say.

    Raises:
        JobError: images of several sizes (nothing is resized), a file that cannot be read or holds
            several images, images outside of the classes' folders, an empty class, classes that
            the training part does not have, folders that could be classes or parts.
    """
    extras.require("A folder of images", "PIL")
    title = f"The data {folder} cannot be used."
    train, tests = _parts(title, folder)
    classes = _classes(title, train)
    paths = [_paths(title, train, classes), *(_paths(title, test, classes) for test in tests)]
    images = _images(title, [path for part in paths for path, _ in part])
    labels = np.array([label for part in paths for _, label in part], np.int64)
    cut = len(paths[0])
    test = (images[cut:], labels[cut:]) if tests else None
    return (images[:cut], labels[:cut]), test


def _entries(folder: Path) -> list[Path]:
    """What a person sees there: no .git, no ._1.png of macOS, no __MACOSX."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith((".", "__")))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def _parts(title: str, folder: Path) -> tuple[Path, list[Path]]:
    """The folder of the training images, and that of the test images, if there is one."""
    folders = [path for path in _entries(folder) if path.is_dir()]
    trains = [path for path in folders if path.name.lower() in TRAIN]
    tests = [path for path in folders if path.name.lower() in TEST]
    others = [path for path in folders if path not in (*trains, *tests)]
    if not trains:
        return folder, []  # the folders are classes, whatever their names
    if others:
        if not any(path.is_dir() for train in trains for path in _entries(train)):
            return folder, []  # a class of pictures of trains
        raise JobError(
            title,
            f"Beside {trains[0].name} it has {', '.join(path.name for path in others)}; "
            "expected folders of classes alone, or train and test alone.",
            "Move the others away.",
        )
    for paths, what in ((trains, "training"), (tests, "testing")):
        if len(paths) > 1:
            raise JobError(
                title,
                f"It has {' and '.join(path.name for path in paths)}; one of them is for {what}.",
                "Give a folder without the other.",
            )
    return trains[0], tests


def _classes(title: str, folder: Path) -> list[str]:
    entries = _entries(folder)
    names = [path.name for path in entries if path.is_dir()]
    loose = [path.name for path in entries if _is_image(path)]
    if loose and names:
        raise JobError(
            title,
            f"{folder} has images beside the folders of its classes: {loose[0]}"
            + (f" and {len(loose) - 1} more." if len(loose) > 1 else "."),
            "Move them into their class, or away.",
        )
    if len(names) < 2:
        raise JobError(
            title,
            f"{folder} must hold one folder of images per class; it has {len(names)}.",
            "Check --data.",
        )
    return names


def _paths(title: str, folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """Each image and its class."""
    unknown = [p.name for p in _entries(folder) if p.is_dir() and p.name not in classes]
    if unknown:
        raise JobError(
            title,
            f"{folder} has the classes {', '.join(unknown)}, which have no training images.",
            "Use the same classes in both parts.",
        )
    found: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            continue  # a test part may lack a class
        paths = [
            path
            for path in sorted((folder / name).rglob("*"))
            if _is_image(path)
            and not any(part.startswith(".") for part in path.relative_to(folder / name).parts)
        ]
        if not paths:
            raise JobError(
                title,
                f"{folder / name} has no images ({', '.join(SUFFIXES)}).",
                "Add some, or remove the folder.",
            )
        found += [(path, label) for path in paths]
    if not found:
        raise JobError(title, f"{folder} has no images ({', '.join(SUFFIXES)}).", "Check --data.")
    return found


def _images(title: str, paths: list[Path]) -> NDArray[np.uint8]:
    from PIL import Image, ImageOps, UnidentifiedImageError

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
                frames = getattr(image, "n_frames", 1)
                if frames > 1:
                    raise JobError(
                        title, f"{path} holds {frames} images.", "Save one of them to a file."
                    )
                turned = ImageOps.exif_transpose(image)
                array = np.asarray(turned.convert("L" if image.mode in GREY else "RGB"))
        except (
            UnidentifiedImageError,
            Image.DecompressionBombError,
            OSError,
            SyntaxError,
        ) as error:
            raise JobError(
                title, f"{path} cannot be read: {str(error).rstrip('.')}.", "Remove or replace it."
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
