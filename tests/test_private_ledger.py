"""Provenance, accounting and the ledger: every epsilon is an upper bound, every debit is kept."""

import json
import math
import os

import pytest

from fastdistill.distill.private import (
    BudgetExceeded,
    DisjointShards,
    DPTrained,
    Ledger,
    Mechanism,
    NonPrivate,
    Public,
    accounting,
    epsilon,
    noise_for,
    provenance,
)
from fastdistill.distill.private.journal import Journal

DELTA = 1e-5
ANSWERS = Mechanism("answers", "private", math.sqrt(2), 90.0, None, 1000, 1)
TRAINING = Mechanism("DP-SGD", "private", 1.0, 1.1, 0.02, 1, 500)


def ledger(**settings):
    return Ledger(**{"delta": DELTA, "adjacency": "zero_out", **settings})


# Accounting


def test_gaussian_composition_is_exact():
    """n releases of sensitivity s and noise sigma are one Gaussian of mu = s sqrt(n) / sigma."""
    assert accounting.mu([ANSWERS]) == pytest.approx(math.sqrt(2 * 1000) / 90)
    both = [ANSWERS, Mechanism("more", "private", 2.0, 40.0, None, 3, 7)]
    assert accounting.mu(both) == pytest.approx(math.sqrt(2000 / 90**2 + 21 * (2 / 40) ** 2))
    # Phi(1/2 - 1) - e Phi(-1/2 - 1), from a table of the normal distribution
    assert accounting.gaussian_delta(1.0, 1.0) == pytest.approx(0.30853754 - math.e * 0.06680720)
    for mu in (0.1, 0.5, 2.0, 9.0):
        found = accounting.gaussian_epsilon(mu, DELTA)
        assert accounting.gaussian_delta(mu, found) <= DELTA
        assert accounting.gaussian_delta(mu, found * (1 - 1e-6)) > DELTA
        assert accounting.gaussian_mu(found, DELTA) == pytest.approx(mu)
    assert accounting.gaussian_epsilon(1e-9, DELTA) == 0.0


@pytest.mark.parametrize(
    "history",
    [
        [ANSWERS],
        [TRAINING],
        [ANSWERS, TRAINING],
        [TRAINING, Mechanism("DP-SGD", "private", 2.0, 4.0, 0.1, 1, 20), ANSWERS],
        [Mechanism("small noise", "private", 1.0, 0.6, 0.01, 1, 1000)],
    ],
    ids=["gaussian", "sampled", "both", "three", "where the CLT fails"],
)
def test_accountants_agree_with_dp_accounting(history):
    dp = pytest.importorskip("dp_accounting", reason="the cross-check needs dp-accounting")
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    one = dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    judges = RdpAccountant(list(accounting.ORDERS), one), PLDAccountant(one)
    for m in history:
        event = dp.GaussianDpEvent(m.noise_std / m.sensitivity)
        times = m.steps * m.releases
        if m.sampling_rate is not None:
            event = dp.PoissonSampledDpEvent(m.sampling_rate, event)
        for judge in judges:
            judge.compose(event, times)
    rdp, pld = (judge.get_epsilon(DELTA) for judge in judges)
    assert epsilon(history, DELTA, "rdp") == pytest.approx(rdp, rel=3e-3)
    assert epsilon(history, DELTA, "rdp") >= pld - 0.003
    assert pld - 0.003 <= epsilon(history, DELTA, "prv") <= pld + 0.03
    if all(m.sampling_rate is None for m in history):
        assert epsilon(history, DELTA, "gaussian") == pytest.approx(pld, rel=1e-3)


def test_the_central_limit_estimate_is_refused():
    with pytest.raises(ValueError, match="below the true epsilon"):
        epsilon([TRAINING], DELTA, "gdp")
    with pytest.raises(ValueError, match="exact only where nothing is sampled"):
        epsilon([TRAINING], DELTA, "gaussian")


@pytest.mark.parametrize("target", [0.5, 2.0, 8.0])
def test_calibration(target):
    std = noise_for(target, DELTA, sensitivity=math.sqrt(2), releases=1000)
    found = epsilon([Mechanism("a", "d", math.sqrt(2), std, None, 1000)], DELTA, "gaussian")
    assert target * (1 - 1e-6) < found <= target
    for accountant in ("rdp", "prv"):
        sampled = {"sampling_rate": 0.05, "steps": 100}
        std = noise_for(target, DELTA, **sampled, accountant=accountant)
        found = epsilon([Mechanism("a", "d", 1.0, std, **sampled)], DELTA, accountant)
        assert 0.99 * target < found <= target


