"""DistilBertLoss against the formulas of the script that DistilBERT was published with."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdistill.nn import DistilBertLoss

B, L, V, D = 3, 7, 11, 6


def inputs(dtype=torch.float64):
    g = torch.Generator().manual_seed(4)
    logits = [torch.randn(B, L, V, generator=g, dtype=dtype) for _ in range(2)]
    hidden = [torch.randn(B, L, D, generator=g, dtype=dtype) for _ in range(2)]
    mask = torch.arange(L) < torch.tensor([[7], [4], [2]])
    labels = torch.randint(V, (B, L), generator=g)
    labels[torch.rand(B, L, generator=g) < 0.5] = -100
    labels[~mask] = -100
    return (
        logits[0].requires_grad_(),
        logits[1],
        hidden[0].requires_grad_(),
        hidden[1],
        labels,
        mask,
    )


def published(s_logits, t_logits, s_hidden, t_hidden, labels, mask, restrict=False):
    """As distiller.py has it: torch's own losses on the tokens picked by masked_select."""
    keep = (labels > -1 if restrict else mask).unsqueeze(-1)
    s = torch.masked_select(s_logits, keep).view(-1, V)
    t = torch.masked_select(t_logits, keep).view(-1, V)
    ce = nn.KLDivLoss(reduction="batchmean")(F.log_softmax(s / 2.0, -1), F.softmax(t / 2.0, -1))
    mlm = nn.CrossEntropyLoss(ignore_index=-100)(s_logits.view(-1, V), labels.view(-1))
    s = torch.masked_select(s_hidden, mask.unsqueeze(-1)).view(-1, D)
    t = torch.masked_select(t_hidden, mask.unsqueeze(-1)).view(-1, D)
    cos = nn.CosineEmbeddingLoss(reduction="mean")(s, t, s.new_ones(len(s)))
    return 5.0 * ce * 2.0**2 + 2.0 * mlm + 1.0 * cos, (ce * 4, mlm, cos)


@pytest.mark.parametrize("restrict", [False, True])
@pytest.mark.parametrize("mask_type", [torch.bool, torch.int64])
def test_equals_the_published_script(backend, restrict, mask_type):
    *tensors, mask = inputs()
    loss = DistilBertLoss(restrict_to_labels=restrict, return_parts=True)
    found = loss(*tensors, mask.to(mask_type))
    wanted, parts = published(*tensors, mask, restrict)
    torch.testing.assert_close(found.loss, wanted, rtol=1e-9, atol=0)
    for mine, theirs in zip(found[1:], parts, strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-9, atol=0)
        assert not mine.requires_grad
    student = (tensors[0], tensors[2])
    for mine, theirs in zip(
        torch.autograd.grad(found.loss, student), torch.autograd.grad(wanted, student), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-12)


def test_padding_is_not_looked_at(backend):
    s, t, hs, ht, labels, mask = inputs()
    wanted = DistilBertLoss()(s, t, hs, ht, labels, mask)
    with torch.no_grad():
        for x in (s, t, hs, ht):
            x[~mask] = float("nan")
    found = DistilBertLoss()(s, t, hs, ht, labels, mask)
    torch.testing.assert_close(found, wanted)
    gradients = torch.autograd.grad(found, (s, hs))
    assert all(g.isfinite().all() and (g[~mask] == 0).all() for g in gradients)


def test_terms_of_weight_zero_are_left_out():
    s, t, hs, ht, labels, _ = inputs()
    soft = DistilBertLoss(task_weight=0, cosine_weight=0, return_parts=True)(s, t)
    kl = F.kl_div((s / 2).log_softmax(-1), (t / 2).softmax(-1), reduction="sum") / (B * L)
    torch.testing.assert_close(soft.loss, 5 * 4 * kl)
    assert float(soft.task) == float(soft.cosine) == 0
    task = DistilBertLoss(soft_weight=0, cosine_weight=0, task_weight=1)(s, t, labels=labels)
    torch.testing.assert_close(task, F.cross_entropy(s.view(-1, V), labels.view(-1)))
    assert "soft_weight=5" in repr(DistilBertLoss())


def test_the_teacher_gets_no_gradient():
    s, t, hs, ht, labels, mask = inputs()
    t.requires_grad_()
    ht.requires_grad_()
    DistilBertLoss()(s, t, hs, ht, labels, mask).backward()
    assert t.grad is None and ht.grad is None and s.grad is not None and hs.grad is not None


def test_bad_input():
    s, t, hs, ht, labels, mask = inputs()
    loss = DistilBertLoss()
    with pytest.raises(ValueError, match="labels: expected a tensor with task_weight=2"):
        loss(s, t, hs, ht)
    with pytest.raises(ValueError, match="teacher_hidden: expected a tensor with cosine_weight=1"):
        loss(s, t, hs, labels=labels)
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \[3, 7\]"):
        loss(s, t, hs, ht, labels, mask[:, :3])
    with pytest.raises(TypeError, match="attention_mask: expected bool or integers"):
        loss(s, t, hs, ht, labels, mask.float())
    with pytest.raises(ValueError, match="temperature: expected a number > 0"):
        DistilBertLoss(temperature=0)
    with pytest.raises(TypeError, match="task_weight: expected a number"):
        DistilBertLoss(task_weight=None)
