"""Networks and pictures of the user's own in `fastdistill distill`, and the stage of the hint."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from test_distill_data import FAINT, blobs, npz, refusal
from test_distill_job import Recorder

from fastdistill import cli
from fastdistill.distill import job, models, report, store, workbench
from fastdistill.distill.config import Config
from fastdistill.distill.data import load
from fastdistill.distill.evaluate import evaluate
from fastdistill.distill.listener import Listener

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width, channels, height, width_, classes):
        super().__init__()
        self.low = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(),
                                 nn.AvgPool2d(2))
        self.head = nn.Linear(width * (height // 2) * (width_ // 2), classes)

    def forward(self, x):
        return self.head(self.low(x).flatten(1))

def teacher(channels, height, width, classes):
    return Net(24, channels, height, width, classes)

def student(classes):
    return Net(4, 1, 10, 10, classes)

class Holder:
    make = staticmethod(student)

def nothing():
    return None

def pairs():
    return nn.Sequential(nn.Flatten(), nn.Linear(100, 2))

def large():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 4))

NUMBER = 3

def unknown(num_classes):
    return student(num_classes)

def failing(**sizes):
    return {}[sorted(sizes)[0]]

def leaving():
    raise SystemExit("no")

class Odd(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.head = nn.Linear(100, 4)
        self.what = what

    def forward(self, x):
        y = self.head(x.flatten(1))
        if self.what == "classes":
            return y.long()
        if self.what == "detached":
            return y.detach()
        if self.what == "nothing to train on":
            return None if self.training else y
        return {}["no key"]

def classes_():
    return Odd("classes")

def detached():
    return Odd("detached")

def untrained():
    return Odd("nothing to train on")

def keyless():
    return Odd("key")

def frozen():
    return student(4).requires_grad_(False)

always = student(4)

def same():
    return always
"""

