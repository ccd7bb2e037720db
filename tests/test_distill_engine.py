"""The engine: it learns, from what it may see only, and continues as if it had not stopped."""

import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_distill_data import blobs, refusal

import fastdistill
from fastdistill.distill import engine, models, objectives, store
from fastdistill.distill.errors import JobError
from fastdistill.distill.snapshot import Snapshot
from fastdistill.distill.workbench import draw_labelled, share


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The images are tiny; on a busy machine two threads wait for each other at every step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world():
    """Training and test images with labels, and a trained teacher's logits of the former."""
    x, y = blobs(400)
    images = torch.from_numpy(x).float()[:, None] / 255 - 0.4
    labels = torch.from_numpy(y)
    train, test = slice(0, 320), slice(320, None)

    class World:
        pass

    w = World()
    w.images, w.labels, w.test, w.truth = images[train], labels[train], images[test], labels[test]
    w.rows = torch.arange(320)
    w.teacher = models.build(models.teacher(1, 10, 10, 4), 0)
    fit(w, w.teacher, objectives.labels_only(w.labels), epochs=4)
    w.logits = engine.logits(w.teacher, w.images)
    return w


class Memory:
    """A snapshot that forgets: for runs that are not interrupted."""

    def load(self, *_):
        return []

    def save(self, *_):
        pass


def fit(w, model, loss, *, epochs=6, rows=None, snapshot=None, after=lambda curve: None, shift=0):
    """Train on the world's images; the curve."""
    recipe = engine.Recipe(epochs, batch_size=16, learning_rate=0.01, seed=1, shift=shift)
    return engine.train(
        model,
        w.images,
        w.rows if rows is None else rows,
        loss,
        recipe,
        snapshot=snapshot or Memory(),
        measure=lambda m: {"accuracy": accuracy(w, m)},
        after_epoch=after,
    )


def accuracy(w, model):
    return share(engine.logits(model, w.test).argmax(1), w.truth)


def student(seed=0):
    return models.build(models.student(1, 10, 10, 4), seed)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_student_without_labels_learns_from_the_teacher(world):
    assert accuracy(world, world.teacher) > 0.9
    model = student()
    before = accuracy(world, model)
    curve = fit(world, model, objectives.distilled(world.logits, 4.0))
    assert before < 0.5 < 0.85 < accuracy(world, model)  # chance is 0.25
    assert curve[-1]["loss"] < 0.2 * curve[0]["loss"]
    assert [entry["epoch"] for entry in curve] == [1, 2, 3, 4, 5, 6]


def test_student_repeats_a_teacher_that_is_wrong(world):
    """It learns what the teacher says, not what the images show or the labels would say."""
    model = student()
    fit(world, model, objectives.distilled(world.logits.roll(1, dims=1), 4.0))
    says = engine.logits(model, world.test).argmax(1)
    assert share(says, (world.truth + 1) % 4) > 0.85


@pytest.mark.parametrize("kind", ["labels_only", "both"])
def test_hidden_labels_are_never_used(world, kind):
    visible = draw_labelled(40, 320, seed=0)
    corrupt = (world.labels + 1) % 4
    corrupt[visible] = world.labels[visible]
    assert not torch.equal(corrupt, world.labels)
    ends = []
    for labels in (world.labels, corrupt):
        hidden, model = objectives.hide(labels, visible), student()
        if kind == "both":
            fit(world, model, objectives.both(world.logits, hidden, 4.0), epochs=2)
        else:
            fit(world, model, objectives.labels_only(hidden), epochs=2, rows=visible)
        ends.append(model.state_dict())
    assert same(*ends)
    model, wrong = student(), objectives.hide((world.labels + 1) % 4, visible)
    if kind == "both":
        fit(world, model, objectives.both(world.logits, wrong, 4.0), epochs=2)
    else:
        fit(world, model, objectives.labels_only(wrong), epochs=2, rows=visible)
    assert not same(ends[0], model.state_dict())  # whereas the visible ones are


