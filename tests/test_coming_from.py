"""Each row of the README's "Coming from" table against the peer's formula, written out.

The call in the last column of the table is what runs here. Peers are not installed: their loss
stands here in plain torch as their source has it (named above each), in float64. Every setting of
the call is then turned over in turn, and the equality has to break: a row cannot pass by chance.
"""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import fastdistill

BATCH, LENGTH, V = 3, 7, 11
T, T_TEACHER = 2.5, 4.0
A, W, H = 0.3, 0.8, 0.6  # weights: theirs of the labels, theirs of the soft and of the hard term
TOKENS = 29  # of the global batch

# torch advises against F.kl_div's "mean"; some peers use it.
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")


def sequences():
    """Logits [B, S, V] and labels [B, S], of which each sentence has another number ignored."""
    labels = torch.randint(V, (BATCH, LENGTH))
    for i, kept in enumerate((7, 5, 2)):
        labels[i, kept:] = -100
    return (BATCH, LENGTH, V), labels


def images():
    """Logits [N, V] and labels [N], all of them known."""
    return (BATCH, V), torch.randint(V, (BATCH,))


def maps():
    """Logits [N, V, H, W] and labels [N, H, W]: classes on dim 1."""
    return (BATCH, V, 2, 4), torch.randint(V, (BATCH, 2, 4))


class Peer(NamedTuple):
    formula: Callable[[SimpleNamespace], torch.Tensor]
    inputs: Callable
    same: tuple[str, ...]


PEERS: dict[str, Peer] = {}


def peer(name, inputs, same=()):
    """`name`: the first column of the table; `same`: what may be turned over without effect."""

    def register(formula):
        PEERS[name] = Peer(formula, inputs, tuple(same))
        return formula

    return register


# ---- torch --------------------------------------------------------------------------------------


# torch/nn/functional.py, kl_div: batchmean is the sum over input.size()[0]
@peer('`F.kl_div`, "batchmean"', sequences)
def _(x):
    log_q, p = F.log_softmax(x.s / x.T, -1), F.softmax(x.t / x.T, -1)
    return F.kl_div(log_q, p, reduction="batchmean")


# torch/nn/functional.py, kl_div: the mean over all elements
@peer('`F.kl_div`, "mean" (default)', sequences)
def _(x):
    log_q, p = F.log_softmax(x.s / x.T, -1), F.softmax(x.t / x.T, -1)
    return F.kl_div(log_q, p, reduction="mean")


# ---- torchdistill 1.1.5, losses/mid_level.py, KDLoss --------------------------------------------


def torchdistill(x, alpha):
    beta = None if alpha is None else 1 - alpha
    soft = F.kl_div(
        torch.log_softmax(x.s / x.T, dim=1), torch.softmax(x.t / x.T, dim=1), reduction="batchmean"
    )
    if alpha is None or alpha == 0:
        return soft
    return alpha * F.cross_entropy(x.s, x.y) + beta * x.T**2 * soft


@peer("torchdistill `KDLoss(T, alpha=a)`, [N, V]", images, same=["reduction"])
def _(x):
    return torchdistill(x, x.a)


@peer("the same, no targets, or alpha None or 0", images, same=["reduction"])
def _(x):
    return torchdistill(x, None)


@peer("the same, [N, V, H, W]", maps)
def _(x):
    return torchdistill(x, x.a)


# ---- TRL 1.16.0 ---------------------------------------------------------------------------------


def generalized_jsd(s, t, labels, beta, temperature=1.0):
    # experimental/gkd/gkd_trainer.py, GKDTrainer.generalized_jsd_loss (also gold, iw_opd)
    log_q = F.log_softmax(s / temperature, dim=-1)
    log_p = F.log_softmax(t / temperature, dim=-1)
    if beta == 0:
        jsd = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    else:
        assert beta == 1
        jsd = F.kl_div(log_p, log_q, reduction="none", log_target=True)
    mask = labels != -100
    return jsd[mask].sum() / mask.sum().clamp_min(1)


# the same file, compute_loss: shifts, and does not pass its temperature (it is for sampling)
@peer("TRL `GKDTrainer`, beta = 0", sequences)
def _(x):
    return generalized_jsd(x.s[:, :-1, :], x.t[:, :-1, :], x.y[:, 1:], beta=0)