SMALL = {
    "seeds": 1, "epochs": 3, "teacher_epochs": 3, "batch_size": 16, "labelled": 24, "device": "cpu",
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def no_report(quick):
    quick.setattr(report, "write", lambda outcome, figures: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    x, y = blobs(400, contrast=FAINT)
    return npz(tmp_path_factory.mktemp("data") / "blobs.npz", x=x, y=y)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The user's module, in a directory that is the current one."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "ownnets.py").write_text(MODULE)
    (folder / "ownbad.py").write_text("def make(:")
    (folder / "ownexit.py").write_text("raise SystemExit(1)")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    patch.setattr("sys.path", [p for p in __import__("sys").path if p])
    yield folder
    patch.undo()


NETWORKS = {"teacher": "ownnets:teacher", "student": "ownnets:student"}


@pytest.fixture(scope="module")
def finished(own, data, tmp_path_factory):
    """A run with both networks and hint layers: (directory, figures)."""
    out = tmp_path_factory.mktemp("job")
    config = Config(out=str(out), data=data, hint_layers=("low", "low"), **NETWORKS, **SMALL)
    return out, job.run(config)


def test_own_networks_are_trained(finished):
    _, figures = finished
    assert figures["teacher"]["parameters"] == 24 * 9 + 24 + 24 * 25 * 4 + 4
    assert {s["parameters"] for s in figures["students"]} == {4 * 9 + 4 + 4 * 25 * 4 + 4}
    assert [s["name"] for s in figures["students"]] == list(Config().students)
    assert figures["teacher"]["accuracy"] > 0.5  # chance is 0.25
    by_name = {s["name"]: s for s in figures["students"]}
    assert by_name["distilled"]["accuracies"][0] > 0.4
    assert figures["settings"]["teacher"] == "ownnets:teacher"


def test_given_teacher_is_not_trained_and_its_weights_are_used(finished, data, tmp_path):
    """A teacher of known weights: its figures come again, and the students learn from it."""
    out, figures = finished
    weights = tmp_path / "teacher.safetensors"
    tensors, _ = store.load(out / "checkpoints" / "teacher.safetensors")
    safetensors.torch.save_file(tensors, weights)
    recorder = Recorder()
    config = Config(
        out=str(tmp_path / "out"), data=data, teacher_checkpoint=str(weights),
        students=("distilled",), **NETWORKS, **SMALL,
    )  # fmt: skip
    again = job.run(config, ["students"], recorder)
    assert again["teacher"]["accuracy"] == figures["teacher"]["accuracy"]
    assert (again["teacher"]["epochs"], again["teacher"]["labelled"]) == (0, None)
    ours, theirs = (
        next(s for s in found["students"] if s["name"] == "distilled")["accuracies"]
        for found in (again, figures)
    )
    assert ours == theirs  # the same logits, the same seed
    assert {name for name, _ in recorder.trained} == {"distilled-seed0"}
    assert str(weights) in again["models"] and report.table(again)[0][1] == ""
    kept, about = store.load(tmp_path / "out" / "checkpoints" / "teacher.safetensors")
    assert all(torch.equal(kept[name], tensors[name]) for name in tensors)
    assert about["curve"][0]["epoch"] == 0
    tensors["head.bias"] = tensors["head.bias"] + 1
    safetensors.torch.save_file(tensors, weights)
    refusal(
        lambda: job.run(Config(out=config.out, resume=True), ["resume"]),
        "teacher_checkpoint: the file has changed",
    )


def test_student_checkpoint_is_where_every_student_starts(own, data, tmp_path, monkeypatch):
    model = models.build(models.Factory("ownnets:student", 1, 10, 10, 4), 77)
    weights = tmp_path / "start.safetensors"
    safetensors.torch.save_file(model.state_dict(), weights)
    starts = []
    train = workbench.engine.train

    def spy(model, *arguments, **keywords):
        starts.append({k: v.clone() for k, v in model.state_dict().items()})
        return train(model, *arguments, **keywords)

    monkeypatch.setattr(workbench.engine, "train", spy)
    config = Config(
        out=str(tmp_path / "out"), data=data, student_checkpoint=str(weights),
        students=("labels_only", "distilled"), **NETWORKS, **SMALL | {"epochs": 1},
    )  # fmt: skip
    job.run(config, ["students"])
    assert len(starts) == 3  # the teacher, then the two
    for start in starts[1:]:
        assert all(torch.equal(start[k], v) for k, v in model.state_dict().items())


def test_without_hint_layers_the_row_is_left_out_and_that_is_said(own, data, tmp_path):
    recorder = Recorder()
    config = Config(out=str(tmp_path), data=data, **NETWORKS, **SMALL | {"epochs": 1})
    figures = job.run(config, [], recorder)
    assert [s["name"] for s in figures["students"]] == ["labels_only", "distilled", "both"]
    assert any("Without hint_distilled" in line for line in recorder.said)
    asked = Config(out=str(tmp_path), data=data, students=("hint_distilled",), **NETWORKS, **SMALL)
    refusal(lambda: job.run(asked, ["students"]), "hint_distilled", "Name them with hint_layers")
    again = Config(out=str(tmp_path), resume=True)
    assert (
        job.run(again, ["resume"])["students"][0]["accuracies"]
        == (figures["students"][0]["accuracies"])
    )


def test_evaluate_runs_named_code_only(finished):
    out, figures = finished
    path = str(out / "checkpoints" / "distilled-seed0.safetensors")
    text = refusal(lambda: evaluate(path), "comes from ownnets:student, which is code of your own")
    assert "--model ownnets:student" in text
    refusal(lambda: evaluate(path, model="ownnets:teacher"), "ownnets:teacher was named")
    found = evaluate(path, model="ownnets:student")
    distilled = next(s for s in figures["students"] if s["name"] == "distilled")
    assert found.accuracy == distilled["accuracies"][0]


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("ownnets", ["Expected module:factory"]),
        ("nonsuch.nets:make", ["No module named 'nonsuch'"]),
        ("ownnets:missing", ["The module ownnets has no missing"]),
        ("ownnets:NUMBER", ["NUMBER is a int, not a function"]),
        ("ownnets:nothing", ["returned a NoneType, not a torch.nn.Module"]),
        ("ownnets:pairs", ["returned [2, 2]; expected logits [2, 4]"]),
        ("ownnets:large", ["On images [2, 1, 10, 10] it failed"]),
        ("ownnets:unknown", ["It needs num_classes; it is given channels, height, width, classes"]),
        ("ownnets:failing", ["It failed: KeyError: 'channels' (ownnets.py, line "]),
        ("ownnets:leaving", ["It failed: SystemExit: no (ownnets.py, line "]),
        ("ownnets:keyless", ["it failed: KeyError: 'no key' (ownnets.py, line"]),
        ("ownnets:classes_", ["It returned torch.int64; expected floating-point logits"]),
        ("ownnets:detached", ["Its logits have no gradient"]),
        ("ownnets:untrained", ["it returned in training mode a NoneType"]),
        ("ownnets:frozen", ["All its parameters are frozen"]),
        ("ownnets:same", ["It has its low.0.weight in common with another network"]),
        ("ownbad:make", ["The module ownbad cannot be imported: SyntaxError", "ownbad.py, line 1"]),
        ("ownexit:make", ["The module ownexit cannot be imported: SystemExit"]),
        (".ownnets:teacher", ["The module .ownnets cannot be imported: TypeError"]),
    ],
)
def test_factories_are_checked_before_anything_is_written(own, data, tmp_path, where, words):
    config = Config(out=str(tmp_path), data=data, student=where, **SMALL)
    refusal(lambda: job.run(config), f"The network {where} cannot be used", *words)
    assert not (tmp_path / "job.json").exists()


