"""The recipes: which provenance they accept, what they debit, and that they teach."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdistill.distill import Hint
from fastdistill.distill.private import (
    DPSGD,
    Answers,
    DisjointShards,
    DPTrained,
    Labels,
    Ledger,
    Mechanism,
    NoGuarantee,
    NonPrivate,
    Public,
    Training,
    committee,
    dp_student,
    dp_teacher,
    dp_train,
    epsilon,
    gradient_perturbation,
    knowledge_perturbation,
    shards,
    training,
)

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES, FEATURES = 3, 6
QUICK = Training(steps=60, learning_rate=0.05, weight_decay=0.01)


def problem(n, seed):
    """Inputs [n, FEATURES] and labels of a linear problem."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, FEATURES, generator=generator)
    truth = torch.randn(FEATURES, CLASSES, generator=torch.Generator().manual_seed(99))
    return x, (x @ truth).argmax(1)


def net():
    return nn.Linear(FEATURES, CLASSES)


def accuracy(model):
    x, y = problem(1000, 7)
    return float((model(x).argmax(1) == y).float().mean())


def book(**settings):
    return Ledger(**{"delta": 1e-5, "adjacency": "zero_out", **settings})


def dp_made(seed=0, **changes):
    """A DP-trained teacher, its provenance and its ledger."""
    x, y = problem(2000, 0)
    settings = DPSGD(**{
        "sampling_rate": 0.1, "steps": 40, "noise_multiplier": 1.0, "max_grad_norm": 1.0,
        "expected_batch_size": 200, "learning_rate": 0.5, "seed": seed, **changes,
    })  # fmt: skip
    ledger, model = book(), net()
    made = dp_train(model, x, y, F.cross_entropy, settings, dataset_id="private", ledger=ledger)
    return model, made, ledger


def parts(k, n=3000, seed=1):
    x, y = problem(n, seed)
    found = shards.assign(range(n), k)
    return committee.Linear(committee.fit_linear(x, y, found, CLASSES, 1.0), 10.0)


def released(teachers, pool, ledger, sigma=20.0, **settings):
    return Answers(
        teachers, DisjointShards(teachers.k), pool, temperature=1.0, noise_std=sigma,
        ledger=ledger, generator=torch.Generator().manual_seed(0), **settings,
    )  # fmt: skip


def call(recipe, provenance):
    """The recipe with everything right but, perhaps, the provenance."""
    pool, _ = problem(200, 3)
    student, teacher = net(), net()
    if recipe is dp_teacher:
        recipe(student, teacher, provenance, pool, ledger=book(), training=QUICK)
    elif recipe is dp_student:
        settings = DPSGD(0.1, 2, 1.0, 1.0, 20, 0.1, seed=0)
        recipe(student, teacher, provenance, pool, settings, dataset_id="b", ledger=book())
    elif recipe is knowledge_perturbation:
        teachers = parts(4)
        recipe(
            student, teachers, provenance, released(teachers, pool, book()), queries=20,
            training=QUICK,
        )  # fmt: skip
    else:
        gradient_perturbation(
            student, parts(4), provenance, pool, max_norm=1.0, noise_multiplier=5.0,
            ledger=book(), training=QUICK,
        )  # fmt: skip


DP = DPTrained((Mechanism("DP-SGD", "private", 1.0, 1.0, 0.1, 1, 10),), "private", "zero_out", 1e-5)


@pytest.mark.parametrize(
    "recipe,provenance,accepted",
    [
        (dp_teacher, Public(), True),
        (dp_teacher, DP, True),
        (dp_teacher, DisjointShards(4), "Use knowledge_perturbation"),
        (dp_teacher, NonPrivate(), "DisjointShards\\(1\\)"),
        (dp_student, Public(), True),
        (dp_student, DP, True),
        (dp_student, DisjointShards(4), "Use knowledge_perturbation"),
        (dp_student, NonPrivate(), "DP-SGD on the student does not help"),
        (knowledge_perturbation, DisjointShards(4), True),
        (knowledge_perturbation, Public(), "use dp_teacher"),
        (knowledge_perturbation, DP, "use dp_teacher"),
        (knowledge_perturbation, NonPrivate(), "train the teacher by DP-SGD"),
        (gradient_perturbation, DisjointShards(4), True),
        (gradient_perturbation, NonPrivate(), "without noise gives no guarantee"),
        (gradient_perturbation, DP, "use dp_teacher"),
    ],
)
def test_only_combinations_with_a_guarantee_are_accepted(recipe, provenance, accepted):
    if accepted is True:
        call(recipe, provenance)
    else:
        with pytest.raises(NoGuarantee, match=accepted):
            call(recipe, provenance)


