"""Which queries are chosen, and which teacher sees a record."""

import tracemalloc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdistill.distill.private import selection, shards
from fastdistill.distill.private.selection import STRATEGIES, select


def logits(n=300, classes=10, seed=0):
    return 2 * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_choices_are_different_rows_decided_by_the_seed(strategy, one_thread):
    x = logits()
    known = torch.arange(0, 300, 3)
    first = select(strategy, x, 50, seed=1, exclude=known)
    assert first.dtype is torch.int64 and first.shape == (50,) and len(first.unique()) == 50
    assert not torch.isin(first, known).any()
    torch.randn(7)  # no global state takes part
    assert torch.equal(first, select(strategy, x, 50, seed=1, exclude=known))
    # all that are left, in some order
    rest = select(strategy, x, 200, seed=1, exclude=known)
    assert torch.equal(rest.sort().values, torch.arange(300)[torch.arange(300) % 3 != 0])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ties_are_broken_by_the_seed(strategy, one_thread):
    """The student may know nothing yet: the choice must not be the first rows then."""
    x = torch.zeros(200, 4)
    chosen = [select(strategy, x, 20, seed=s) for s in (0, 1)]
    assert not torch.equal(chosen[0].sort().values, chosen[1].sort().values)
    assert chosen[0].max() >= 100


def test_margin_and_entropy_by_hand():
    p = torch.tensor([[0.5, 0.49, 0.01], [0.4, 0.3, 0.3], [0.9, 0.05, 0.05], [0.6, 0.2, 0.2]])
    assert select("margin", p.log(), 4, seed=0).tolist() == [0, 1, 3, 2]
    assert select("entropy", p.log(), 4, seed=0).tolist() == [1, 3, 0, 2]
    hot = torch.tensor([[4.0, 0.0, 0.0], [4.2, 4.0, -9.0]])  # at T = 100 both are nearly uniform
    assert select("entropy", hot, 1, seed=0).tolist() == [1]
    assert select("entropy", hot, 1, seed=0, temperature=100.0).tolist() == [0]


def test_k_center_covers_as_greedily_as_the_definition():
    x = logits(120, 5)
    p = x.softmax(1)
    known = torch.tensor([3, 50])
    chosen = select("k-center", x, 20, seed=0, exclude=known).tolist()
    centers = known.tolist()
    for row in chosen:
        distance = (p[:, None] - p[centers]).norm(dim=2).amin(1)
        assert float(distance[row]) == pytest.approx(float(distance.max()), abs=1e-6)
        centers.append(row)
    hard = select("k-center", x, 20, seed=0).tolist()
    assert len(set(hard)) == 20


def test_diverse_takes_uncertain_rows_of_every_group(one_thread):
    """Rows come in 30 groups of near copies, of which margin takes the same few again."""
    generator = torch.Generator().manual_seed(0)
    centers = 3 * torch.randn(30, 8, generator=generator)
    sizes = [400] + [5] * 29
    group = torch.repeat_interleave(torch.arange(30), torch.tensor(sizes))
    x = centers[group] + 0.001 * torch.randn(len(group), 8, generator=generator)
    uncertain = group[select("margin", x, 10 * 30, seed=0)].unique()
    margin, diverse = (group[select(s, x, 30, seed=0)].unique() for s in ("margin", "diverse"))
    assert len(margin) < len(uncertain)
    assert torch.equal(diverse, uncertain)


@pytest.mark.parametrize("block", [1, 1 << 22])
@pytest.mark.parametrize("strategy", ["diverse", "k-center"])
def test_blocks_do_not_change_the_choice(strategy, block, monkeypatch, one_thread):
    x, known = logits(), torch.arange(40)
    wanted = select(strategy, x, 30, seed=3, exclude=known)
    monkeypatch.setattr(selection, "BLOCK", block)
    assert torch.equal(wanted, select(strategy, x, 30, seed=3, exclude=known))


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("n,classes", [(50_000, 10), (100_000, 100)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_memory_is_bounded_by_the_pool_not_its_square(strategy, n, classes, one_thread):
    x = torch.randn(n, classes)
    bound = max(x.numel(), selection.BLOCK)
    with Largest() as largest:
        select(strategy, logits(), 10, seed=0)  # imports are not its memory
    tracemalloc.start()
    with Largest() as largest:
        select(strategy, x, 40, seed=0, exclude=torch.arange(0, n, 1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest.numel <= bound < n * n / 100
    assert peak < 64 << 20  # numpy's part, scikit-learn included


def test_refusals():
    x = logits()
    for arguments, error, wanted in (
        (("best", x, 5), ValueError, "strategy: expected one of random, margin, entropy, diverse"),
        (("margin", x, 301), ValueError, "count: expected at most 300 rows"),
        (("margin", x, 0), ValueError, "count: expected an int >= 1"),
        (("margin", x[0], 1), ValueError, "logits: expected a shape"),
        (("margin", x / 0, 1), ValueError, "expected finite values"),
        (("margin", x.long(), 1), TypeError, "logits: expected dtype"),
    ):
        with pytest.raises(error, match=wanted):
            select(*arguments, seed=0)
    with pytest.raises(ValueError, match=r"exclude: expected rows in \[0, 299\]"):
        select("margin", x, 1, seed=0, exclude=torch.tensor([300]))
    with pytest.raises(TypeError, match="exclude: expected int64"):
        select("margin", x, 1, seed=0, exclude=torch.ones(300, dtype=torch.bool))


def test_removing_a_record_moves_no_other_record():
    ids = [f"patient {i}" for i in range(1000)]
    before = shards.assign(ids, 7, "salt")
    where = {ids[row]: part for part, rows in enumerate(before) for row in rows}
    assert len(where) == 1000 and min(len(rows) for rows in before) > 100
    for gone in (0, 500, 999):
        left = ids[:gone] + ids[gone + 1 :]
        after = shards.assign(left, 7, "salt")
        now = {left[row]: part for part, rows in enumerate(after) for row in rows}
        assert now == {name: part for name, part in where.items() if name != ids[gone]}


def test_shards_depend_on_id_and_salt_alone():
    parts = {shards.shard_of("a", 1 << 30, salt) for salt in ("", "x", "y")}
    assert len(parts) == 3
    assert len({shards.shard_of(one, 1 << 30) for one in ("1", 1, b"1")}) == 3
    same = [p for p, rows in enumerate(shards.assign(["u", "v", "u"], 64)) for r in rows if r != 1]
    assert same[0] == same[1]  # a person's records are together
    with pytest.raises(TypeError, match="record_id: expected a str, bytes or int, got float"):
        shards.shard_of(1.0, 3)
    with pytest.raises(ValueError, match="k: expected an int >= 1"):
        shards.assign(["a"], 0)