# Provenance


def test_mechanisms_and_provenance_refuse_nonsense():
    for values, wanted in (
        ({"noise_std": 0.0}, "noise_std: expected a number > 0"),
        ({"sensitivity": -1}, "sensitivity"),
        ({"sampling_rate": 1.0}, "None where nothing is sampled"),
        ({"steps": 0}, "steps: expected an int >= 1"),
        ({"releases": 0}, "releases"),
        ({"dataset_id": " "}, "dataset_id"),
    ):
        with pytest.raises(ValueError, match=wanted):
            Mechanism(**{**TRAINING.to_json(), **values})
    assert Mechanism.from_json(TRAINING.to_json()) == TRAINING
    with pytest.raises(ValueError, match="at least one mechanism"):
        DPTrained((), "private", "zero_out", DELTA)
    with pytest.raises(ValueError, match="expected dataset_id 'other', got 'private'"):
        DPTrained((TRAINING,), "other", "zero_out", DELTA)
    with pytest.raises(ValueError, match="not under replace"):
        DPTrained((TRAINING,), "private", "replace", DELTA)
    with pytest.raises(ValueError, match="expected one of add_remove, replace, zero_out"):
        DPTrained((TRAINING,), "private", "bounded", DELTA)
    with pytest.raises(ValueError, match="k: expected an int >= 1"):
        DisjointShards(0)
    for value in (Public, "public", None):
        with pytest.raises(TypeError, match="provenance: expected"):
            provenance.check(value)
    assert provenance.check(NonPrivate()) == NonPrivate()


def test_provenance_from_the_history_of_opacus():
    teacher = DPTrained.from_opacus(
        [(1.1, 0.02, 500), (2.0, 1.0, 3)],
        max_grad_norm=3.0, dataset_id="private", adjacency="zero_out", delta=DELTA,
    )  # fmt: skip
    sampled, whole = teacher.history
    assert sampled.noise_std == pytest.approx(3.3) and sampled.steps == 500
    assert sampled.multiplier == pytest.approx(1.1) and whole.sampling_rate is None
    from opacus.accountants import PRVAccountant

    theirs = PRVAccountant()
    theirs.history = [(1.1, 0.02, 500), (2.0, 1.0, 3)]
    found = epsilon(teacher.history, DELTA, "prv")
    assert found == pytest.approx(theirs.get_epsilon(DELTA), abs=0.02)


def test_exchanging_a_record_moves_an_unsampled_step_by_twice_the_clip_norm():
    settings = {"max_grad_norm": 3.0, "dataset_id": "private", "delta": DELTA}
    one = DPTrained.from_opacus([(2.0, 1.0, 3)], adjacency="zero_out", **settings)
    two = DPTrained.from_opacus([(2.0, 1.0, 3)], adjacency="replace", **settings)
    assert accounting.mu(two.history) == pytest.approx(2 * accounting.mu(one.history))


# The ledger


def test_the_ledger_composes_all_stages_and_prints_them():
    book = ledger(unit="one image with its label")
    book.include(DPTrained((TRAINING,), "private", "zero_out", DELTA), "teacher")
    book.include(DPTrained((TRAINING,), "private", "zero_out", DELTA), "teacher")  # once
    book.spend(ANSWERS, key="answers")
    assert book.history == (TRAINING, ANSWERS)
    assert book.epsilon() == epsilon([TRAINING, ANSWERS], DELTA, "rdp")
    alone = [stage["epsilon_alone"] for stage in book.stages()]
    assert alone[0] < book.epsilon() < sum(alone)
    text = str(book)
    for part in (
        f"epsilon = {book.epsilon():.4g} at delta = 1e-05", "adjacency zero_out",
        "unit: one image with its label", "accountant rdp", "1. DP-SGD on private", "2. answers",
        f"with those before {book.epsilon():.4g}",
    ):  # fmt: skip
        assert part in text
    with pytest.raises(ValueError, match="do not add up"):
        book.include(DPTrained((ANSWERS,), "private", "replace", DELTA), "other")