# experimental/gold/gold_trainer.py, compute_loss: shifts, and passes its temperature
@peer("TRL `GOLDTrainer`, beta = 1", sequences)
def _(x):
    return generalized_jsd(x.s[:, :-1, :], x.t[:, :-1, :], x.y[:, 1:], beta=1, temperature=x.T)


# trainer/distillation_trainer.py, _chunked_divergence_loss: completions, already aligned, under a
# mask; the sum over num_items_in_batch
@peer("TRL `DistillationTrainer`, beta = 1 (default)", sequences)
def _(x):
    log_q, log_p = F.log_softmax(x.s / x.T, -1), F.log_softmax(x.t / x.T, -1)
    token = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    return token.masked_fill(~x.m, 0).sum() / x.n


# ---- Liger 0.8.5 --------------------------------------------------------------------------------


# chunked_loss/fused_linear_distillation.py, _compute_loss, with jsd_loss.py's distillation_loss_fn
def liger(x, beta):
    s, t, y = x.s.flatten(0, -2), x.t.flatten(0, -2), x.y.flatten()
    hard = F.nll_loss(F.log_softmax(s, dim=-1), y, reduction="sum", ignore_index=-100)
    log_q, log_p = F.log_softmax(s / x.T, dim=-1), F.log_softmax(t / x.T, dim=-1)
    if beta == 0:
        soft = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    else:
        assert beta == 1
        soft = F.kl_div(log_p, log_q, reduction="none", log_target=True)
    soft = soft.sum(dim=-1).masked_fill(y == -100, 0.0).sum()
    valid = (y != -100).sum().clamp_min(1)
    return x.h * hard / valid + x.w * soft / valid


@peer("Liger `LigerFusedLinearJSDLoss`, beta = 0", sequences)
def _(x):
    return liger(x, 0)


@peer("the same, beta = 1", sequences)
def _(x):
    return liger(x, 1)


# ops/kl_div.py: [BT, V] log-probabilities and probabilities; the mean of LigerKLDIVLoss (default)
# is over BT V
@peer("Liger `LigerKLDIVLoss`", images, same=["reduction"])
def _(x):
    y_true = x.log_p.exp()
    return (y_true * (y_true.clamp_min(1e-10).log() - x.log_q)).sum() / (x.s.shape[0] * V)


# ops/fused_linear_kl_div.py: the temperature divides the student's logits alone
@peer("Liger `LigerFusedLinearKLDivLoss`", images, same=["reduction"])
def _(x):
    return F.kl_div(F.log_softmax(x.s / x.T, -1), x.log_p.exp(), reduction="batchmean")


# ---- ModelOpt 0.47.0 ----------------------------------------------------------------------------


def modelopt(s, t, temperature, reduction):
    # torch/distill/losses.py, LogitsDistillationLoss.forward
    loss = F.kl_div(
        F.log_softmax(s / temperature, dim=-1), F.softmax(t / temperature, dim=-1),
        reduction=reduction,
    )  # fmt: skip
    return (loss.sum(dim=-1) if reduction == "none" else loss) * temperature**2


@peer("ModelOpt `LogitsDistillationLoss(T)`", sequences)
def _(x):
    return modelopt(x.s, x.t, x.T, "mean")


# torch/distill/plugins/huggingface.py, KDTrainer._standard_kd_loss
@peer("ModelOpt `KDTrainer`", sequences)
def _(x):
    token = modelopt(x.s[..., :-1, :], x.t[..., :-1, :], x.T, "none")
    mask = x.y[..., 1:] != -100
    return (token * mask).sum() / mask.sum().clamp(min=1)


# ---- timm 1.0.31 and DeiT -----------------------------------------------------------------------


# task/distillation.py, LogitDistillationTask.forward; task_loss_weight alone is complementary
@peer("timm `LogitDistillationTask(task_loss_weight=a)`", images, same=["reduction"])
def _(x):
    log_q, log_p = F.log_softmax(x.s / x.T, -1), F.log_softmax(x.t / x.T, -1)
    soft = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * x.T**2
    return x.a * F.cross_entropy(x.s, x.y) + (1.0 - x.a) * soft


