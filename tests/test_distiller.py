"""Distiller: which layers it compares, what it trains, and that it works where loops run."""

import copy
import os
import subprocess
import sys
from operator import itemgetter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastdistill.distill import Distiller, Hint
from fastdistill.nn import KDLoss

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def one_thread():
    """The networks are tiny: threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Block(nn.Module):
    """A layer that returns a tuple, as some of transformers do."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return torch.tanh(self.linear(x)), "more"


class Net(nn.Module):
    def __init__(self, width, depth, classes=5, drop=0.0):
        super().__init__()
        self.embed = nn.Linear(6, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(drop)
        self.head = nn.Linear(width, classes)

    def forward(self, x, scale=1.0):
        x = self.embed(x) * scale
        for block in self.blocks:
            x, _ = block(x)
        return self.head(self.drop(self.norm(x)))


def pair(student_width=8, teacher_width=8, **settings):
    return Net(student_width, 2), Net(teacher_width, 4, drop=0.5, **settings)


X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(16) % 5


def features(model, name, x=X):
    """Output of one block, computed by hand."""
    with torch.no_grad():
        x = model.embed(x)
        for i, block in enumerate(model.blocks):
            x, _ = block(x)
            if name == f"blocks.{i}":
                return x


def test_losses_by_name_and_their_values():
    student, teacher = pair()
    distiller = Distiller(
        student, teacher, logits=KDLoss(temperature=2.0), task=nn.CrossEntropyLoss(),
        hints=[Hint("blocks.0", "blocks.1", weight=0.5),
               Hint("blocks.1", "blocks.3", distance="cosine", name="last")],
        logits_weight=0.7, task_weight=0.3,
    )  # fmt: skip
    output, losses = distiller(X, labels=Y)
    assert list(losses) == ["logits", "task", "blocks.0 -> blocks.1", "last"]
    logits = teacher.eval()(X)
    soft = 4 * F.kl_div((output / 2).log_softmax(-1), (logits / 2).softmax(-1),
                        reduction="batchmean")  # fmt: skip
    torch.testing.assert_close(losses["logits"], 0.7 * soft)
    torch.testing.assert_close(losses["task"], 0.3 * F.cross_entropy(output, Y))
    first = F.mse_loss(features(student, "blocks.0"), features(teacher, "blocks.1"))
    torch.testing.assert_close(losses["blocks.0 -> blocks.1"], 0.5 * first)
    cosine = 1 - F.cosine_similarity(features(student, "blocks.1"), features(teacher, "blocks.3"))
    torch.testing.assert_close(losses["last"], cosine.mean())
    torch.testing.assert_close(losses.total, sum(losses.values()))


def test_plain_loop_learns_and_the_teacher_stays():
    student, teacher = pair(6, 8)
    before = copy.deepcopy(teacher.state_dict())
    distiller = Distiller(
        student, teacher, logits=KDLoss(temperature=2.0),
        hints=[Hint("blocks.1", "blocks.3", widths=(6, 8))],
    )  # fmt: skip
    optimizer = torch.optim.AdamW(distiller.parameters(), 0.01)
    regressor = distiller.regressors["0"].weight
    start = regressor.detach().clone()
    totals = []
    for _ in range(60):
        distiller.train()
        assert not teacher.training  # although the distiller trains
        _, losses = distiller(X)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        totals.append(float(losses.total.detach()))
    assert totals[-1] < 0.3 * totals[0]
    assert not torch.equal(start, regressor)
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_teacher_put_back_into_training_mode_runs_in_evaluation():
    student, teacher = pair()
    distiller = Distiller(student, teacher, logits=KDLoss())
    teacher.train()
    mean = teacher.norm.running_mean.clone()
    a, b = distiller(X).losses["logits"], distiller(X).losses["logits"]
    student.eval()
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0)  # no dropout in the teacher
    assert torch.equal(mean, teacher.norm.running_mean)


def test_regressor_is_a_linear_layer_on_the_students_features():
    student, teacher = pair(6, 8)
    distiller = Distiller(student, teacher, hints=[Hint("blocks.0", "blocks.2", widths=(6, 8))])
    regressor = distiller.regressors["0"]
    _, losses = distiller(X)
    wanted = F.mse_loss(regressor(features(student, "blocks.0")), features(teacher, "blocks.2"))
    torch.testing.assert_close(losses.total, wanted)