def test_hide_and_draw():
    labels = torch.arange(50) % 5
    visible = draw_labelled(10, 50, seed=3)
    hidden = objectives.hide(labels, visible)
    assert (hidden == objectives.HIDDEN).sum() == 40
    torch.testing.assert_close(hidden[visible], labels[visible])
    assert len(visible.unique()) == 10
    assert torch.equal(visible, draw_labelled(10, 50, seed=3))
    assert not torch.equal(visible, draw_labelled(10, 50, seed=4))


@pytest.mark.parametrize("labelled", [0, 3, 8])
def test_both_is_the_sum_of_two_textbook_terms(labelled):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    labels = objectives.hide(torch.arange(8) % 5, torch.arange(labelled))
    value = objectives.both(teacher, labels, 4.0)(logits, torch.arange(8))
    (gradient,) = torch.autograd.grad(value, logits)
    soft = 16 * F.kl_div(
        F.log_softmax(logits / 4, 1), F.log_softmax(teacher / 4, 1),
        reduction="batchmean", log_target=True,
    )  # fmt: skip
    hard = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / 8
    (expected,) = torch.autograd.grad(soft + hard, logits)
    torch.testing.assert_close(value, soft + hard)
    torch.testing.assert_close(gradient, expected)


def test_distillation_goes_through_kd_loss(world, monkeypatch):
    calls = []
    real = fastdistill.kd_loss
    monkeypatch.setattr(
        fastdistill, "kd_loss", lambda *a, **k: (calls.append(k["temperature"]), real(*a, **k))[1]
    )
    fit(world, student(), objectives.distilled(world.logits, 2.5), epochs=1)
    assert calls == [2.5] * 20


class Stop(Exception):
    pass


def stop_at(epoch):
    def after(curve):
        if len(curve) == epoch:
            raise Stop

    return after


@pytest.mark.parametrize("epoch", [0, 1, 3, 4])
def test_resumed_training_is_bit_identical(world, tmp_path, epoch):
    loss = objectives.distilled(world.logits, 4.0)
    whole = student()
    expected = fit(world, whole, loss, epochs=4, shift=1)
    snapshot = Snapshot(tmp_path / "s.safetensors", run="r")
    with pytest.raises(Stop):
        fit(world, student(), loss, epochs=4, shift=1, snapshot=snapshot, after=stop_at(epoch))
    torch.manual_seed(99)  # whatever the next process draws must not matter
    model = student(seed=5)  # nor what it starts from, if there is a state
    curve = fit(world, model if epoch else student(), loss, epochs=4, shift=1, snapshot=snapshot)
    if epoch:
        assert same(whole.state_dict(), model.state_dict())
    assert [{**e, "seconds": 0} for e in curve] == [{**e, "seconds": 0} for e in expected]


def test_seed_decides_order_and_start(world):
    loss = objectives.distilled(world.logits, 4.0)
    a, b = student(), student()
    state = torch.get_rng_state()
    fit(world, a, loss, epochs=1)
    fit(world, b, loss, epochs=1)
    assert same(a.state_dict(), b.state_dict())
    assert torch.equal(state, torch.get_rng_state())  # the caller's random state is untouched
    assert not same(student(0).state_dict(), student(1).state_dict())


def test_snapshot_of_another_job_is_ignored(world, tmp_path):
    path = tmp_path / "s.safetensors"
    loss = objectives.distilled(world.logits, 4.0)
    fit(world, student(), loss, epochs=1, snapshot=Snapshot(path, "old"))
    assert path.exists()
    curve = fit(world, student(), loss, epochs=1, snapshot=Snapshot(path, "new"))
    assert len(curve) == 1
    assert json.loads(json.dumps(store.load(path)[1]))["run"] == "new"


def test_snapshot_of_another_network_is_refused(world, tmp_path):
    snapshot = Snapshot(tmp_path / "s.safetensors", "r")
    loss = objectives.distilled(world.logits, 4.0)
    fit(world, student(), loss, epochs=1, snapshot=snapshot)
    refusal(
        lambda: fit(world, world.teacher, loss, epochs=2, snapshot=snapshot),
        "does not fit this network", "size mismatch",
    )  # fmt: skip