# the same with distill_loss_weight: independent weights, task_loss_weight is 1 where not given
@peer("the same, distill_loss_weight=w", images, same=["reduction"])
def _(x):
    log_q, log_p = F.log_softmax(x.s / x.T, -1), F.log_softmax(x.t / x.T, -1)
    soft = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * x.T**2
    return 1.0 * F.cross_entropy(x.s, x.y) + x.w * soft


# task/token_distillation.py, distill_type="hard": the distillation head learns the teacher's argmax
@peer("timm `TokenDistillationTask`, hard", images, same=["reduction"])
def _(x):
    return x.w * F.cross_entropy(x.s, x.t.argmax(dim=-1))


# facebookresearch/deit, losses.py, DistillationLoss.forward: over outputs.numel()
@peer("DeiT `DistillationLoss(alpha=a, tau=T)`, soft", images, same=["reduction"])
def _(x):
    log_q, log_p = F.log_softmax(x.s / x.T, dim=1), F.log_softmax(x.t / x.T, dim=1)
    soft = F.kl_div(log_q, log_p, reduction="sum", log_target=True) * (x.T * x.T) / x.s.numel()
    return F.cross_entropy(x.s, x.y) * (1 - x.a) + soft * x.a


# ---- sentence-transformers 6.2.0 ----------------------------------------------------------------


# sentence_transformer/losses/distill_kl_div.py, compute_loss_from_embeddings: scores [B, N]
@peer("sentence-transformers `DistillKLDivLoss`", images, same=["reduction"])
def _(x):
    log_q, p = torch.log_softmax(x.s / x.T, dim=1), torch.softmax(x.t / x.T_t, dim=1)
    return F.kl_div(log_q, p, reduction="batchmean") * x.T**2


# ---- DistilBERT ---------------------------------------------------------------------------------


# huggingface/transformers, examples/research_projects/distillation/distiller.py, Distiller.step,
# with its README's --alpha_ce 5.0 --alpha_mlm 2.0 --mlm: the divergence on all attended tokens,
# the labels on those that were masked out. (Its alpha_cos 1.0 is of hidden states: not kd_loss.)
@peer("DistilBERT's script, 5.0 / 2.0", sequences)
def _(x):
    mask = x.m.unsqueeze(-1).expand_as(x.s)
    s = torch.masked_select(x.s, mask).view(-1, x.s.size(-1))
    t = torch.masked_select(x.t, mask).view(-1, x.s.size(-1))
    log_q, p = F.log_softmax(s / x.T, dim=-1), F.softmax(t / x.T, dim=-1)
    loss = 5.0 * F.kl_div(log_q, p, reduction="batchmean") * x.T**2
    return loss + 2.0 * F.cross_entropy(x.s.view(-1, x.s.size(-1)), x.y.view(-1), ignore_index=-100)


# ---- The table, and the calls in it -------------------------------------------------------------


def table():
    """First column -> the call in the last, of each row that has one."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    section = readme.partition("\n## Coming from")[2].partition("\n## ")[0]
    rows = {}
    for line in section.splitlines():
        if line.startswith("|") and not line.startswith("|-"):
            first, *_, last = (cell.strip() for cell in line.strip("|").split(" | "))
            calls = re.findall(r"`([^`]*kd_loss\(.*?)`", last)
            assert len(calls) <= 1, f"{first}: {calls}"
            if calls:
                rows[first] = calls[0]
    return rows


TABLE = table()


def namespace(inputs):
    """What the calls of the table may name."""
    shape, labels = inputs()
    s, t = (2 * torch.randn(shape, dtype=torch.float64) for _ in range(2))
    m = torch.zeros(labels.shape, dtype=torch.bool)
    if labels.ndim == 2:
        for i, kept in enumerate((6, 7, 3)):
            m[i, :kept] = True
    return SimpleNamespace(
        s=s, t=t, y=labels, m=m, n=float(TOKENS), V=V, T=T, T_t=T_TEACHER, a=A, w=W, h=H,
        log_q=None, log_p=F.log_softmax(t, -1),
    )  # fmt: skip


def value_and_gradient(f, x):
    """F(x) and its gradient in the student's logits; not with the weight 1."""
    s = x.s.clone().requires_grad_()
    names = {**vars(x), "s": s, "log_q": F.log_softmax(s, -1)}
    loss = f(SimpleNamespace(**names))
    (grad,) = torch.autograd.grad(-1.7 * loss, s)
    return loss.detach(), grad