def test_state_holds_student_and_regressors_only():
    student, teacher = pair(6, 8)
    hints = [Hint("blocks.0", "blocks.1"), Hint("blocks.1", "blocks.3", widths=(6, 8))]
    distiller = Distiller(student, teacher, logits=KDLoss(), hints=hints)
    state = distiller.state_dict()
    expected = {f"student.{name}" for name in student.state_dict()}
    assert set(state) == expected | {"regressors.1.weight", "regressors.1.bias"}
    parameters = {id(p) for p in distiller.parameters()}
    assert not parameters & {id(p) for p in teacher.parameters()}
    other = Distiller(*pair(6, 8), logits=KDLoss(), hints=hints)
    other.load_state_dict(state)
    torch.testing.assert_close(other.student.eval()(X), student.eval()(X))


def test_moving_it_moves_the_teacher():
    student, teacher = pair()
    distiller = Distiller(student, teacher, hints=[Hint("blocks.0", "blocks.1", widths=(8, 8))])
    distiller.double()
    kinds = {p.dtype for p in (*teacher.parameters(), *distiller.parameters())}
    assert kinds == {torch.float64}
    assert distiller(X.double()).losses.total.dtype is torch.float64


def test_hooks_do_not_stay():
    student, teacher = pair()
    distiller = Distiller(student, teacher, hints=[Hint("blocks.0", "blocks.1")])
    with pytest.raises(RuntimeError):
        distiller(X[:, :3])
    distiller(X)
    for model in (student, teacher):
        assert not any(m._forward_hooks for m in model.modules())
    copy.deepcopy(distiller)(X).losses.total.backward()  # a copy captures its own layers
    assert student.embed.weight.grad is None


def test_feature_maps_and_functions_and_select():
    student, teacher = (nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU()) for width in (4, 7))
    x = torch.randn(2, 3, 6, 6)

    def difference(a, b):
        return (a - b.detach()).square().sum()

    distiller = Distiller(
        student, teacher,
        hints=[Hint("1", "1", widths=(4, 7), channel_dim=1, name="maps"),
               Hint("0", "0", distance=difference, select=lambda x: x[:, :4], name="mine")],
    )  # fmt: skip
    output, losses = distiller(x)
    regressor = distiller.regressors["0"]
    maps = F.conv2d(output, regressor.weight[:, :, None, None], regressor.bias)
    torch.testing.assert_close(losses["maps"], F.mse_loss(maps, teacher(x)))
    wanted = (student[0](x) - teacher[0](x)[:, :4]).square().sum()
    torch.testing.assert_close(losses["mine"], wanted)


def test_masks_and_teacher_inputs():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, shift=0.0):
            return {"logits": self.layer(x + shift)}

    student, teacher = Tokens(), Tokens()
    x = torch.randn(2, 5, 4)
    kept = torch.tensor([[True] * 5, [True, True, False, False, False]])
    seen = []

    def masked(a, b, mask=None):
        seen.append(mask)
        return F.mse_loss(a[mask], b[mask])

    hints = [Hint("layer", "layer"), Hint("layer", "layer", distance=masked, name="mine")]
    distiller = Distiller(student, teacher, logits=KDLoss(), hints=hints)
    output, losses = distiller(x, mask=kept, hint_mask=kept, teacher_inputs={"shift": 1.0})
    wanted = teacher.layer(x + 1)
    mse = F.mse_loss(student.layer(x)[kept], wanted[kept])
    torch.testing.assert_close(losses["layer -> layer"], mse)
    torch.testing.assert_close(losses["mine"], mse)
    kl = F.kl_div(output["logits"].log_softmax(-1)[kept], wanted.softmax(-1)[kept],
                  reduction="batchmean")  # fmt: skip
    torch.testing.assert_close(losses["logits"], kl)
    assert seen[0] is kept


def test_labels_go_to_the_task_else_to_the_logits_loss():
    student, teacher = pair()
    hard = KDLoss(hard_weight=1.0, soft_weight=0.0)
    output, losses = Distiller(student, teacher, logits=hard)(X, labels=Y)
    torch.testing.assert_close(losses["logits"], F.cross_entropy(output, Y))
    partly = Y.clone()
    partly[3:] = -100
    distiller = Distiller(student, teacher, logits=KDLoss(), task=nn.CrossEntropyLoss())
    output, losses = distiller(X, labels=partly)
    everything = KDLoss()(output, teacher(X))  # unlabelled rows are distilled too
    torch.testing.assert_close(losses["logits"], everything)
    torch.testing.assert_close(losses["task"], F.cross_entropy(output[:3], Y[:3]))


