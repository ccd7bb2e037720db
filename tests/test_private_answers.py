"""The aggregate release: its sensitivity, and one debit for each answer, whenever a kill comes."""

import math
import os

import pytest
import torch

from fastdistill.distill import store
from fastdistill.distill.private import (
    Answers,
    BudgetExceeded,
    DisjointShards,
    Ledger,
    accounting,
    answers,
    committee,
)

K, POOL, CLASSES = 5, 12, 4
SIGMA = 3.0
pytestmark = pytest.mark.usefixtures("one_thread")


class Fixed:
    """Teachers whose answers were written down."""

    def __init__(self, seed=0, k=K):
        self.k = k
        generator = torch.Generator().manual_seed(seed)
        self.says = 3 * torch.randn(k, POOL, CLASSES, generator=generator)

    def logits(self, queries):
        return self.says[:, queries.long()]

    def fingerprint(self):
        return committee.raw_digest(self.says)


def book(tmp_path, **settings):
    return Ledger(
        **{"delta": 1e-5, "adjacency": "add_remove", "path": tmp_path / "ledger.jsonl", **settings}
    )


def oracle(tmp_path, teachers=None, kind=Answers, **settings):
    teachers = teachers or Fixed()
    ledger = settings.pop("ledger", None) or book(tmp_path)
    settings = {"temperature": 1.0, "noise_std": SIGMA, "folder": tmp_path / "kept", **settings}
    return kind(teachers, DisjointShards(teachers.k), torch.arange(POOL), ledger=ledger, **settings)


ROWS = torch.tensor([3, 1, 7])


def test_each_query_is_answered_and_debited_once(tmp_path):
    first = oracle(tmp_path)
    said = first.ask(ROWS)
    assert said.shape == (3, CLASSES) and said.dtype is torch.float32
    (m,) = first.ledger.history
    assert (m.sensitivity, m.noise_std, m.releases, m.steps) == (math.sqrt(2), SIGMA, 3, 1)
    assert m.sampling_rate is None
    assert torch.equal(first.ask(ROWS), said)
    more = first.ask(torch.tensor([7, 9, 3, 9]))
    assert torch.equal(more[0], said[2]) and torch.equal(more[2], said[0])
    assert torch.equal(more[1], more[3])
    assert [m.releases for m in first.ledger.history] == [3, 1]
    assert first.answered.tolist() == [1, 3, 7, 9]
    again = oracle(tmp_path)  # another process, later
    assert torch.equal(again.ask(ROWS), said) and len(again.ledger.history) == 2
    mu = accounting.mu(again.ledger.history)
    assert mu == pytest.approx(math.sqrt(2 * 4) / SIGMA)
    for other in (Fixed(1), None):  # other teachers, other noise: other answers
        changed = {} if other else {"noise_std": 2 * SIGMA}
        assert oracle(tmp_path, other, **changed).answered.tolist() == []


def test_one_changed_teacher_moves_an_answer_by_at_most_the_sensitivity():
    """Also where its answers were the two farthest distributions; the bound is reached."""

    def total(teachers, generator):
        silent = Ledger(delta=1e-5, adjacency="replace")
        x = Answers(
            teachers, DisjointShards(K), torch.arange(POOL), temperature=1.0, noise_std=1e-3,
            ledger=silent, generator=torch.Generator().manual_seed(generator),
        )  # fmt: skip
        return x.ask(torch.arange(POOL)).double()

    ours, theirs = Fixed(), Fixed()
    ours.says[2, :, 0], theirs.says[2, :, 1] = 1e4, 1e4
    ours.says[2, :, 1], theirs.says[2, :, 0] = -1e4, -1e4
    for seed in range(3):  # the same noise on both: it cancels
        moved = (total(ours, seed) - total(theirs, seed)).norm(dim=1)
        assert float(moved.max()) <= answers.SENSITIVITY
        assert float(moved.min()) >= 0.999 * answers.SENSITIVITY


def test_noise_has_the_standard_deviation_that_is_debited(tmp_path):
    quiet = Fixed(k=1)
    x = oracle(tmp_path, quiet, folder=None, ledger=Ledger(delta=1e-5, adjacency="replace"))
    x.queries = torch.zeros(40_000)  # the same row: its answers differ by their noise
    noise = x.ask(torch.arange(40_000)) - quiet.says[0, 0].softmax(0)
    n = noise.numel()
    assert abs(float(noise.std()) / SIGMA - 1) < 5 / math.sqrt(2 * n)
    assert x.ledger.history[0].releases == 40_000