def test_a_key_of_another_release_debits_no_teacher_for_free():
    book = ledger()
    book.spend(ANSWERS, key="teacher")
    with pytest.raises(ValueError, match="key: expected that of this teacher's debit"):
        book.include(DPTrained((TRAINING,), "private", "zero_out", DELTA), "teacher")
    assert book.history == (ANSWERS,)


def test_a_teacher_brings_along_what_its_own_teachers_cost():
    other = Mechanism("DP-SGD", "other", 1.0, 1.1, 0.02, 1, 500)
    teacher = DPTrained((TRAINING,), "private", "zero_out", DELTA, inherited=(other,))
    book = ledger()
    book.include(teacher, "teacher")
    book.include(teacher, "teacher")
    assert book.history == (other, TRAINING)
    half = ledger()
    half.spend(TRAINING, key="teacher")  # its own training was debited here, the other elsewhere
    half.include(teacher, "teacher")
    assert half.history == (TRAINING, other)
    with pytest.raises(ValueError, match="not under replace"):
        DPTrained((ANSWERS,), "private", "replace", DELTA, inherited=(TRAINING,))


def test_disjoint_data_sets_cost_the_largest_and_others_the_sum():
    other = Mechanism("DP-SGD", "students' records", 1.0, 1.1, 0.02, 1, 500)
    together, apart = ledger(), ledger(disjoint=True)
    for book in (together, apart):
        book.spend(TRAINING)
        book.spend(other)
    assert apart.epsilon() == epsilon([TRAINING], DELTA, "rdp")
    assert together.epsilon() == epsilon([TRAINING, other], DELTA, "rdp") > apart.epsilon()
    apart.spend(TRAINING)  # the same data set again
    assert apart.epsilon() == together.epsilon()


@pytest.mark.parametrize("accountant", ["rdp", "gaussian"])
def test_a_budget_is_never_passed(accountant):
    """Whatever is asked for, in whatever order; what is refused costs nothing."""
    book = ledger(budget=2.0, accountant=accountant)
    sizes = [300, 500, 50, 1000, 20, 5, 400, 1, 1, 1]
    taken = refused = 0
    for n in sizes * 3 + [1] * 9:
        m = Mechanism("answers", "private", math.sqrt(2), 90.0, None, n)
        before = book.history
        try:
            book.spend(m)
            taken += n
        except BudgetExceeded as error:
            refused += 1
            assert book.history == before and "would pass the budget epsilon = 2" in str(error)
    assert refused and 0.9 * 2.0 < book.epsilon() <= 2.0 == book.guarantee()
    exact = epsilon([Mechanism("a", "private", math.sqrt(2), 90.0, None, taken)], DELTA, "gaussian")
    assert exact <= 2.0
    if accountant == "gaussian":  # nothing is wasted: one more would not have fitted
        assert accounting.gaussian_mu(2.0, DELTA) ** 2 < 2 * (taken + 1) / 90.0**2


def test_the_renyi_filter_has_one_order_fixed_in_advance():
    """An order chosen afterwards is an odometer's, for which the filter's theorem does not hold."""
    book = ledger(budget=3.0, accountant="rdp")
    order = book.order
    book.spend(TRAINING)
    assert book.order == order
    divergence = accounting.rdp(book.history, [order])[0]
    assert divergence + accounting.rdp_excess(order, DELTA) <= 3.0
    fixed = ledger(budget=3.0, accountant="rdp", order=200.0)
    with pytest.raises(BudgetExceeded):  # at this order the same training passes the budget
        fixed.spend(TRAINING)
    with pytest.raises(ValueError, match="order: expected a number > 1"):
        ledger(budget=3.0, accountant="rdp", order=1.0)


def test_the_numerical_accountant_takes_a_schedule_only():
    with pytest.raises(ValueError, match='a budget needs "rdp" or "gaussian"'):
        ledger(budget=2.0, accountant="prv")
    with pytest.raises(ValueError, match="fixed in advance"):
        ledger(accountant="prv")
    with pytest.raises(ValueError, match="a budget or a schedule, got both"):
        ledger(budget=2.0, accountant="rdp", schedule=[TRAINING])
    book = ledger(accountant="prv", schedule=[TRAINING, ANSWERS])
    with pytest.raises(BudgetExceeded, match="next, got"):
        book.spend(ANSWERS)
    book.spend(TRAINING)
    book.spend(ANSWERS)
    with pytest.raises(BudgetExceeded, match="no more next"):
        book.spend(ANSWERS)
    assert book.epsilon() < epsilon([TRAINING, ANSWERS], DELTA, "rdp")