def test_r1_has_the_epsilon_of_its_teacher_whatever_the_student_does():
    teacher, made, trained = dp_made()
    assert accuracy(teacher) > 0.8
    pool, _ = problem(500, 3)
    ledger = book()
    for seed in range(2):  # two students of one teacher: one debit
        torch.manual_seed(seed)
        student = net()
        dp_teacher(student, teacher, made, pool, ledger=ledger, training=QUICK, temperature=2.0)
        assert accuracy(student) > 0.85
    assert ledger.history == made.history == trained.history
    assert ledger.epsilon() == epsilon(made.history, 1e-5, "rdp")
    public = book()
    dp_teacher(net(), teacher, Public(), pool, ledger=public, training=QUICK)
    assert public.history == () and public.epsilon() == 0.0


def test_r1_matches_layers_first():
    teacher = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    student = nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, CLASSES))
    pool, _ = problem(300, 3)
    start = [p.clone() for p in student.parameters()]
    dp_teacher(
        student, teacher, Public(), pool, ledger=book(), training=QUICK,
        hints=[Hint("1", "1", widths=(4, 8))],
    )  # fmt: skip
    assert all(not torch.equal(a, b) for a, b in zip(start, student.parameters(), strict=True))


def test_r2_composes_with_its_teacher():
    teacher, made, _ = dp_made()
    x, _ = problem(1000, 5)
    settings = DPSGD(0.2, 30, 1.5, 1.0, 200, 0.5, seed=1)
    for disjoint, dataset in ((True, "other"), (False, "other"), (True, "private")):
        ledger = book(disjoint=disjoint)
        student = net()
        mine = dp_student(student, teacher, made, x, settings, dataset_id=dataset, ledger=ledger)
        assert ledger.history == (*made.history, *mine.history)
        each = [epsilon(part.history, 1e-5, "rdp") for part in (made, mine)]
        both = epsilon([*made.history, *mine.history], 1e-5, "rdp")
        wanted = max(each) if disjoint and dataset == "other" else both
        assert ledger.epsilon() == pytest.approx(wanted)
        assert accuracy(student) > 0.75


def test_r2_students_carry_their_teachers_history_to_other_ledgers():
    """Else what a student of the student costs the teacher's records would be counted nowhere."""
    teacher, made, ledger = dp_made()
    x, _ = problem(200, 3)
    settings = DPSGD(0.1, 2, 2.0, 1.0, 20, 0.5, seed=1)
    student = net()
    second = dp_student(
        student, teacher, made, x, settings, dataset_id="other", ledger=ledger, key="student"
    )
    elsewhere = book()
    quick = Training(steps=1)
    dp_teacher(net(), student, second, x, ledger=elsewhere, training=quick)
    assert set(elsewhere.history) == set(ledger.history) and len(elsewhere.history) == 2
    before = ledger.history
    dp_teacher(net(), student, second, x, ledger=ledger, training=quick, teacher_key="student")
    assert set(ledger.history) == set(before)


def test_r2_refuses_a_teacher_that_normalises_by_the_batch():
    teacher = nn.Sequential(net(), nn.BatchNorm1d(CLASSES, track_running_stats=False))
    settings, ledger = DPSGD(0.1, 2, 2.0, 1.0, 20, 0.5, seed=1), book()
    with pytest.raises(ValueError, match="1 is BatchNorm1d without running statistics"):
        dp_student(
            net(), teacher, Public(), problem(20, 3)[0], settings, dataset_id="d", ledger=ledger
        )
    assert ledger.history == ()