def test_factory_may_be_an_attribute(own, data, tmp_path):
    config = Config(
        out=str(tmp_path), data=data, student="ownnets:Holder.make", students=("labels_only",),
        **SMALL | {"epochs": 1, "teacher_epochs": 1},
    )  # fmt: skip
    assert job.run(config, ["students"])["students"][0]["parameters"] == 444


def test_checkpoint_refusals(own, data, tmp_path):
    def run(**settings):
        return job.run(Config(out=str(tmp_path / "out"), data=data, **settings, **SMALL))

    refusal(lambda: run(teacher_checkpoint="x"), "needs the network that it belongs to")
    missing = {"teacher": "ownnets:teacher", "teacher_checkpoint": str(tmp_path / "no")}
    refusal(lambda: run(**missing), "There is no such file")
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"nonsense")
    refusal(lambda: run(teacher="ownnets:teacher", teacher_checkpoint=str(path)), "damaged")
    safetensors.torch.save_file({"head.weight": torch.zeros(2, 2)}, path)
    refusal(
        lambda: run(teacher="ownnets:teacher", teacher_checkpoint=str(path)), "Missing key",
        "another factory",
    )  # fmt: skip


def test_options_of_the_command(monkeypatch):
    calls = []
    monkeypatch.setattr(job, "run", lambda *given: calls.append(given) or {})
    monkeypatch.setattr("fastdistill.distill.ui.summary", lambda *_: None)
    words = "distill --teacher a:b --teacher-checkpoint t --student c:d --student-checkpoint s"
    assert cli.main(words.split()) == 0
    config, explicit, _ = calls[0]
    assert (config.teacher, config.student) == ("a:b", "c:d")
    assert (config.teacher_checkpoint, config.student_checkpoint) == ("t", "s")
    assert set(explicit) == {"teacher", "student", "teacher_checkpoint", "student_checkpoint"}


# ---- The hint -----------------------------------------------------------------------------------


def test_hint_stage_trains_the_lower_layers_by_the_hint_alone(data, tmp_path):
    """After it: nearer to the teacher's middle layer, the layers above it as they started."""
    config = Config(out=str(tmp_path), data=data, **SMALL | {"epochs": 50})
    directory = job.Directory(config.out)
    directory.checkpoints.mkdir(parents=True)
    device = torch.device("cpu")
    bench = workbench.Workbench(config, directory, "run", load(data, 0), device, Listener())
    teacher = bench._teacher().model
    student = models.build(bench.student_architecture, 3)
    before = {k: v.clone() for k, v in student.state_dict().items()}

    def distance():
        """Of the best linear map of the student's features, so that no regressor is needed."""
        a = student.eval().body[:8](bench.test_images).movedim(1, -1).flatten(0, 2)
        b = teacher.eval().body[:8](bench.test_images).movedim(1, -1).flatten(0, 2)
        a = F.pad(a, (0, 1), value=1.0)
        return float((a @ torch.linalg.lstsq(a, b).solution - b).square().mean())

    with torch.no_grad():
        start = distance()
    bench._hint(student, teacher, 3)
    with torch.no_grad():
        assert distance() < 0.9 * start
    assert workbench.hint_epochs(config) == (10, 40)
    changed = {k for k, v in student.named_parameters() if not torch.equal(v, before[k])}
    names = [name.split(".") for name in dict(student.named_parameters())]
    lower = {".".join(name) for name in names if name[0] == "body" and int(name[1]) < 8}
    assert changed == lower and len(lower) == 6


