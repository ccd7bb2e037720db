"""The whole job on synthetic images: its files, its rules for resuming, and `evaluate`."""

import csv
import json
import shutil
from html.parser import HTMLParser

import pytest
import torch
from test_distill_data import FAINT, blobs, npz, refusal

import fastdistill
from fastdistill.distill import job, models, plots, report, speed, store, workbench
from fastdistill.distill.config import Config
from fastdistill.distill.directory import OUTPUTS, Directory
from fastdistill.distill.evaluate import evaluate
from fastdistill.distill.listener import Listener

SMALL = {
    "seeds": 2, "epochs": 3, "teacher_epochs": 3, "batch_size": 16, "labelled": 24, "device": "cpu",
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def no_report(monkeypatch):
    """Only the figures that `job.run` returns: drawing takes longer than the tiny trainings."""
    monkeypatch.setattr(report, "write", lambda outcome, figures: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    x, y = blobs(400, contrast=FAINT)
    return npz(tmp_path_factory.mktemp("data") / "blobs.npz", x=x, y=y)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """A finished job: (config, figures)."""
    config = Config(out=str(tmp_path_factory.mktemp("job") / "new" / "out"), data=data, **SMALL)
    return config, job.run(config)


class Recorder(Listener):
    """Keeps what was said; stops the job like Ctrl-C when `network` has made `epoch` epochs."""

    def __init__(self, network=None, epoch=None):
        self.said, self.trained = [], []
        self.stop = (network, epoch)

    def say(self, text):
        self.said.append(text)

    def progress(self, network, epochs, curve):
        self.trained.append((network, len(curve)))
        if (network, len(curve)) == self.stop:
            raise KeyboardInterrupt


def accuracies(figures):
    return figures["teacher"]["accuracy"], [s["accuracies"] for s in figures["students"]]


def files(config):
    return Directory(config.out).path


def test_results_json(finished):
    config, figures = finished
    written = json.loads((files(config) / "results.json").read_text())
    assert written == figures
    teacher, students = written["teacher"], written["students"]
    assert 0.7 < teacher["accuracy"] < 1  # so that figures that must be equal say something
    assert teacher["parameters"] == models.parameters(models.build(models.teacher(1, 10, 10, 4), 0))
    assert [s["name"] for s in students] == ["labels_only", "distilled", "both", "hint_distilled"]
    assert [s["labelled"] for s in students] == [24, 0, 24, 0]
    assert [s["epochs"] for s in students] == [3, 3, 3, 2]
    assert [s["hint_epochs"] for s in students] == [0, 0, 0, 1]
    for s in students:
        assert s["seeds"] == [0, 1] and len(s["accuracies"]) == len(s["agreements"]) == 2
        for key in ("accuracy", "agreement"):
            values = s["accuracies" if key == "accuracy" else "agreements"]
            assert all(0 <= v <= 1 and (80 * v).is_integer() for v in values)  # 80 test images
            a, b = values
            assert s[f"{key}_mean"] == pytest.approx((a + b) / 2)
            assert s[f"{key}_std"] == pytest.approx(abs(a - b) / 2**0.5)  # ddof = 1
        assert s["compression"] == pytest.approx(teacher["parameters"] / s["parameters"])
        assert s["speed_up"] == written["inference"]["speed_up"] > 0
    assert written["data"]["train_images"] == 320 and written["data"]["test_images"] == 80
    assert written["environment"]["torch"] == torch.__version__
    assert written["environment"]["device"] == "cpu"
    assert written["settings"]["backend"] in ("cpu", "reference")  # what "auto" meant
    assert written["settings"]["temperature"] == 4.0
    assert "licence" in written["data"] and "no pretrained" in written["models"]


def test_distilled_students_learned_without_labels(finished):
    _, figures = finished
    distilled = next(s for s in figures["students"] if s["name"] == "distilled")
    assert min(distilled["accuracies"]) > 0.6  # chance is 0.25


def test_csv(finished):
    config, figures = finished
    with open(files(config) / "students.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["name"], r["seed"]) for r in rows] == [
        (name, seed) for name in config.students for seed in "01"
    ]
    assert [float(r["accuracy"]) for r in rows] == [
        a for s in figures["students"] for a in s["accuracies"]
    ]
    with open(files(config) / "curves.csv", newline="") as file:
        curves = list(csv.DictReader(file))
    assert len(curves) == 3 + 6 * 3 + 2 * 2
    last = [r for r in curves if (r["name"], r["seed"], r["epoch"]) == ("both", "1", "3")]
    assert float(last[0]["accuracy"]) == figures["students"][2]["accuracies"][1]
    assert curves[0]["name"] == "teacher" and curves[0]["agreement"] == ""


def test_agreement_by_class_adds_up(tmp_path, data, monkeypatch):
    outcomes = []
    monkeypatch.setattr(report, "write", lambda outcome, figures: outcomes.append(outcome))
    figures = job.run(Config(out=str(tmp_path), data=data, **SMALL))
    names, table = plots.agreement_by_class(outcomes[0])
    assert names == ["labels_only", "distilled", "both", "hint_distilled"]
    assert table.shape == (4, 4)
    counts = outcomes[0].teacher.test_logits.argmax(1).bincount(minlength=4).numpy()
    for row, student in zip(table, figures["students"], strict=True):
        assert (row * counts).sum() / 80 == pytest.approx(student["agreement_mean"])
        assert len(set(row)) > 1


@pytest.mark.parametrize("name", [n for n in OUTPUTS if n.endswith(".png")])
def test_plots_show_something(finished, name):
    from matplotlib.image import imread

    data = (files(finished[0]) / name).read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    pixels = imread(files(finished[0]) / name)
    assert pixels.shape[0] > 300 and pixels.shape[1] > 1000
    assert len({tuple(p) for p in pixels[::3, ::3].reshape(-1, pixels.shape[2])}) > 20


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.tags, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.found += [v for k, v in attributes if k in ("src", "href", "srcset", "action", "data")]

    def handle_data(self, data):
        self.text += data


def test_report_needs_no_other_file(finished):
    config, figures = finished
    text = (files(config) / "report.html").read_text(encoding="utf-8")
    page = Links()
    page.feed(text)
    assert len(page.found) == 3
    assert all(link.startswith("data:image/png;base64,") for link in page.found)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in text and "@import" not in text
    for row in report.table(figures):
        for cell in row:
            assert cell in page.text
    assert figures["data"]["licence"] in page.text


def test_report_escapes_names(finished):
    figures = json.loads(json.dumps(finished[1]))
    figures["data"]["name"] = "<script>alert(1)</script> & co.npz"
    page = report.page(figures, {})
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_only_the_files_announced_are_left(finished):
    config, _ = finished
    names = {p.name for p in files(config).iterdir()}
    assert names == {*OUTPUTS, "job.json", "checkpoints"}
    kept = {p.name for p in (files(config) / "checkpoints").iterdir()}
    students = {f"{kind}-seed{seed}.safetensors" for kind in config.students for seed in (0, 1)}
    assert kept == students | {".lock", "teacher.safetensors", "teacher-logits.safetensors"}


@pytest.mark.usefixtures("no_report")
def test_same_seed_same_figures_other_seed_other_networks(finished, tmp_path, data):
    config, figures = finished
    again = job.run(Config(out=str(tmp_path / "a"), data=data, **SMALL))
    assert accuracies(again) == accuracies(figures)
    tensors = [
        store.load(Directory(out).checkpoints / "both-seed1.safetensors")[0]
        for out in (config.out, str(tmp_path / "a"))
    ]
    assert all(torch.equal(tensors[0][k], tensors[1][k]) for k in tensors[0])
    other = Config(out=str(tmp_path / "b"), data=data, **SMALL, seed=7, students=("distilled",))
    student = job.run(other)["students"][0]
    assert student["seeds"] == [7, 8]
    found = evaluate(str(Directory(other.out).checkpoints / "distilled-seed8.safetensors"))
    assert found.accuracy == student["accuracies"][1]  # on the test images of split seed 7
    theirs = store.load(Directory(other.out).checkpoints / "teacher.safetensors")[0]
    ours = store.load(Directory(config.out).checkpoints / "teacher.safetensors")[0]
    assert not torch.equal(theirs["head.weight"], ours["head.weight"])


@pytest.mark.parametrize(
    "moment", [("teacher", 0), ("teacher", 2), ("labels_only-seed1", 0), ("distilled-seed0", 1),
               ("both-seed1", 3), ("hint_distilled-seed0.hint", 0),
               ("hint_distilled-seed0.hint", 1), ("hint_distilled-seed1", 1)],
)  # fmt: skip
@pytest.mark.usefixtures("no_report")
def test_resume_gives_the_same_figures(finished, tmp_path, data, moment):
    _, figures = finished
    config = Config(out=str(tmp_path), data=data, **SMALL)
    with pytest.raises(KeyboardInterrupt):
        job.run(config, listener=Recorder(*moment))
    rest = Recorder()
    again = job.run(Config(out=str(tmp_path), resume=True), ["out", "resume"], rest)
    assert accuracies(again) == accuracies(figures)
    assert [s["agreements"] for s in again["students"]] == [
        s["agreements"] for s in figures["students"]
    ]
    assert rest.said == [f"Continuing the run in {tmp_path}."]
    first = rest.trained.index(moment)  # it goes on there; before it, finished networks only
    before = rest.trained[:first]
    assert all(count == (2 if "hint" in name else 3) for name, count in before)


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished job, to be changed: (directory, figures)."""
    config, figures = finished
    return shutil.copytree(config.out, tmp_path / "copy"), figures


def test_resume_of_a_finished_job_trains_nothing(copied):
    out, figures = copied
    recorder = Recorder()
    again = job.run(Config(out=str(out), resume=True), ["out", "resume"], recorder)
    assert accuracies(again) == accuracies(figures)
    assert [count for _, count in recorder.trained] == [3] * 7 + [2] * 2


def test_resume_with_nothing_there_starts(tmp_path, data):
    recorder = Recorder("teacher", 1)
    config = Config(out=str(tmp_path / "new"), data=data, resume=True, **SMALL)
    with pytest.raises(KeyboardInterrupt):
        job.run(config, listener=recorder)
    assert recorder.said[0].startswith("Nothing to resume in ")


def test_resume_with_other_settings_is_refused(copied, tmp_path, data):
    out, figures = copied
    before = (out / "results.json").read_bytes()

    def resume(**changes):
        return job.run(Config(out=str(out), resume=True, **changes), changes)

    text = refusal(
        lambda: resume(seed=1, epochs=9, temperature=2.0, seeds=2),
        "cannot be resumed", "seed: 0 in the earlier run, now 1",
        "epochs: 3 in the earlier run, now 9", "temperature: 4.0 in the earlier run, now 2.0",
    )  # fmt: skip
    assert "seeds" not in text  # that one agrees
    refusal(lambda: resume(labelled=25), "labelled: 24 in the earlier run, now 25")
    refusal(lambda: resume(students=["both"]), "students: ['labels_only', 'distilled', 'both', 'h")
    x, y = blobs(400, seed=1, contrast=FAINT)
    other = npz(tmp_path / "other.npz", x=x, y=y)
    refusal(lambda: resume(data=other), f"data: {data} in the earlier run, now {other}")
    assert (out / "results.json").read_bytes() == before
    x, y = blobs(400, contrast=FAINT)  # the same data elsewhere are the same data
    moved = npz(tmp_path / "moved.npz", x=x, y=y)
    assert accuracies(resume(data=moved, device="cpu")) == accuracies(figures)


def test_resume_keeps_what_auto_meant(copied, monkeypatch):
    out, figures = copied
    manifest = json.loads((out / "job.json").read_text())
    assert manifest["settings"]["backend"] == figures["settings"]["backend"] != "auto"
    manifest["settings"]["backend"] = "triton"  # which does not run on a CPU
    (out / "job.json").write_text(json.dumps(manifest))
    refusal(
        lambda: job.run(Config(out=str(out), resume=True, backend="reference"), ["backend"]),
        "backend: triton in the earlier run, now reference",
    )
    monkeypatch.setenv("FASTDISTILL_BACKEND", "reference")
    refusal(
        lambda: job.run(Config(out=str(out), resume=True), ["resume"]),
        "The backend triton of kd_loss cannot be used on cpu",
    )


def test_resume_with_changed_file_is_refused(tmp_path):
    x, y = blobs(100)
    data = npz(tmp_path / "d.npz", x=x, y=y)
    config = Config(out=str(tmp_path / "out"), data=data, **SMALL)
    with pytest.raises(KeyboardInterrupt):
        job.run(config, listener=Recorder("teacher", 1))
    npz(tmp_path / "d.npz", x=x ^ 1, y=y)
    refusal(lambda: job.run(Config(out=config.out, resume=True), ["resume"]), "has changed")


def test_resume_keeps_the_threads_and_tells_of_versions(tmp_path, data):
    config = Config(out=str(tmp_path), data=data, **SMALL)
    with pytest.raises(KeyboardInterrupt):
        job.run(config, listener=Recorder("teacher", 1))
    manifest = json.loads((tmp_path / "job.json").read_text())
    manifest["versions"]["torch"] = "1.0"
    manifest["threads"] = threads = torch.get_num_threads() + 1
    (tmp_path / "job.json").write_text(json.dumps(manifest))

    class Threads(Recorder):
        def progress(self, network, epochs, curve):
            self.threads = torch.get_num_threads()
            super().progress(network, epochs, curve)

    recorder = Threads("teacher", 2)
    with pytest.raises(KeyboardInterrupt):
        job.run(Config(out=str(tmp_path), resume=True), listener=recorder)
    assert recorder.threads == threads and torch.get_num_threads() == threads - 1
    assert f"Using {threads} threads, as the interrupted run did." in recorder.said
    assert f"Note: the run began with torch 1.0; this is {torch.__version__}." in recorder.said


def test_starting_over_replaces_own_files_only(tmp_path, data):
    small = SMALL | {"seeds": 1, "epochs": 1, "teacher_epochs": 1}
    first = Config(out=str(tmp_path), data=data, **small)
    job.run(first)
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    foreign = tmp_path / "checkpoints" / "mine.safetensors"
    foreign.write_bytes(b"not even a safetensors file")
    old = json.loads((tmp_path / "job.json").read_text())["run"]
    recorder = Recorder("distilled-seed3", 0)
    second = Config(out=str(tmp_path), data=data, **small | {"students": ["distilled"], "seed": 3})
    with pytest.raises(KeyboardInterrupt):
        job.run(second, listener=recorder)
    assert recorder.said == [f"Starting over: replacing the earlier run in {tmp_path}."]
    assert recorder.trained[:2] == [("teacher", 0), ("teacher", 1)]  # not taken from the first
    left = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {"job.json", ".lock", "notes.txt", "mine.safetensors", "teacher.safetensors",
                    "teacher-logits.safetensors"}  # fmt: skip
    assert notes.read_text() == "mine" and foreign.read_bytes() == b"not even a safetensors file"
    assert json.loads((tmp_path / "job.json").read_text())["run"] != old


@pytest.mark.usefixtures("no_report")
def test_checkpoints_of_an_earlier_job_are_not_mistaken(tmp_path, data):
    """A kill between the new manifest and the removal of old checkpoints."""
    small = SMALL | {"seeds": 1, "epochs": 1, "teacher_epochs": 1, "students": ["distilled"]}
    config = Config(out=str(tmp_path), data=data, **small)
    job.run(config)
    manifest = json.loads((tmp_path / "job.json").read_text())
    (tmp_path / "job.json").write_text(json.dumps(manifest | {"run": "another"}))
    recorder = Recorder()
    job.run(Config(out=str(tmp_path), resume=True), listener=recorder)
    assert recorder.trained == [
        ("teacher", 0), ("teacher", 1), ("distilled-seed0", 0), ("distilled-seed0", 1),
    ]  # fmt: skip


def test_foreign_files_in_the_way_are_refused(tmp_path, data):
    (tmp_path / "results.json").write_text("{}")
    config = Config(out=str(tmp_path), data=data, **SMALL)
    refusal(lambda: job.run(config), "holds results.json", "no job wrote them", "--out")
    assert (tmp_path / "results.json").read_text() == "{}"


def test_directory_refusals(tmp_path, data):
    config = Config(out=str(tmp_path / "out"), data=data, **SMALL)
    (tmp_path / "out").write_text("a file")
    refusal(lambda: job.run(config), "cannot be used", "--out")
    (tmp_path / "out").unlink()
    with Directory(config.out).locked():
        refusal(lambda: job.run(config), "Another fastdistill distill is at work")
    for damage in ("{", "[]", '{"format": 99, "settings": {}}', '{"format": 1}'):
        (tmp_path / "out" / "job.json").write_text(damage)
        refusal(lambda: job.run(config), "not the record of a fastdistill job")


def test_damaged_checkpoint_is_told(tmp_path, data):
    config = Config(out=str(tmp_path), data=data, **SMALL)
    with pytest.raises(KeyboardInterrupt):
        job.run(config, listener=Recorder("labels_only-seed0", 0))
    teacher = tmp_path / "checkpoints" / "teacher.safetensors"
    teacher.write_bytes(teacher.read_bytes()[:1000])
    resume = Config(out=str(tmp_path), resume=True)
    refusal(lambda: job.run(resume), str(teacher), "damaged", "Delete it")
    teacher.unlink()  # the next step that was named works
    with pytest.raises(KeyboardInterrupt):
        job.run(resume, listener=Recorder("labels_only-seed0", 0))


def test_too_many_labels_asked_for(tmp_path, data):
    config = Config(out=str(tmp_path), data=data, labelled=321)
    refusal(lambda: job.run(config), "labelled: 321 images asked for, 320 to train")


def test_device_and_backend_refusals(tmp_path, data, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = Config(out=str(tmp_path / "a"), data=data, device="cuda")
    refusal(lambda: job.run(config), "no CUDA device", "--device")
    config = Config(out=str(tmp_path / "b"), data=data, device="cpu", backend="cuda")
    refusal(lambda: job.run(config), "backend cuda of kd_loss", "--backend reference")
    assert not (tmp_path / "b" / "job.json").exists()


def test_lack_of_memory_is_told(tmp_path, data, monkeypatch):
    def exhausted(self):
        raise torch.OutOfMemoryError("tried to allocate 9 GiB\nand a page of details")

    monkeypatch.setattr(workbench.Workbench, "train_all", exhausted)
    config = Config(out=str(tmp_path), data=data, **SMALL)
    text = refusal(lambda: job.run(config), "memory of cpu", "allocate 9 GiB", "batch_size")
    assert "details" not in text


@pytest.mark.usefixtures("no_report")
def test_backend_option_reaches_kd_loss(tmp_path, data, monkeypatch):
    from fastdistill import _backend

    asked = set()
    real = fastdistill.kd_loss
    monkeypatch.setattr(
        fastdistill, "kd_loss", lambda *a, **k: (asked.add(_backend.requested()), real(*a, **k))[1]
    )
    small = SMALL | {"seeds": 1, "epochs": 1, "teacher_epochs": 1, "students": ["both"]}
    figures = job.run(Config(out=str(tmp_path), data=data, backend="reference", **small))
    assert asked == {"reference"}
    assert figures["settings"]["backend"] == "reference"


def test_one_seed_has_no_spread(tmp_path, data):
    small = SMALL | {"seeds": 1, "epochs": 1, "teacher_epochs": 1, "students": ["both"]}
    figures = job.run(Config(out=str(tmp_path), data=data, **small))
    assert figures["students"][0]["accuracy_std"] is None
    assert "±" not in "".join(report.table(figures)[1])
    assert "NaN" not in (tmp_path / "results.json").read_text()


@pytest.mark.usefixtures("no_report")
def test_colour_images_of_another_size(tmp_path):
    x, y = blobs(60, classes=3, side=12)
    colour = torch.from_numpy(x)[:, None].repeat(1, 3, 1, 1).numpy()[:, :, :, :9]
    data = npz(tmp_path / "c.npz", x=colour, y=y, x_test=colour[:9], y_test=y[:9])
    small = SMALL | {"seeds": 1, "epochs": 1, "teacher_epochs": 1, "labelled": None}
    figures = job.run(Config(out=str(tmp_path / "out"), data=data, **small))
    assert figures["data"]["image_shape"] == [3, 12, 9]
    assert figures["students"][0]["labelled"] == 60 // 8
    found = evaluate(str(tmp_path / "out" / "checkpoints" / "both-seed0.safetensors"))
    assert found.total == 9 and "its test images" in found.data


@pytest.mark.parametrize(
    "name",
    ["teacher", "labels_only-seed1", "distilled-seed0", "both-seed1", "hint_distilled-seed1"],
)
def test_evaluate_repeats_the_results(finished, name, tmp_path):
    config, figures = finished
    found = evaluate(str(files(config) / "checkpoints" / f"{name}.safetensors"))
    if name == "teacher":
        expected = figures["teacher"]
        accuracy = expected["accuracy"]
    else:
        kind, seed = name.split("-seed")
        expected = next(s for s in figures["students"] if s["name"] == kind)
        accuracy = expected["accuracies"][int(seed)]
    assert (found.name, found.accuracy, found.total) == (name, accuracy, 80)
    assert found.parameters == expected["parameters"]


def test_evaluate_needs_the_checkpoint_alone(finished, tmp_path):
    """In an empty directory, with the data from elsewhere: the held-out images are known again."""
    config, figures = finished
    copy = tmp_path / "net.safetensors"
    copy.write_bytes((files(config) / "checkpoints" / "distilled-seed0.safetensors").read_bytes())
    x, y = blobs(400, contrast=FAINT)
    found = evaluate(str(copy), npz(tmp_path / "moved.npz", images=x, labels=y))
    assert found.accuracy == figures["students"][1]["accuracies"][0] and found.total == 80
    x, y = blobs(
        60, seed=9, contrast=FAINT
    )  # other data without a test part: all of them are new to the network
    other = evaluate(str(copy), npz(tmp_path / "other.npz", x=x, y=y))
    assert other.total == 60 and other.accuracy > 0.5


def test_evaluate_refusals(finished, tmp_path):
    folder = files(finished[0]) / "checkpoints"
    good = str(folder / "both-seed0.safetensors")
    refusal(lambda: evaluate(str(tmp_path / "no.safetensors")), "no such file")
    refusal(lambda: evaluate(str(folder / "teacher-logits.safetensors")), "holds a logits")
    x, y = blobs(40, side=12)
    larger = npz(tmp_path / "a.npz", x=x, y=y)
    refusal(lambda: evaluate(good, larger), "[1, 12, 12]", "[1, 10, 10]")
    x, y = blobs(40, classes=5)
    refusal(lambda: evaluate(good, npz(tmp_path / "b.npz", x=x, y=y)), "classes 0..3")
    tensors, about = store.load(folder / "both-seed0.safetensors")
    bad = tmp_path / "bad.safetensors"
    about["architecture"]["stages"] = [4]
    store.save(bad, tensors, about)
    refusal(lambda: evaluate(str(bad)), "does not describe its tensors")
    del about["architecture"]
    store.save(bad, tensors, about)
    refusal(lambda: evaluate(str(bad)), "does not describe its tensors")


def test_speed_is_measured_in_turns():
    turns = []

    class Sleeper(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            assert torch.is_inference_mode_enabled() and not self.training
            turns.append(self.name)
            for _ in range(40 if self.name == "slow" else 1):
                x = x @ x
            return x

    found = speed.compare(Sleeper("slow"), Sleeper("fast"), torch.eye(64).repeat(300, 1, 1))
    assert turns == ["slow", "fast"] * (len(turns) // 2)
    assert found["batch_size"] == 256 and found["repeats"] >= speed.FEWEST_REPEATS
    assert found["speed_up"] == found["teacher_ms"] / found["student_ms"] > 5


def test_summary_fits_a_narrow_terminal(finished, capsys, monkeypatch):
    from fastdistill.distill import ui

    monkeypatch.setenv("COLUMNS", "80")
    ui.summary(finished[1], "some/where")
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    for row in report.table(finished[1]):
        assert any(line.split() == " ".join(row).split() for line in lines), row
    assert "some/where/report.html" in out