def test_attention_of_a_transformer():
    transformers = pytest.importorskip("transformers")
    from fastdistill.distill import student_from_teacher

    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16,
    )  # fmt: skip
    config._attn_implementation = "eager"
    teacher = transformers.BertModel(config)
    student = student_from_teacher(teacher, [0, 2]).eval()
    seen = []

    def shapes(a, b):
        seen.append((a.shape, b.shape))
        return (a - b).square().mean()

    distiller = Distiller(
        student, teacher,
        hints=[Hint("encoder.layer.1", "encoder.layer.3"),
               Hint("encoder.layer.0.attention.self", "encoder.layer.0.attention.self",
                    distance=shapes, select=itemgetter(1), name="attention")],
    )  # fmt: skip
    tokens = torch.randint(30, (2, 5))
    output, losses = distiller(input_ids=tokens, output_attentions=True)
    with torch.no_grad():
        states = teacher(input_ids=tokens, output_hidden_states=True).hidden_states
    wanted = F.mse_loss(output.last_hidden_state, states[4])
    torch.testing.assert_close(losses["encoder.layer.1 -> encoder.layer.3"], wanted)
    assert seen == [((2, 2, 5, 5), (2, 2, 5, 5))]
    assert float(losses["attention"].detach()) < 1e-12  # the first layer is the teacher's own


def test_autocast():
    student, teacher = pair(6, 8)
    hints = [Hint("blocks.1", "blocks.3", widths=(6, 8))]
    distiller = Distiller(student, teacher, logits=KDLoss(temperature=2.0), hints=hints)
    exact = distiller(X).losses.total
    with torch.autocast("cpu", torch.bfloat16):
        output, losses = distiller(X)
    assert output.dtype is torch.bfloat16
    torch.testing.assert_close(losses.total.float(), exact, rtol=0.05, atol=0)
    losses.total.backward()
    assert all(p.grad.dtype is torch.float32 for p in distiller.parameters())


WORKER = """
import os, sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
sys.path.insert(0, "tests")
from test_distiller import Net, X, Distiller, Hint, KDLoss
rank = int(sys.argv[1])
torch.manual_seed(0); torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
student, teacher = Net(6, 2), Net(8, 4)
student.norm.eval()                        # else each half has statistics of its own
distiller = DDP(Distiller(student, teacher, logits=KDLoss(temperature=2.0),
                          hints=[Hint("blocks.1", "blocks.3", widths=(6, 8))]))
student.norm.eval()
assert not any("teacher" in name for name in distiller.state_dict())
output, losses = distiller(X[8 * rank : 8 * rank + 8])
losses.total.backward()
torch.save([p.grad for p in distiller.parameters()], f"{sys.argv[2]}.{rank}")
dist.barrier()
dist.destroy_process_group()
os._exit(0)                                # gloo's threads may outlive the interpreter, and abort
"""