def test_layers_of_the_hint_are_checked(own, data, tmp_path):
    def run(*layers):
        config = Config(
            out=str(tmp_path), data=data, hint_layers=layers, students=("hint_distilled",),
            **NETWORKS, **SMALL,
        )  # fmt: skip
        return job.run(config, ["students"])

    refusal(lambda: run("lo", "low"), "the student has no layer 'lo'; near ones: low")
    refusal(lambda: run("low", "low.0"), "[2, 4, 5, 5] and [2, 24, 10, 10]", "widths may differ")
    refusal(lambda: Config(hint_layers=["a"]), "hint_layers: expected the names of two layers")


def figures_of(plain, hinted, spread=0.1):
    def entry(name, mean, **more):
        return {"name": name, "accuracy_mean": mean, "accuracy_std": spread / 100, "seeds": [0, 1],
                "epochs": 25, "hint_epochs": 0} | more  # fmt: skip

    return entry("hint_distilled", hinted, epochs=20, hint_epochs=5), entry("distilled", plain)


def test_whether_the_hint_helps_is_said_plainly():
    assert "gains 1.0 points" in report._verdict(*figures_of(0.95, 0.96))
    assert "no gain can be claimed" in report._verdict(*figures_of(0.95, 0.96, spread=2))
    assert "does not help here: -1.0 points" in report._verdict(*figures_of(0.96, 0.95))
    assert "5 of its 25 epochs on the hint" in report._verdict(figures_of(0.9, 0.9)[0], None)


# ---- Folders of images --------------------------------------------------------------------------


