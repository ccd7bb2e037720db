"""Real processes, really killed: SIGKILL at many moments, Ctrl-C, a full disk."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_distill_data import FAINT, blobs, npz

ROOT = Path(__file__).resolve().parents[1]

CONFIG = """
data: {data}
device: cpu
seeds: 2
epochs: 4
teacher_epochs: 5
batch_size: 16
labelled: 24
"""

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    x, y = blobs(400, contrast=FAINT)
    data = npz(folder / "blobs.npz", x=x, y=y)
    (folder / "job.yaml").write_text(CONFIG.format(data=data))
    return folder / "job.yaml"


def start(*arguments, **options):
    """The command in a process of its own, on one thread: the images are tiny."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", "fastdistill", "distill", *map(str, arguments)],
        **options,
        env=os.environ | {"PYTHONPATH": path, "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Its exit code, standard output and standard error."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_for(process, path):
    """Until the file is there; the process must still be at work then."""
    until = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.001)


def figures(out):
    """What must be equal, interrupted or not: all but times and the environment."""
    found = json.loads((out / "results.json").read_text())
    keep = ("name", "accuracy_mean", "accuracy_std", "accuracies", "agreements", "parameters")
    curves = (out / "curves.csv").read_text().splitlines()
    return (
        found["teacher"]["accuracy"],
        [{key: student[key] for key in keep} for student in found["students"]],
        [line.rsplit(",", 1)[0] for line in curves],  # the last column is seconds
    )


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    code, stdout, err = finish(start("--config", config, "--out", out))
    assert code == 0, err
    assert "distilled" in stdout and "Compression" in stdout
    return figures(out)


MOMENTS = (
    ("job.json", 0.0),
    ("checkpoints/teacher.training.safetensors", 0.05),
    ("checkpoints/teacher.safetensors", 0.0),
    ("checkpoints/labels_only-seed0.training.safetensors", 0.02),
    ("checkpoints/distilled-seed1.training.safetensors", 0.03),
    ("checkpoints/hint_distilled-seed0.hint.training.safetensors", 0.0),
    ("checkpoints/hint_distilled-seed0.hint.safetensors", 0.0),
)


def test_sigkill_at_many_moments(config, uninterrupted, tmp_path):
    """One job, killed again and again: each time the rest of it is resumed."""
    for i, (name, seconds) in enumerate(MOMENTS):
        process = start(*(["--resume"] if i else ["--config", config]), "--out", tmp_path)
        wait_for(process, tmp_path / name)
        time.sleep(seconds)
        process.kill()
        assert finish(process)[0] == -signal.SIGKILL
        assert not (tmp_path / "results.json").exists()
    code, _, err = finish(start("--resume", "--out", tmp_path))
    assert code == 0, err
    assert figures(tmp_path) == uninterrupted
    assert not list(tmp_path.rglob(".*.fastdistill-tmp"))
    assert not list(tmp_path.rglob("*.training.safetensors"))


def test_ctrl_c_says_how_to_resume(config, uninterrupted, tmp_path):
    out = tmp_path / "with space"
    process = start("--config", config, "--out", out)
    wait_for(process, out / "checkpoints" / "labels_only-seed0.training.safetensors")
    process.send_signal(signal.SIGINT)
    code, stdout, err = finish(process)
    assert code == 130
    assert stdout == "" and "Traceback" not in err
    last = err.splitlines()[-1]
    assert last == (
        f"Stopped. To continue: fastdistill distill --config {config} --out '{out}' --resume"
    )
    again = shlex.split(last.partition(": ")[2])  # just what it says
    code, _, err = finish(start(*again[2:]))
    assert code == 0, err
    assert "Continuing the run in" in err
    assert figures(out) == uninterrupted


def test_full_disk_is_said(config, tmp_path):
    """A limit on the size of files stands for it: the teacher's checkpoint does not fit."""
    import resource

    out = tmp_path / "out"

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    code, _, err = finish(start("--config", config, "--out", out, preexec_fn=limit))
    assert code == 2
    assert "Traceback" not in err
    assert "A file cannot be read or written." in err
    assert {p.name for p in (out / "checkpoints").iterdir()} == {".lock"}  # no half file