def test_r2_takes_the_teacher_in_evaluation_mode():
    """In training mode batch normalisation would make each target depend on other records."""
    teacher = nn.Sequential(nn.BatchNorm1d(FEATURES), net())
    teacher.train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    x, _ = problem(100, 5)
    settings = DPSGD(0.2, 2, 1.0, 1.0, 20, 0.1, seed=1)
    dp_student(net(), teacher, Public(), x, settings, dataset_id="b", ledger=book())
    assert all(torch.equal(value, before[n]) for n, value in teacher.state_dict().items())


@pytest.mark.parametrize("strategy,rounds", [("random", 1), ("margin", 3), ("k-center", 2)])
def test_r3_teaches_through_noise(strategy, rounds):
    teachers, ledger = parts(60), book(adjacency="replace")
    pool, truth = problem(600, 3)
    known = torch.arange(10)
    answers = released(teachers, pool, ledger, sigma=12.0)
    torch.manual_seed(0)
    student = net()
    asked = knowledge_perturbation(
        student, teachers, DisjointShards(60), answers, queries=200, strategy=strategy,
        rounds=rounds, labels=Labels(known, truth[known]), training=QUICK,
    )  # fmt: skip
    assert len(asked.unique()) == 200 and not torch.isin(asked, known).any()
    assert accuracy(student) > 0.85
    assert sum(m.releases for m in ledger.history) == 200 and len(ledger.history) == rounds
    mu = math.sqrt(2 * 200) / 12.0
    from fastdistill.distill.private import accounting

    assert ledger.epsilon() == pytest.approx(accounting.gaussian_epsilon(mu, 1e-5))
    before = len(ledger.history)
    torch.manual_seed(1)
    knowledge_perturbation(  # another student of the same answers costs nothing
        net(), teachers, DisjointShards(60), answers, queries=200, strategy="random",
        labels=Labels(known, truth[known]), training=QUICK,
    ) if strategy == "random" else None  # fmt: skip
    assert len(ledger.history) == before


def test_r3_chooses_by_the_student_and_never_asks_the_teachers_unreleased(monkeypatch):
    """Raw answers are computed for the chosen queries alone."""
    teachers, pool = parts(10), problem(300, 3)[0]
    seen = []
    real = teachers.logits
    teachers.logits = lambda x: (seen.append(len(x)), real(x))[1]
    answers = released(teachers, pool, book())
    knowledge_perturbation(
        net(), teachers, DisjointShards(10), answers, queries=30, strategy="entropy", rounds=2,
        training=QUICK,
    )  # fmt: skip
    assert seen == [1, 15, 1, 15]  # the first of each round is tried before its debit


def test_the_gradient_ablation_debits_every_visit():
    ledger, pool = book(adjacency="add_remove"), problem(50, 3)[0]
    gradient_perturbation(
        net(), parts(4), DisjointShards(4), pool, max_norm=0.5, noise_multiplier=8.0,
        ledger=ledger, training=Training(steps=7),
    )  # fmt: skip
    (m,) = ledger.history
    assert (m.sensitivity, m.noise_std, m.releases, m.steps) == (1.0, 4.0, 50, 7)