def folder(path, x, y, names=("bird", "cat", "dog", "zebra"), suffix=".png"):
    for i, (image, label) in enumerate(zip(x, y, strict=True)):
        place = path / names[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{i:04d}{suffix}")
    return str(path)


def test_folder_of_grey_images(tmp_path):
    x, y = blobs(120)
    found = load(folder(tmp_path / "d", x, y), 0)
    assert found.source.classes == 4 and found.train.pixels.shape == (96, 1, 10, 10)
    parts = (found.train, found.test)
    pixels = np.concatenate([part.pixels[:, 0] for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    ours = sorted((p.tobytes(), int(c)) for p, c in zip(pixels, labels, strict=True))
    assert ours == sorted((p.tobytes(), int(c)) for p, c in zip(x, y, strict=True))


def test_folder_with_train_and_test_and_colours(tmp_path):
    x, y = blobs(60)
    tx, ty = blobs(20, seed=1)
    colour = np.stack([x, 255 - x, x // 2], -1)
    folder(tmp_path / "train", colour, y)
    folder(tmp_path / "val", tx, ty)  # grey among coloured ones becomes coloured
    found = load(str(tmp_path), 0)
    assert found.train.pixels.shape == (60, 3, 10, 10) and len(found.test) == 20
    order = np.argsort(y, kind="stable")  # class by class, in the order of the files
    np.testing.assert_array_equal(found.train.pixels, colour[order].transpose(0, 3, 1, 2))
    test = tx[np.argsort(ty, kind="stable")]
    np.testing.assert_array_equal(found.test.pixels, np.stack([test] * 3, 1))


def test_folder_of_images_runs(tmp_path):
    x, y = blobs(80)
    path = folder(tmp_path / "d", x, y, suffix=".jpg")
    small = SMALL | {"epochs": 1, "teacher_epochs": 1, "labelled": 8, "students": ("distilled",)}
    figures = job.run(Config(out=str(tmp_path / "out"), data=path, **small))
    assert figures["data"]["name"] == "d" and figures["data"]["test_images"] == 16


def test_folder_refusals(tmp_path):
    def attempt(path):
        return lambda: load(str(path), 0)

    x, y = blobs(40)
    (tmp_path / "a" / "only").mkdir(parents=True)
    refusal(attempt(tmp_path / "a"), "one folder of images per class; it has 1")
    (tmp_path / "b" / "one").mkdir(parents=True)
    (tmp_path / "b" / "two").mkdir()
    refusal(attempt(tmp_path / "b"), "has no images")
    path = tmp_path / "c"
    folder(path, x, y)
    Image.fromarray(x[0][:8]).save(path / "cat" / "9999.png")
    refusal(attempt(path), "9999.png is 10 x 8 pixels", "0", "one size")
    (path / "cat" / "9999.png").write_bytes(b"no image")
    refusal(attempt(path), "9999.png cannot be read")
    Image.fromarray(np.zeros((10, 10, 4), np.uint8)).save(path / "cat" / "9999.png")
    refusal(attempt(path), "9999.png is transparent")
    Image.fromarray(np.zeros((10, 10), np.uint16)).save(path / "cat" / "9999.png")
    refusal(attempt(path), "9999.png has 16 bits per pixel; expected 8")
    both = tmp_path / "d"
    folder(both / "train", x, y)
    folder(both / "test", x, y, names=("bird", "cow", "dog", "zebra"))
    refusal(attempt(both), "has the classes cow, which have no training images")
    folder(both / "val", x, y)
    refusal(attempt(both), "It has test and val")
    (tmp_path / "e").mkdir()
    refusal(attempt(tmp_path / "e"), "must hold train-images-idx3-ubyte", "found none of them")


def test_folder_shows_what_a_person_sees(tmp_path):
    """No hidden files, no leavings of other programs; pictures as a viewer turns them."""
    x, y = blobs(60)
    for part in ("train", "test"):
        folder(tmp_path / part, x, y)
    for name in (".git", "__MACOSX"):  # beside train and test: they stay what they are
        (tmp_path / name).mkdir()
    (tmp_path / "train" / "cat" / "._0.png").write_bytes(b"resource fork")
    hidden = tmp_path / "train" / "cat" / ".ipynb_checkpoints"
    hidden.mkdir()
    (hidden / "0.png").write_bytes(b"not an image either")
    found = load(str(tmp_path), 0)
    assert found.source.classes == 4 and len(found.train) == len(found.test) == 60

    turned = tmp_path / "turned"
    folder(turned, x, y)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.fromarray(x[0]).save(turned / "bird" / "!.png", exif=exif)
    first = load(str(turned), 0).source.train.pixels[0, 0]
    np.testing.assert_array_equal(first, np.rot90(x[0], -1))


def test_folder_with_a_class_called_train(tmp_path):
    x, y = blobs(60)
    folder(tmp_path, x, y, names=("boat", "bus", "plane", "train"))
    assert load(str(tmp_path), 0).source.classes == 4


def test_folder_passes_nothing_over(tmp_path):
    x, y = blobs(60)

    def attempt(change):
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        change(path)
        return lambda: load(str(path), 0)

    def parts(*names):
        return lambda path: [folder(path / name, x, y) for name in names]

    def classes_and(extra):
        return lambda path: (folder(path, x, y), extra(path))

    refusal(attempt(parts("train", "test", "more")), "Beside train it has more")
    refusal(attempt(parts("train", "training")), "It has train and training")
    picture = Image.fromarray(x[0])
    loose = attempt(classes_and(lambda path: picture.save(path / "0.png")))
    refusal(loose, "has images beside the folders of its classes: 0.png")
    empty = attempt(classes_and(lambda path: (path / "cow").mkdir()))
    refusal(empty, "cow has no images", "Add some, or remove the folder")
    several = {"save_all": True, "append_images": [Image.fromarray(x[1])]}
    frames = attempt(classes_and(lambda path: picture.save(path / "cat" / "a.tiff", **several)))
    refusal(frames, "a.tiff holds 2 images")
    nowhere = attempt(classes_and(lambda path: (path / "cat" / "l.png").symlink_to("nowhere")))
    refusal(nowhere, "l.png cannot be read")


def test_folder_with_a_picture_too_large_to_open(tmp_path, monkeypatch):
    x, y = blobs(40)
    folder(tmp_path, x, y)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    refusal(lambda: load(str(tmp_path), 0), "cannot be read: Image size (100 pixels) exceeds")


def test_pixels_may_stay_as_they_are(own, data, tmp_path):
    config = Config(
        out=str(tmp_path), data=data, normalise=False, students=("distilled",),
        **SMALL | {"epochs": 1, "teacher_epochs": 1},
    )  # fmt: skip
    job.run(config, ["students"])
    _, about = store.load(tmp_path / "checkpoints" / "teacher.safetensors")
    assert about["normalisation"] == {"mean": [0.0], "std": [1.0]}
    assert json.loads((tmp_path / "job.json").read_text())["settings"]["normalise"] is False