def test_distributed_data_parallel(tmp_path):
    """Two processes with half of the batch each: the gradient of the whole batch."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path / "store")],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    torch.manual_seed(0)
    student, teacher = Net(6, 2), Net(8, 4)
    hints = [Hint("blocks.1", "blocks.3", widths=(6, 8))]
    distiller = Distiller(student, teacher, logits=KDLoss(temperature=2.0), hints=hints)
    student.norm.eval()
    distiller(X).losses.total.backward()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"store.{rank}")
        for gradient, parameter in zip(found, distiller.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


# ---- Refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (Hint("blocks.2", "blocks.3"), "student has no layer 'blocks.2'; near ones: blocks.[01]"),
        (Hint("blocks.0", "block.3"), "teacher has no layer 'block.3'; near ones: blocks.3"),
        (Hint("linear", "blocks.0"), "near ones: blocks.0.linear, blocks.1.linear"),
        (Hint("zzz", "blocks.0"), "near ones: embed, blocks, norm, drop, head"),
        (Hint("", "blocks.0"), "the student has no layer ''"),
    ],
)  # fmt: skip
def test_wrong_names_are_answered_with_the_near_ones(hint, words):
    with pytest.raises(ValueError, match=words):
        Distiller(*pair(), hints=[hint])


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({}, ValueError, "at least one of logits, hints and task"),
        ({"hints": ["blocks.0"]}, TypeError, "expected Hint objects, got str"),
        ({"hints": [Hint("norm", "norm")] * 2}, ValueError, "'norm -> norm', which is taken"),
        ({"hints": [Hint("norm", "norm", name="task")]}, ValueError, "'task', which is taken"),
        ({"logits": KDLoss(), "logits_weight": "1"}, TypeError, "logits_weight: expected a number"),
        (
            {"hints": Hint("norm", "norm")},
            TypeError,
            "expected a list of Hint objects, got a single",
        ),
        (
            {"logits": KDLoss},
            TypeError,
            "logits: expected a function or a module, got the class KD",
        ),
        ({"task": "mse"}, TypeError, "task: expected a function or a module, got str"),
        ({"logits": KDLoss(), "logits_of": "logits"}, TypeError, "logits_of: expected a function"),
    ],
)
def test_settings_are_checked(settings, error, words):
    with pytest.raises(error, match=words):
        Distiller(*pair(), **settings)
    with pytest.raises(TypeError, match="teacher: expected a torch.nn.Module, got function"):
        Distiller(nn.Linear(1, 1), lambda x: x, logits=KDLoss())


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"widths": (3,)}, ValueError, r"widths: expected \(D_s, D_t\), two ints > 0, got \(3,\)"),
        ({"widths": (3, 0)}, ValueError, "widths"),
        ({"weight": None}, TypeError, "weight: expected a number"),
        ({"distance": 3}, TypeError, "distance: expected a str or a function"),
        ({"distance": F.mse_loss, "widths": (3, 4)}, ValueError, "expected a word with widths"),
        ({"teacher": 1}, TypeError, "teacher: expected a layer's name, got 1"),
        ({"distance": "msee"}, ValueError, "distance: expected one of mse, l1, smooth_l1, cosine"),
        ({"distance": nn.MSELoss}, TypeError, "distance: expected a function .* the class MSELoss"),
        ({"feature_norm": "l3"}, ValueError, "feature_norm: expected one of layer_norm, l2"),
        ({"channel_dim": "1"}, TypeError, "channel_dim: expected an int"),
        ({"select": 0}, TypeError, "select: expected a function"),
        ({"name": 3}, TypeError, "name: expected a text or None, got 3"),
        ({"name": ""}, TypeError, "name: expected a text or None, got ''"),
    ],
)
def test_hints_are_checked(settings, error, words):
    with pytest.raises(error, match=words):
        Hint(**{"student": "a", "teacher": "b"} | settings)


def test_what_can_only_be_seen_in_a_forward_pass():
    student, teacher = pair(6, 8)

    def run(model=student, labels=None, **settings):
        return Distiller(model, teacher, **settings)(X, labels=labels)

    with pytest.raises(ValueError, match=r"\[16, 6\] and \[16, 8\].*widths=\(D_s, D_t\)"):
        run(hints=[Hint("blocks.0", "blocks.0")])
    with pytest.raises(ValueError, match="'task': expected a scalar tensor, got shape"):
        run(labels=Y, task=nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(ValueError, match="labels: expected a tensor for the task's loss, got None"):
        run(task=nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="from the layer 'blocks.0', got str; say with select"):
        run(hints=[Hint("blocks.0", "blocks.0", select=itemgetter(1))])
    student.unused = nn.Linear(6, 8)
    with pytest.raises(RuntimeError, match="the student's layer 'unused' did not run"):
        run(hints=[Hint("unused", "blocks.0")])
    student.blocks[1] = student.blocks[0]
    with pytest.raises(RuntimeError, match="the student's layer 'blocks.0' ran twice"):
        run(hints=[Hint("blocks.0", "blocks.0")])

    class Odd(nn.Module):
        def forward(self, x):
            return "nothing"

    with pytest.raises(ValueError, match="an output with logits, got str; say with logits_of"):
        run(model=Odd(), logits=KDLoss())


def test_a_student_is_not_frozen_with_its_teacher():
    """Sharing what is to be trained would end training in silence; what is frozen may be shared."""
    student, teacher = pair()
    with pytest.raises(ValueError, match="its 'embed.weight' is the student's 'embed.weight' too"):
        Distiller(teacher, teacher, logits=KDLoss())
    student.head = teacher.head
    with pytest.raises(ValueError, match="'head.weight' is the student's 'head.weight' too"):
        Distiller(student, teacher, logits=KDLoss())
    assert all(x.requires_grad for x in student.parameters())
    teacher.head.requires_grad_(False)
    distiller = Distiller(student, teacher, logits=KDLoss())
    distiller(X).losses.total.backward()
    assert student.embed.weight.grad is not None


def test_another_teacher_is_no_submodule_either():
    distiller = Distiller(*pair(), logits=KDLoss())
    before = list(distiller.state_dict())
    other = Net(8, 4)
    distiller.teacher = other
    assert list(distiller.state_dict()) == before and distiller.teacher is other
    assert not other.training and not any(x.requires_grad for x in other.parameters())


class InPlace(nn.Sequential):
    def __init__(self, inplace):
        super().__init__(nn.Linear(6, 8), nn.ReLU(inplace), nn.Linear(8, 5))


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_an_output_that_was_overwritten_is_refused(whose):
    """Compared would be what a later layer made of it, under the name of the one before."""
    student, teacher = (InPlace(inplace=who == whose) for who in ("student", "teacher"))
    wrong = Distiller(student, teacher, hints=[Hint("0", "0")])
    with pytest.raises(RuntimeError, match=f"the {whose}'s layer '0' .* changed in place"):
        wrong(X)
    after = Distiller(student, teacher, hints=[Hint("1", "1")])(X).losses.total
    want = F.mse_loss(*(torch.relu(m[0](X)) for m in (student, teacher)))
    torch.testing.assert_close(after, want)


def test_a_module_goes_by_all_its_names():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.second = self.first
            self.head = nn.Linear(6, 5)
            self.times = 1

        def forward(self, x):
            for _ in range(self.times):
                x = self.second(x)
            return self.head(x)

    student, teacher = Shared(), Shared()
    hints = [Hint(name, name) for name in ("first", "second")]
    distiller = Distiller(student, teacher, hints=hints)
    _, losses = distiller(X)
    want = F.mse_loss(student.first(X), teacher.first(X))
    for value in losses.values():
        torch.testing.assert_close(value, want)
    student.times = 2
    with pytest.raises(RuntimeError, match="the student's layer '(first|second)' ran twice"):
        distiller(X)


def test_a_hint_without_gradient_is_refused():
    """What reentrant checkpointing captures has none: the hint would train nothing."""

    class Checkpointed(InPlace):
        def __init__(self, reentrant):
            super().__init__(inplace=False)
            self.reentrant = reentrant

        def forward(self, x):
            x = x.clone().requires_grad_()
            return checkpoint(super().forward, x, use_reentrant=self.reentrant)

    teacher = InPlace(inplace=False)
    hints = [Hint("0", "0")]
    student = Checkpointed(reentrant=True)
    distiller = Distiller(student, teacher, hints=hints)
    with pytest.raises(RuntimeError, match="layer '0' returned a tensor without gradient"):
        distiller(X)
    with torch.no_grad():
        distiller(X)
    distiller.eval()(X)
    student = Checkpointed(reentrant=False)
    Distiller(student, teacher, hints=hints)(X).losses.total.backward()
    assert student[0].weight.grad is not None
    frozen = Checkpointed(reentrant=False).requires_grad_(False)
    Distiller(frozen, teacher, hints=[Hint("0", "0")])(X)


@pytest.mark.parametrize(
    ("given", "settings", "error", "words"),
    [
        ({"labels": Y}, {"hints": [Hint("norm", "norm")]}, ValueError, "labels: expected None"),
        ({"mask": Y > 0}, {"hints": [Hint("norm", "norm")]}, ValueError, "mask: expected None"),
        ({"hint_mask": Y > 0}, {"logits": KDLoss()}, ValueError, "hint_mask: expected None in a"),
        ({"mask": Y}, {"logits": KDLoss()}, TypeError, "mask: expected dtype torch.bool"),
        ({"hint_mask": Y}, {"hints": [Hint("norm", "norm", distance=lambda s, t, mask: 1)]},
         TypeError, "hint_mask: expected dtype torch.bool"),
        ({"hint_mask": [True] * 16}, {"hints": [Hint("norm", "norm")]}, TypeError, "got list"),
        ({"teacher_inputs": [1]}, {"logits": KDLoss()}, TypeError, "teacher_inputs: expected a m"),
    ],
)  # fmt: skip
def test_nothing_given_is_passed_over(given, settings, error, words):
    with pytest.raises(error, match=words):
        Distiller(*pair(), **settings)(X, **given)