def test_the_gradient_ablation_follows_the_mean_of_the_teachers():
    """Without noise to speak of it is distillation from their mean."""
    teachers, (pool, _) = parts(20), problem(300, 3)
    student = net()
    gradient_perturbation(
        student, teachers, DisjointShards(20), pool, max_norm=2.0, noise_multiplier=1e-3,
        ledger=book(), training=QUICK, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert accuracy(student) > 0.9


def test_noise_on_the_value_of_the_loss_changes_no_gradient():
    """RONA as released: the students are the same to the last bit, so its epsilon is infinite."""
    x, _ = problem(64, 0)
    says = 3 * net()(x).detach()
    students = []
    for sigma in (0.0, 10.0, 1000.0):
        torch.manual_seed(5)
        student, noise = net(), torch.Generator().manual_seed(int(sigma))
        training.fit(
            student, len(x),
            lambda rows, s=student, g=noise, std=sigma: training.loss_value_noise(
                s(x[rows]), says[rows], 1.0, std, g
            ),
            QUICK,
        )  # fmt: skip
        students.append(student.weight.detach())
    assert torch.equal(students[0], students[1]) and torch.equal(students[0], students[2])
    noisy = [
        float(training.loss_value_noise(net()(x).detach(), says, 1.0, 10.0, noise))
        for _ in range(2)
    ]
    assert abs(noisy[0]) > 0.5 or abs(noisy[1]) > 0.5  # the noise itself is there


# DP-SGD


def test_one_record_moves_a_step_by_at_most_the_clip_norm():
    """Record and replay on neighbouring data with the same noise, in every place of the batch."""
    x, y = problem(40, 0)
    x = 50 * x  # all are clipped
    settings = DPSGD(0.999999, 1, 1e-3, 0.7, 10, 1.0, seed=3)

    def step(rows):
        torch.manual_seed(0)
        model = net()
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        training._private_step(
            model, dict(model.named_parameters()), x[rows], y[rows], F.cross_entropy, settings,
            optimizer, torch.Generator().manual_seed(1),
        )  # fmt: skip
        return (torch.cat([p.detach().flatten() for p in model.parameters()]) - before).double()

    rows = torch.arange(40)
    whole = step(rows)
    moved = [float((whole - step(rows[rows != i])).norm()) for i in (0, 7, 39)]
    bound = settings.max_grad_norm / settings.expected_batch_size
    assert max(moved) <= bound * (1 + 1e-3) and min(moved) > 0.9 * bound  # float32 weights round
    empty = step(rows[:0])  # noise alone: not nothing, and not refused
    assert 0 < float(empty.norm()) < 0.1 * bound


def test_the_actual_batch_size_does_not_divide():
    """Twice the records, twice the step: dividing by the drawn batch would leak its size."""
    x, y = problem(1, 0)
    settings = DPSGD(0.5, 1, 1e-6, 1e6, 10, 1.0, seed=3)
    steps = []
    for copies in (1, 2):
        torch.manual_seed(0)
        model = net()
        before = model.weight.detach().clone()
        training._private_step(
            model, dict(model.named_parameters()), x.repeat(copies, 1), y.repeat(copies),
            F.cross_entropy, settings, torch.optim.SGD(model.parameters(), 1.0), None,
        )  # fmt: skip
        steps.append((model.weight.detach() - before).double())
    assert torch.allclose(steps[1], 2 * steps[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("generator", [None, 3])
def test_poisson_sampling(generator):
    source = None if generator is None else torch.Generator().manual_seed(generator)
    sizes, hits = [], torch.zeros(500)
    for _ in range(400):
        drawn = training._poisson(500, 0.1, source)
        sizes.append(len(drawn))
        hits[drawn] += 1
    mean = sum(sizes) / 400
    assert abs(mean - 50) < 5 * math.sqrt(45 / 400)
    spread = torch.tensor(sizes).double().var()
    assert 0.6 * 45 < float(spread) < 1.5 * 45  # binomial: a fixed batch size would be 0
    assert float(hits.min()) > 40 - 5 * 6 and float(hits.max()) < 40 + 5 * 6
    assert len(training._poisson(0, 0.5, source)) == 0


def test_dp_train_refuses_what_mixes_records_and_what_it_cannot_pay_for():
    x, y = problem(50, 0)
    settings = DPSGD(0.1, 2, 1.0, 1.0, 5, 0.1)
    model = nn.Sequential(nn.BatchNorm1d(FEATURES), net())
    with pytest.raises(ValueError, match="model: 0 is BatchNorm1d, which mixes the records"):
        dp_train(model, x, y, F.cross_entropy, settings, dataset_id="a", ledger=book())
    tight, plain = book(budget=0.01, accountant="rdp"), net()
    start = plain.weight.detach().clone()
    with pytest.raises(ValueError, match="would pass the budget"):
        dp_train(plain, x, y, F.cross_entropy, settings, dataset_id="a", ledger=tight)
    assert torch.equal(start, plain.weight) and tight.history == ()
    with pytest.raises(ValueError, match="targets: expected 50 rows, got 49"):
        dp_train(plain, x, y[1:], F.cross_entropy, settings, dataset_id="a", ledger=book())
    with pytest.raises(ValueError, match="not under replace"):
        ledger = book(adjacency="replace")
        dp_train(plain, x, y, F.cross_entropy, settings, dataset_id="a", ledger=ledger)
    with pytest.raises(ValueError, match="sampling_rate"):
        DPSGD(1.5, 2, 1.0, 1.0, 5, 0.1)


def test_a_training_is_debited_each_time_unless_it_is_said_to_be_a_replay():
    x, y = problem(50, 0)
    settings, ledger = DPSGD(0.1, 2, 1.0, 1.0, 5, 0.1, seed=0), book()
    arguments = {"dataset_id": "a", "ledger": ledger, "key": "teacher"}
    for _ in range(2):  # the same key and mechanism, and who knows which data
        dp_train(net(), x, y, F.cross_entropy, settings, **arguments)
    assert len(ledger.history) == 2
    dp_train(net(), x, y, F.cross_entropy, settings, **arguments, replay=True)
    assert len(ledger.history) == 2
    fresh = DPSGD(0.1, 2, 1.0, 1.0, 5, 0.1)
    other = {**arguments, "key": "student"}
    for wrong, named in ((fresh, arguments), (settings, other)):
        with pytest.raises(ValueError, match="replay: expected a seeded training whose debit"):
            dp_train(net(), x, y, F.cross_entropy, wrong, **named, replay=True)


def test_a_seed_decides_a_run_and_no_seed_none():
    same = [dp_made(seed=4)[0].weight for _ in range(1)]
    torch.manual_seed(0)
    runs = []
    for seed in (4, 4, 5, None, None):
        torch.manual_seed(0)
        runs.append(dp_made(seed=seed, steps=3)[0].weight.detach())
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[1], runs[2])
    assert not torch.equal(runs[3], runs[4]) and same


# Teachers


def test_a_part_is_trained_on_its_own_records_alone():
    """To the last bit: removing a record leaves all other teachers as they were."""
    x, y = problem(300, 0)
    whole = committee.fit_linear(x, y, shards.assign(range(300), 9), CLASSES, 1.0)
    gone = 17
    ids = [i for i in range(300) if i != gone]
    left = committee.fit_linear(x[ids], y[ids], shards.assign(ids, 9), CLASSES, 1.0)
    changed = [i for i in range(9) if not torch.equal(whole[i], left[i])]
    assert changed == [shards.shard_of(gone, 9)]


def test_linear_teachers_are_ridge_regressions():
    x, y = problem(40, 0)
    few, many = torch.arange(4), torch.arange(4, 40)
    found = committee.fit_linear(x, y, [few, many, few[:0]], CLASSES, 2.0)
    for weights, rows in zip(found, (few, many), strict=False):
        design = torch.cat([x[rows], torch.ones(len(rows), 1)], 1)
        residual = F.one_hot(y[rows], CLASSES).float() - design @ weights
        assert torch.allclose(design.T @ residual, 2.0 * weights, atol=1e-3)
    assert not found[2].any()
    teachers = committee.Linear(found, 3.0)
    says = teachers.logits(x)
    assert says.shape == (3, 40, CLASSES)
    assert torch.allclose(says[1], 3 * (x @ found[1, :-1] + found[1, -1]), atol=1e-5)


def test_teachers_that_share_records_or_parameters_are_refused():
    """One record would move their sum by more than sqrt(2)."""
    x, y = problem(20, 0)
    for rows in ([[0, 1], [1, 2]], [[0, 0], [1]], [[0], [-20]], [[20]]):
        with pytest.raises(ValueError, match="parts: expected"):
            committee.fit_linear(x, y, [torch.tensor(part) for part in rows], CLASSES, 1.0)
    one, trunk = net(), nn.Linear(FEATURES, FEATURES)
    sharing = [nn.Sequential(trunk, net()) for _ in range(2)]
    for teachers in ([one, one], sharing, [nn.Flatten()] * 2):
        with pytest.raises(ValueError, match=r"teachers\[1\]: expected nothing trained that"):
            committee.Modules(teachers)
    trunk.requires_grad_(False)  # public
    assert committee.Modules(sharing).k == 2


def test_modules_are_asked_in_evaluation_mode():
    nets = [nn.Sequential(nn.Dropout(0.9), net()) for _ in range(3)]
    x, _ = problem(5, 0)
    teachers = committee.Modules(nets)
    nets[0].train()
    assert torch.equal(teachers.logits(x), teachers.logits(x))
    first = teachers.fingerprint()
    with torch.no_grad():
        nets[2][1].bias[0] += 1
    assert teachers.fingerprint() != first