def test_divergence_is_said(world):
    refusal(
        lambda: fit(world, student(), lambda logits, rows: logits.sum() * float("nan")),
        "diverged", "epoch 1 is nan", "smaller learning_rate than 0.01",
    )  # fmt: skip


def test_epoch_draws_every_row_before_any_twice():
    rows = torch.tensor([3, 5, 8])
    drawn = engine._draw(rows, 8, torch.Generator().manual_seed(0))
    assert len(drawn) == 8
    for part in (drawn[:3], drawn[3:6]):
        assert sorted(part.tolist()) == [3, 5, 8]


def test_shift_moves_each_image_by_its_own_whole_pixels():
    images = torch.zeros(64, 2, 9, 9)
    images[:, :, 4, 4] = torch.arange(1, 129).view(64, 2).float()
    moved = engine._shift(images, 2, torch.Generator().manual_seed(0))
    places = moved[:, 0].flatten(1).argmax(1)
    assert moved.shape == images.shape
    torch.testing.assert_close(moved.sum((2, 3)), images.sum((2, 3)))
    assert len(places.unique()) > 12  # of the 25 possible
    rows, columns = places // 9, places % 9
    assert rows.min() == 2 and rows.max() == 6 and columns.min() == 2 and columns.max() == 6


def test_schedule_warms_up_then_falls_to_zero():
    values = [engine.schedule(step / 1000) for step in range(1000)]
    peak = int(np.argmax(values))
    assert values[0] == pytest.approx(0.04) and values[peak] == pytest.approx(1)
    assert values[:peak] == sorted(values[:peak])
    assert values[peak:] == sorted(values[peak:], reverse=True)
    assert values[-1] < 1e-4


@pytest.mark.parametrize("size", [(1, 28, 28, 10), (3, 32, 32, 7), (1, 4, 4, 2), (2, 5, 60, 3)])
def test_networks_fit_other_images(size):
    channels, height, width, classes = size
    for make in (models.teacher, models.student):
        architecture = make(*size)
        model = models.build(architecture, 0)
        assert model(torch.randn(2, channels, height, width)).shape == (2, classes)
        text = json.dumps(architecture.to_json())
        assert models.Architecture.from_json(json.loads(text)) == architecture


def test_default_sizes():
    size = (1, 28, 28, 10)
    teacher, small = (models.parameters(models.build(m(*size), 0))
                      for m in (models.teacher, models.student))  # fmt: skip
    assert (teacher, small) == (241_770, 6_274)  # the numbers that the docstrings state


def test_write_atomic_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "f"
    store.write_atomic(path, b"old")

    def fail(*_):
        raise KeyboardInterrupt

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(KeyboardInterrupt):
                store.write_atomic(path, b"new")
        assert [p.name for p in tmp_path.iterdir()] == ["f"]
        assert path.read_bytes() == b"old"
    store.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"


def test_write_atomic_flushes_before_it_renames(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b))[1])
    store.write_atomic(tmp_path / "f", b"x")
    assert order[:2] == ["fsync", "replace"]


def test_store_round_trip_and_refusals(tmp_path):
    path = tmp_path / "c.safetensors"
    tensors = {"a": torch.randn(3, 4).t(), "b": torch.tensor(7), "c": torch.zeros(0, 2)}
    about = {"curve": [{"loss": 0.1 + 0.2}], "name": "ü"}
    store.save(path, tensors, about)
    again, read = store.load(path)
    assert read == about and same(tensors, again)
    path.write_bytes(path.read_bytes()[:-1])
    refusal(lambda: store.load(path), "damaged", "--resume")
    path.write_bytes(b"")
    refusal(lambda: store.load(path), "damaged")
    refusal(lambda: store.load(tmp_path / "absent"), "no such file")
    import safetensors.torch

    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    refusal(lambda: store.load(path), "fastdistill did not write it")
    with pytest.raises(JobError):
        store.load(tmp_path)