def test_the_debit_is_on_the_disk_before_the_noise_is_drawn(tmp_path, monkeypatch):
    seen = []
    real = answers.noisy_softmax_sum

    def draw(*args, **settings):
        seen.append(len(book(tmp_path).history))
        return real(*args, **settings)

    monkeypatch.setattr(answers, "noisy_softmax_sum", draw)
    oracle(tmp_path).ask(ROWS)
    assert seen == [1]


def test_a_refused_release_costs_nothing_and_draws_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "noisy_softmax_sum", None)
    tight = book(tmp_path, budget=0.5, accountant="gaussian")
    with pytest.raises(BudgetExceeded):
        oracle(tmp_path, ledger=tight).ask(ROWS)
    assert book(tmp_path).history == ()


class DrawsFirst(Answers):
    """Draws its noise, then debits it."""

    def _release(self, rows):
        index = torch.tensor(rows)
        key = committee.digest(repr(rows).encode())
        sums = self._draw(index, None)
        self.ledger.spend(self.mechanism(len(rows)), key=key)
        about = {"identity": self.identity, "key": key}
        store.save(
            self.folder / f"{self._prefix}{key[:16]}.safetensors",
            {"rows": index, "sums": sums},
            about,
        )
        self._answered |= dict(zip(rows, sums, strict=True))


class DebitsTheKept(Answers):
    """Debits what was answered before."""

    def ask(self, rows):
        if torch.isin(rows, self.answered).all():
            self.ledger.spend(self.mechanism(len(rows)))
        return super().ask(rows)


class DrawsTheKept(Answers):
    """Draws fresh noise after a restart."""

    def _load(self):
        pass


class Counted:
    """A function that counts its calls."""

    def __init__(self, real):
        self.real, self.calls = real, 0

    def __call__(self, *args, **settings):
        self.calls += 1
        return self.real(*args, **settings)