def ours(call, kd_loss=fastdistill.kd_loss):
    return lambda x: eval(call, {"kd_loss": kd_loss}, vars(x))


def differs(got, want):
    return any(
        float((g - w).norm()) > 1e-3 * float(w.norm()) for g, w in zip(got, want, strict=True)
    )


def turn_over(what):
    """`kd_loss` with one of the settings it is called with turned over."""

    def kd_loss(s, t, y=None, **given):
        soft = given.get("soft_weight", 1.0) != 0
        if what == "T^2":
            given["scale_t2"] = not given.get("scale_t2", True)
        elif what == "temperature":
            given["temperature"] = 1.7 * given.get("temperature", 1.0)
        elif what == "divergence":
            reverse = given.get("divergence") == "reverse_kl"
            given["divergence"] = "forward_kl" if reverse else "reverse_kl"
        elif what == "reduction":
            if "normalizer" in given:
                del given["normalizer"]
            else:
                mean = given.get("reduction", "mean") == "mean"
                given["reduction"] = "batchmean" if mean else "mean"
            dim = given.get("dim", -1) % s.ndim
            if s.ndim > 2 and dim == 0:
                pytest.fail("classes first")
        elif what == "weights":
            hard, soft_weight = given.get("hard_weight", 0.0), given.get("soft_weight", 1.0)
            if y is None:
                given["soft_weight"] = 2 * soft_weight
            else:
                given["hard_weight"], given["soft_weight"] = soft_weight, hard
        elif what == "ignored labels":
            y = None if y is None else y.clamp(min=0)
        elif what == "mask":
            given.pop("mask", None)
        elif what == "teacher and student":
            s, t = (t.detach() + 0 * s, s.detach()) if soft else (s, t)
        return fastdistill.kd_loss(s, t, y, **given)

    return kd_loss


def has(what, call, x):
    """Whether the call has the setting at all."""
    soft = len(re.findall(r"soft_weight=0[,)]", call)) < call.count("kd_loss(")
    tempered = "temperature=" in call
    return {
        "T^2": soft and tempered,
        "temperature": soft,
        "divergence": soft,
        "reduction": True,
        "weights": True,
        "ignored labels": bool((x.y == -100).any()) and "y" in re.findall(r"\w+", call),
        "mask": "mask=" in call,
        "teacher and student": soft,
    }[what]


def test_every_row_has_a_formula_and_every_formula_a_row():
    assert list(TABLE) == list(PEERS)


@pytest.mark.parametrize("name", PEERS)
def test_coming_from(backend, name):
    x = namespace(PEERS[name].inputs)
    want = value_and_gradient(PEERS[name].formula, x)
    got = value_and_gradient(ours(TABLE[name]), x)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


SETTINGS = (
    "T^2", "temperature", "divergence", "reduction", "weights", "ignored labels", "mask",
    "teacher and student",
)  # fmt: skip


@pytest.mark.parametrize("name", PEERS)
def test_another_mapping_would_fail(name):
    peer, call = PEERS[name], TABLE[name]
    x = namespace(peer.inputs)
    want = value_and_gradient(peer.formula, x)
    turned = [w for w in SETTINGS if has(w, call, x) and w not in peer.same]
    assert len(turned) >= 1
    for what in turned:
        got = value_and_gradient(ours(call, turn_over(what)), x)
        assert differs(got, want), f"{name}: {what} turned over, and nothing changed"
    if "[:, :-1]" in call:
        other = call.replace("[:, :-1]", "[:, 1:]")
        assert differs(value_and_gradient(ours(other), x), want), f"{name}: the shift"


def test_the_shift_by_labels_alone_is_the_same(backend):
    """What the README says of a shift without slices of the logits."""
    x = namespace(sequences)
    kd_loss = fastdistill.kd_loss
    sliced = value_and_gradient(
        lambda x: kd_loss(x.s[:, :-1], x.t[:, :-1], x.y[:, 1:], hard_weight=0.5), x
    )
    whole = value_and_gradient(
        lambda x: kd_loss(x.s, x.t, F.pad(x.y[:, 1:], (0, 1), value=-100), hard_weight=0.5), x
    )
    for a, b in zip(sliced, whole, strict=True):
        torch.testing.assert_close(a, b)