def test_a_schedule_that_is_left_early_guarantees_what_it_was():
    book = ledger(schedule=[ANSWERS, ANSWERS], accountant="gaussian")
    book.spend(ANSWERS)
    assert book.epsilon() == epsilon([ANSWERS], DELTA, "gaussian") < book.guarantee()
    assert book.guarantee() == epsilon([ANSWERS, ANSWERS], DELTA, "gaussian")


def test_sampling_is_refused_under_replace():
    with pytest.raises(ValueError, match="not under replace"):
        ledger(adjacency="replace").spend(TRAINING)


# On disk


def test_a_debit_is_on_the_disk_before_spend_returns(tmp_path, monkeypatch):
    path = tmp_path / "ledger.jsonl"
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda d: (synced.append(path.read_bytes()), fsync(d)))
    ledger(path=path).spend(ANSWERS, key="a")
    assert synced and synced[0].endswith(b"\n")
    (record,) = Journal(path).read()
    assert record["key"] == "a" and record["mechanisms"] == [ANSWERS.to_json()]
    assert record["settings"]["adjacency"] == "zero_out"


def test_a_ledger_goes_on_from_its_journal(tmp_path):
    path = tmp_path / "ledger.jsonl"
    first, second = ledger(path=path), ledger(path=path)
    other = ledger(path=path, scope="other")
    first.spend(ANSWERS)
    other.spend(TRAINING)
    second.spend(ANSWERS)  # reads what the first has spent meanwhile
    assert second.history == (ANSWERS, ANSWERS)
    again = ledger(path=path, budget=3.1, accountant="gaussian")
    assert again.history == (ANSWERS, ANSWERS)
    with pytest.raises(BudgetExceeded):
        again.spend(ANSWERS)
    with pytest.raises(ValueError, match="another 'ledger'"):
        ledger(path=path, adjacency="add_remove")


def test_epsilon_counts_what_another_ledger_spent_on_the_journal(tmp_path):
    first, second = (ledger(path=tmp_path / "ledger.jsonl") for _ in range(2))
    second.spend(ANSWERS)
    assert first.epsilon() == second.epsilon() > 0
    assert len(first.stages()) == 1 and first.history == (ANSWERS,)


def test_a_journal_that_loses_debits_is_refused(tmp_path):
    path = tmp_path / "ledger.jsonl"
    book = ledger(path=path, budget=3.1, accountant="gaussian")
    book.spend(ANSWERS)
    path.unlink()
    for use in (book.epsilon, lambda: book.spend(ANSWERS), book.reload):
        with pytest.raises(ValueError, match="no longer holds the 1 debits"):
            use()


def test_a_journal_that_has_passed_the_budget_or_left_the_schedule_is_refused(tmp_path):
    path = tmp_path / "ledger.jsonl"
    small = ledger(path=path, budget=2.5, accountant="gaussian")
    free = ledger(path=path)
    free.spend(ANSWERS)
    assert small.guarantee() == 2.5 and small.history == (ANSWERS,)
    free.spend(ANSWERS)
    with pytest.raises(ValueError, match="has passed epsilon = 2.5"):
        small.spend(ANSWERS)
    for accountant in ("gaussian", "rdp"):
        with pytest.raises(ValueError, match="has passed epsilon = 2.5"):
            ledger(path=path, budget=2.5, accountant=accountant)
    with pytest.raises(ValueError, match="no beginning of it"):
        ledger(path=path, schedule=[TRAINING])
    assert ledger(path=path, schedule=[ANSWERS] * 3).history == (ANSWERS, ANSWERS)


def test_a_torn_line_is_cut_off_and_any_other_damage_refused(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger(path=path).spend(ANSWERS)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    book = ledger(path=path)
    assert book.history == (ANSWERS,)
    book.spend(ANSWERS)
    assert path.read_bytes() == whole + whole
    path.write_bytes(whole[:40] + b"\n" + whole)
    with pytest.raises(ValueError, match="line 1 is damaged"):
        ledger(path=path)
    path.write_bytes(json.dumps([1]).encode() + b"\n")
    with pytest.raises(ValueError, match="line 1 is damaged"):
        ledger(path=path)