def run_until(step, tmp_path, kind):
    """Ask in a child that is killed at its `step`-th write, flush, rename or draw.

    Returns:
        Whether it came to its end, and how often it drew noise.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            done = 0

            def at(call, torn=False):
                def wrapped(*args, **settings):
                    nonlocal done
                    for after in (False, True):
                        done += 1
                        if done == step:
                            if torn and not after:
                                call(args[0], args[1][: len(args[1]) // 2])
                            os._exit(9)
                        if not after:
                            result = call(*args, **settings)
                    return result

                return wrapped

            real_write, real_draw = os.write, answers.noisy_softmax_sum

            def draw(*args, **settings):
                sums = real_draw(*args, **settings)
                real_write(writing, b"D")
                return sums

            os.write, os.fsync, os.replace = (
                at(os.write, torn=True), at(os.fsync), at(os.replace),
            )  # fmt: skip
            answers.noisy_softmax_sum = at(draw)
            oracle(tmp_path, kind=kind).ask(ROWS)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    drawn = b""
    while part := os.read(reading, 100):
        drawn += part
    os.close(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 0, len(drawn)


def check_kills(tmp_path, kind, monkeypatch):
    """A kill at every moment: no debit is lost, no kept answer is drawn or paid for again."""
    real = answers.noisy_softmax_sum
    finished, step, lost = False, 0, 0
    while not finished:
        step += 1
        folder = tmp_path / f"{kind.__name__}{step}"
        folder.mkdir()
        finished, draws = run_until(step, folder, kind)
        debits = len(book(folder).history)
        assert debits >= draws, f"step {step}: noise without a debit"
        lost += debits > draws
        kept = oracle(folder, kind=Answers).answered.tolist()
        assert kept in ([], sorted(ROWS.tolist()))
        assert not kept or draws == 1
        again = Counted(real)
        monkeypatch.setattr(answers, "noisy_softmax_sum", again)
        first = oracle(folder, kind=kind).ask(ROWS)
        monkeypatch.setattr(answers, "noisy_softmax_sum", real)
        assert again.calls == (0 if kept else 1), f"step {step}: a kept answer was drawn again"
        assert len(book(folder).history) == debits + again.calls, f"step {step}: paid again"
        assert torch.equal(first, oracle(folder).ask(ROWS))
    return step, lost


def test_a_kill_at_any_write_loses_no_debit_and_no_kept_answer_is_paid_twice(tmp_path, monkeypatch):
    steps, lost = check_kills(tmp_path, Answers, monkeypatch)
    assert steps > 15  # each write, flush and rename, before and after it
    assert lost  # some come between debit and draw: that debit stays


@pytest.mark.parametrize("kind", [DrawsFirst, DebitsTheKept, DrawsTheKept])
def test_that_check_finds_what_breaks_it(kind, tmp_path, monkeypatch):
    with pytest.raises(AssertionError, match="step"):
        check_kills(tmp_path, kind, monkeypatch)


def test_a_seed_that_begins_again_does_not_repeat_its_noise(tmp_path):
    """Two answers of one noise have a difference without any."""

    def noise(row, **changes):
        x = oracle(tmp_path, generator=torch.Generator().manual_seed(0), **changes)
        truth = (x.committee.says[:, row] / x.temperature).softmax(1).sum(0)
        return x.ask(torch.tensor([row]))[0] - truth

    first = noise(0)
    for other in (noise(1), noise(0, temperature=2.0), noise(0, teachers=Fixed(1))):
        assert float((first - other).abs().max()) > 0.1


def test_answers_do_not_outlive_their_debit(tmp_path):
    oracle(tmp_path).ask(ROWS)
    os.rename(tmp_path / "ledger.jsonl", tmp_path / "gone.jsonl")
    with pytest.raises(ValueError, match="never debited for"):
        oracle(tmp_path)
    with pytest.raises(ValueError, match="need a ledger with a journal"):
        oracle(tmp_path, ledger=Ledger(delta=1e-5, adjacency="replace"))
    os.rename(tmp_path / "gone.jsonl", tmp_path / "ledger.jsonl")
    (path,) = (tmp_path / "kept").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged"):
        oracle(tmp_path)


def test_what_is_kept_does_not_give_the_teachers_away(tmp_path):
    """A plain digest of their parameters would be a release without noise."""
    teachers = Fixed()
    oracle(tmp_path, teachers).ask(ROWS)
    shown = [p for p in (tmp_path / "kept").iterdir() if p.name != answers.SECRET]
    text = b"".join(p.name.encode() + p.read_bytes() for p in shown)
    text += (tmp_path / "ledger.jsonl").read_bytes()
    assert teachers.fingerprint()[:16].encode() not in text
    (tmp_path / "b").mkdir()
    other = oracle(tmp_path / "b", teachers)  # same teachers, another secret
    assert other.identity != oracle(tmp_path, teachers).identity
    assert (tmp_path / "kept" / answers.SECRET).stat().st_mode & 0o077 == 0


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"expected DisjointShards\(5\), one part per teacher"):
        Answers(
            Fixed(), DisjointShards(4), torch.arange(POOL), temperature=1.0, noise_std=1.0,
            ledger=book(tmp_path),
        )  # fmt: skip
    with pytest.raises(TypeError, match="provenance: expected DisjointShards"):
        Answers(
            Fixed(), None, torch.arange(POOL), temperature=1.0, noise_std=1.0,
            ledger=book(tmp_path),
        )  # fmt: skip
    for settings, wanted in (({"noise_std": 0.0}, "noise_std"), ({"temperature": 0}, "temp")):
        with pytest.raises(ValueError, match=wanted):
            oracle(tmp_path, **settings)
    with pytest.raises(ValueError, match=r"rows: expected rows in \[0, 11\]"):
        oracle(tmp_path).ask(torch.tensor([12]))
    with pytest.raises(TypeError, match="rows: expected int64"):
        oracle(tmp_path).ask(torch.tensor([1.0]))


def test_target_logits_are_the_posterior_of_an_answer():
    """Nearly uniform under much noise; the vote itself where there is little."""
    sums = torch.tensor([[80.0, 10.0, 10.0]])
    assert answers.target_logits(sums, 100, 1e5).softmax(1).std() < 1e-3
    sharp = answers.target_logits(sums, 100, 1e-9)
    assert torch.allclose(sharp, sums / 100 / answers.SPREAD)
    k, sigma = 50, 60.0
    wanted = sums / k / (answers.SPREAD + (sigma / k) ** 2 / answers.LIKELIEST)
    assert torch.allclose(answers.target_logits(sums, k, sigma), wanted)
