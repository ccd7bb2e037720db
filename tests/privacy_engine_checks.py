"""What PrivacyEngine guarantees, as checks of any implementation of it.

test_privacy_engine_proof.py runs them on the engine; test_privacy_engine_mutations.py on engines
with one line broken, each of which has to fail the check that it should.
"""

from __future__ import annotations

import copy
import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.schedulers import LambdaGradClip, LambdaNoise
from opacus.utils.batch_memory_manager import BatchMemoryManager
from privacy_checks import Z, assert_normal, correlated, mu_lower_bound
from privacy_checks import norm as joint_norm
from private_models import CNN, Transformer, assert_close, by_samples
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastdistill as fd
from fastdistill.privacy import engine as room

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
SIZE, STEPS = 64, 8
EXPECTED = SIZE // STEPS


class Engine(NamedTuple):
    """An engine, and the module of its optimizer."""

    name: str = "fastdistill"
    engine: Any = room.PrivacyEngine
    sampling: ModuleType = room.sampling  # type: ignore[attr-defined]

    def private(self, model: nn.Module, sigma: float = 0.0, c: float = 1.0, **settings: Any):
        """(module, optimizer, criterion, loader) of `make_private`, of a copy of the model."""
        model = copy.deepcopy(model)
        budget = settings.pop("memory_budget", 1 << 28)
        given = settings.pop("loader", None)
        data = TensorDataset(torch.zeros(SIZE, 1), torch.zeros(SIZE))
        arguments = {
            "criterion": Weighted(),
            "poisson_sampling": False,
            "grad_sample_mode": "ghost_fused",
            **settings,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.engine(accountant="rdp", memory_budget=budget).make_private(
                module=model,
                optimizer=torch.optim.SGD(
                    [p for p in model.parameters() if p.requires_grad], lr=0.0
                ),
                data_loader=given or DataLoader(data, batch_size=EXPECTED),
                noise_multiplier=sigma,
                max_grad_norm=c,
                **arguments,
            )


class Weighted(nn.Module):
    """Losses whose gradients of the output are `w` itself: any record can be made."""

    reduction = "none"

    def forward(self, out: Tensor, w: Tensor) -> Tensor:
        return (out * w).flatten(1).sum(1)


class Run:
    """A private model, step by step."""

    def __init__(self, of: Engine, model: nn.Module, *args: Any, **settings: Any) -> None:
        self.module, self.optimizer, self.criterion, self.loader = of.private(
            model, *args, **settings
        )

    def backward(self, x: Tensor, w: Tensor, autocast: bool = False) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            self.criterion(self.module(x), w).backward()

    def sums(self, x: Tensor, w: Tensor, autocast: bool = False) -> list[Tensor]:
        """The clipped sums that a step would add noise to."""
        self.optimizer.zero_grad()
        self.backward(x, w, autocast)
        self.optimizer.clip_and_accumulate()
        found = [p.summed_grad.double() for p in self.optimizer.params]
        self.optimizer.zero_grad()
        return found

    def step(self, x: Tensor, w: Tensor, parts: int = 1) -> list[Tensor]:
        """What a step releases, in so many virtual ones."""
        for i, (some, weights) in enumerate(zip(x.chunk(parts), w.chunk(parts), strict=True)):
            self.optimizer.zero_grad()
            self.optimizer.signal_skip_step(do_skip=i < parts - 1)
            self.backward(some, weights)
            self.optimizer.step()
        return [p.grad.clone() for p in self.optimizer.params]

    def room(self, c: float) -> float:
        """What the rounding to the public grid leaves of C."""
        plan = self.optimizer.settings.plan(sum(p.numel() for p in self.optimizer.params), True)
        return c - plan.grid * math.sqrt(sum(p.numel() for p in self.optimizer.params))


def seeded(seed: int = 5) -> torch.Generator:
    """Frozen noise."""
    return torch.Generator().manual_seed(seed)


def mlp(dtype: torch.dtype = F64) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)).to(dtype)


def records(n: int, *shape: int, outputs: Sequence[int] = (5,)) -> tuple[Tensor, Tensor]:
    """Inputs, and output gradients of sizes on both sides of the clip norm."""
    size = torch.logspace(-2, 2, max(n, 1), dtype=F64)[:n].view(-1, *(1,) * len(outputs))
    return torch.randn(n, *shape, dtype=F64), size * torch.randn(n, *outputs, dtype=F64)


class Tied(nn.Module):
    """An embedding that is the output layer as well."""

    def __init__(self, vocabulary: int = 7, width: int = 4) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary, False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x))


class Twice(nn.Module):
    """One layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.layer(x).tanh()))


def check_formula(of: Engine) -> None:
    """Without noise: micro-batches of one, in float64, for every kind of layer."""
    tokens = torch.randint(7, (5, 6))
    for model, x, w in (
        (mlp(), *records(7, 6)),
        (Twice().double(), *records(7, 6)),
        (CNN().double(), *records(4, 2, 7, 6, outputs=(4,))),
        (Tied().double(), tokens, records(5, outputs=(6, 7))[1]),
        (Tied().double(), torch.randint(7, (3, 40)), records(3, outputs=(40, 7))[1]),
        (Transformer(length=6, padding=2).double(), tokens, records(5, outputs=(6, 13))[1]),
        (Transformer(length=40).double(), *_long(3, 40)),
    ):
        want = by_samples(model, (x, w), 0.7, loss=lambda out, w: (out * w).sum(), divide=EXPECTED)
        for budget in (1 << 28, 0):
            run = Run(of, model, c=0.7, memory_budget=budget)
            assert_close(run.step(x, w), want)


def _long(n: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.randint(13, (n, length)), records(n, outputs=(length, 13))[1]


class Case(NamedTuple):
    """A layer, and a record of it."""

    model: nn.Module
    x: Tensor
    w: Tensor
    budget: int = 1 << 28
    autocast: bool = False


def single_records() -> list[Case]:
    """Layers in every form that the cost rule knows; half types and autocast."""

    def case(model: nn.Module, x: Tensor, dtype: torch.dtype, **settings: Any) -> Case:
        model = model.to(dtype)
        x = x.to(dtype) if x.is_floating_point() else x
        with torch.no_grad():
            w = torch.randn_like(model(x))
        return Case(model, x, w, **settings)

    out = []
    for dtype in (F32, BF16, F64):
        out += [
            case(nn.Linear(9, 8), torch.randn(1, 9), dtype),
            case(nn.Linear(9, 8), torch.randn(1, 3, 9), dtype),
            case(nn.Linear(9, 8), torch.randn(1, 40, 9), dtype),
            case(nn.Linear(9, 8), torch.randn(1, 40, 9), dtype, budget=0),
            case(nn.Linear(2, 3), torch.randn(1, 20, 2), dtype),
            case(nn.Conv2d(2, 3, 3), torch.randn(1, 2, 5, 5), dtype),
            case(nn.Conv2d(2, 4, 3, groups=2), torch.randn(1, 2, 5, 5), dtype, budget=0),
            case(nn.Embedding(7, 5), torch.randint(7, (1, 6)), dtype),
            case(nn.LayerNorm(6), torch.randn(1, 4, 6), dtype),
            case(nn.GroupNorm(2, 4), torch.randn(1, 4, 6), dtype),
            case(Tied(), torch.randint(7, (1, 5)), dtype),
        ]
    out.append(case(nn.Linear(9, 8), torch.randn(1, 9), F32, autocast=True))
    out.append(case(nn.Linear(9, 8), torch.randn(1, 40, 9), F32, autocast=True))
    return out


def check_sensitivity(of: Engine, tries: int = 12) -> None:
    """No record adds more than C less what the grid takes: a search uphill from random ones."""
    _search(of, single_records(), tries)


def check_autocast(of: Engine) -> None:
    """Nor on the backend whose products are torch's, under autocast."""
    with fd.backend("reference"):
        _search(of, [case for case in single_records() if case.autocast], 12)


def _search(of: Engine, cases: Sequence[Case], tries: int) -> None:
    for case in cases:
        run = Run(of, case.model, sigma=1.0, c=0.75, memory_budget=case.budget)
        best, worst = (case.x, case.w), 0.0
        for i in range(tries):
            x, w = best
            if i % 4 == 0:
                x, w = case.x, torch.randn_like(case.w) * 10.0 ** (i // 2)
            elif x.is_floating_point():
                x = x * (1 + torch.randn_like(x) * 0.1)
            else:
                w = w * (1 + torch.randn_like(w) * 0.1)
            size = joint_norm(*run.sums(x, w, case.autocast))
            assert size <= run.room(0.75), (case.model, case.w.dtype, size / 0.75)
            if size > worst:
                best, worst = (x, w), size
        assert worst > 0.7


def check_neighbours(of: Engine) -> None:
    """With the others of a batch, in float32: sums that one record is in, and is not."""
    for size in (1, 2, 40):
        model = mlp(F32)
        x, w = (t.float() for t in records(size, 6))
        run = Run(of, model, sigma=1.0)
        one, weight = torch.randn(1, 6), 1e3 * torch.randn(1, 5)
        alone, both = run.sums(x, w), run.sums(torch.cat([x, one]), torch.cat([w, weight]))
        apart = joint_norm(*(a - b for a, b in zip(alone, both, strict=True)))
        assert 0.99 < apart <= run.room(1.0), apart
    run = Run(of, nn.Linear(1, 1, bias=False), sigma=1.0)
    for _ in range(40):  # all rounded anew when a record comes first
        x, w = torch.ones(60, 1), 0.5 + torch.rand(60, 1)
        w[0] = 9.0
        (alone,), (both,) = run.sums(x[1:], w[1:]), run.sums(x, w)
        assert (both - alone).abs() <= run.room(1.0), float(both - alone)


def cancelling(
    length: int, inputs: int, outputs: int, eps: float, size: float = 1e4
) -> tuple[Tensor, Tensor]:
    """Rows in pairs that all but cancel: what is left is as small as the rounding of a product."""
    a = torch.randn(1, length // 2, inputs) * size
    g = torch.randn(1, length // 2, outputs) * size
    return (
        torch.cat([a, a * (1 + eps * torch.randn_like(a))], 1),
        torch.cat([g, -g * (1 + eps * torch.randn_like(g))], 1),
    )


def check_cancellation(of: Engine) -> None:
    """What cancels inside a record: its norm is never less than that of what is added."""
    for length in (2, 8, 30, 64):
        sizes = [(32, 32, 1e-7), (48, 40, 0.0), (3, 3, 1e-9)]
        sizes += 6 * [(32, 32, 1e-5)] + 12 * [(5, 4, 1e-7)]
        for inputs, outputs, eps in sizes:
            x, w = cancelling(length, inputs, outputs, eps)
            run = Run(of, nn.Linear(inputs, outputs, bias=False), sigma=1.0, memory_budget=0)
            far = cancelling(length, inputs, outputs, 0.0, 1e15)
            for record in ((x, w), far):
                (got,) = run.sums(*record)
                assert got.norm() <= run.room(1.0), (length, inputs, float(got.norm()))
            # By what the sum is of, not only by what has been computed of it.
            exact = (w.double().mT @ x.double())[0]
            taken = _factor_of(run, x, w) * exact
            assert taken.norm() <= 1, (length, inputs, float(taken.norm()))


def check_cancellation_of_convolutions(of: Engine) -> None:
    """Likewise where a convolution's products are made twice."""
    for _ in range(12):
        a, g = cancelling(24, 3, 4, 1e-7)
        x, w = a.mT.contiguous(), g.mT.contiguous()  # one position of the kernel: channels by rows
        run = Run(of, nn.Conv1d(3, 4, 1, bias=False), sigma=1.0, memory_budget=0)
        (got,) = run.sums(x, w)
        taken = _factor_of(run, x, w) * (w.double() @ x.double().mT)
        assert got.norm() <= run.room(1.0) and taken.norm() <= 1, float(taken.norm())


def _factor_of(run: Run, x: Tensor, w: Tensor) -> float:
    """The clip factor of a record."""
    with torch.no_grad():
        optimizer, found = run.optimizer, []
        factors = optimizer._factors

        def spy(*args: Any) -> Any:
            found.extend(factors(*args))
            return found

        optimizer._factors = spy
        try:
            with torch.enable_grad():
                run.backward(x, w)
        finally:
            del optimizer._factors
        optimizer.zero_grad()
    return float(found[0])


def check_far(of: Engine) -> None:
    """Inputs up to the largest float32: their factors are so small that products lose bits."""
    for c in (1.0, 1e-3, 1e-6):
        for power in [60, 70, 78, 82, 90, 100, *[120, 126] * 8]:
            run = Run(of, nn.Linear(3, 3, bias=False), sigma=1.0, c=c)
            x, w = torch.full((1, 3), 2.0**power) * (1 + torch.rand(1, 3)), torch.rand(1, 3)
            (got,) = run.sums(x, w)
            assert got.norm() <= run.room(c), (c, power, float(got.norm()) / c)


def check_tied(of: Engine) -> None:
    """The two uses of a table point the same way: twice as far as their norms say."""
    tokens = torch.arange(3)[None]
    w = 1e3 * nn.functional.one_hot(tokens, 7).double()
    for budget in (1 << 28, 0):
        for length in (1, 3, 40):
            x, g = tokens.repeat(1, 14)[:, :length], w.repeat(1, 14, 1)[:, :length]
            run = Run(of, Tied().double(), sigma=1.0, memory_budget=budget)
            assert 0.99 < joint_norm(*run.sums(x, g)) <= run.room(1.0)


def check_replay(of: Engine) -> None:
    """Neighbours under the same noise differ by the record alone: the batch's size is no input."""
    model, (x, w) = mlp(), records(9, 6)
    for reduction in ("mean", "sum"):
        for clipping in ("flat", "per_layer"):

            def run(x: Tensor, w: Tensor, sigma: float = 1.0) -> list[Tensor]:
                settings = dict(loss_reduction=reduction, clipping=clipping)  # noqa: B023
                return Run(of, model, sigma, noise_generator=seeded(), **settings).step(x, w)

            whole = run(x, w)
            zeros = torch.cat([w, torch.zeros(30, 5, dtype=F64)])
            padded = run(torch.cat([x, torch.randn(30, 6, dtype=F64)]), zeros)
            assert _same(whole, padded), "records of gradient zero changed the release"
            noise = run(x[:0], w[:0])
            assert _same(noise, run(x, 0 * w)), "an empty batch is another release"
            without, only = run(x[:-1], w[:-1]), run(x[-1:], w[-1:], sigma=0.0)
            room = 0.01 / (EXPECTED if reduction == "mean" else 1)
            for a, b, c in zip(whole, without, only, strict=True):
                assert (a - b - c).norm() <= room
            assert max(float(c.norm()) for c in only) > 10 * room


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check_not_finite(of: Engine) -> None:
    """A record with a NaN or an infinity anywhere contributes exactly zero, in every method."""
    for model, x, w, budget in (
        (mlp(), *records(6, 6), 1 << 28),
        (nn.Linear(6, 5).double(), *records(6, 3, 6, outputs=(3, 5)), 1 << 28),
        (nn.Linear(6, 5).double(), *records(6, 40, 6, outputs=(40, 5)), 1 << 28),
        (nn.Linear(6, 5).double(), *records(6, 40, 6, outputs=(40, 5)), 0),
        (CNN().double(), *records(6, 2, 7, 6, outputs=(4,)), 1 << 28),
        (CNN().double(), *records(6, 2, 7, 6, outputs=(4,)), 0),
        (nn.LayerNorm(6).double(), *records(6, 6, outputs=(6,)), 1 << 28),
        (Tied().double(), torch.randint(7, (6, 5)), records(6, outputs=(5, 7))[1], 0),
    ):
        for clipping in ("flat", "per_layer"):

            def run(x: Tensor, w: Tensor) -> list[Tensor]:
                settings = dict(clipping=clipping, memory_budget=budget)  # noqa: B023
                run = Run(of, model, 1.0, noise_generator=seeded(), **settings)  # noqa: B023
                return run.step(x, w)

            zero = w.clone()
            zero[2] = 0
            want = run(x, zero)
            assert all(g.isfinite().all() for g in want)
            for bad in (math.nan, math.inf):
                spoilt = w.clone()
                spoilt[2].flatten()[1] = bad
                assert _same(run(x, spoilt), want), (model, bad, "output gradient")
                if x.is_floating_point():
                    inputs = x.clone()
                    inputs[2].flatten()[1] = bad
                    assert _same(run(inputs, w), want), (model, bad, "input")


def check_virtual(of: Engine) -> None:
    """Virtual steps release the bits of one big batch: one draw, one entry in the account."""
    model, (x, w) = mlp(), records(12, 6)
    runs = [Run(of, model, 1.0, noise_generator=seeded()) for _ in range(2)]
    hooks: list[int] = []
    for run, parts in zip(runs, (1, 4), strict=True):
        run.optimizer.attach_step_hook(lambda optimizer: hooks.append(1))
        run.released = [run.step(x, w, parts) for _ in range(3)]
    for a, b in zip(runs[0].released, runs[1].released, strict=True):
        assert _same(a, b), "virtual steps release something else"
    assert len(hooks) == 6
    assert not _same(runs[0].released[0], runs[0].released[1])


def zeros(n: int = 4) -> tuple[Tensor, Tensor]:
    """Records without gradient, for `wide_model`."""
    return torch.zeros(n, 200), torch.zeros(n, 200)


def wide_model() -> nn.Module:
    return nn.Sequential(*(nn.Linear(200, 200, bias=False) for _ in range(2)))


def check_noise(of: Engine) -> None:
    """N(0, (sigma C / expected)^2), also after virtual steps and of empty batches; independent."""
    c, sigma = 0.5, 1.5
    for settings in (
        {}, dict(noise_generator=seeded()), dict(clipping="per_layer"), dict(loss_reduction="sum"),
    ):  # fmt: skip
        unit = sigma * c / (1 if "loss_reduction" in settings else EXPECTED)
        run = Run(of, wide_model(), sigma, c, **settings)
        x, w = zeros()
        drawn = [run.step(x, w), run.step(x, w, 4), run.step(x[:0], w[:0])]
        all_of = [t / unit for step in drawn for t in step]
        for i, a in enumerate(all_of):
            assert_normal(a)
            for b in all_of[:i]:
                assert not correlated(a, b), "two parameters or steps share noise"


def check_secrecy(of: Engine) -> None:
    """Without a generator, no seed of torch's repeats the noise."""
    drawn = []
    for _ in range(2):
        torch.manual_seed(4)
        drawn.append(Run(of, wide_model(), 1.0).step(*zeros())[0])
    assert not torch.equal(*drawn)


def check_per_layer(of: Engine) -> None:
    """Each parameter gets C / sqrt(L), together C; what a layer does not use stays unused."""
    model = mlp()
    x, w = torch.ones(1, 6, dtype=F64), torch.full((1, 5), 1e4, dtype=F64)
    run = Run(of, model, sigma=1.0, c=0.6, clipping="per_layer")
    sums = run.sums(x, w)
    assert joint_norm(*sums) <= run.room(0.6)
    for s in sums:
        assert 0.99 * 0.3 < s.norm() <= 0.3


def check_schedule(of: Engine) -> None:
    """Clip norm and noise are changed in one place: the samples and the noise follow alike."""
    model = wide_model()
    x, w = torch.randn(1, 200), 1e3 * torch.randn(1, 200)
    for start, factor in ((1.0, 0.1), (0.1, 10.0)):
        run = Run(of, model, sigma=1.0, c=start)
        clip = LambdaGradClip(run.optimizer, scheduler_function=lambda k: factor**k)  # noqa: B023
        noise = LambdaNoise(run.optimizer, noise_lambda=lambda k: 2.0**k)
        run.step(x, w)
        clip.step()
        noise.step()
        c = start * factor
        assert math.isclose(run.optimizer.max_grad_norm, c)
        assert math.isclose(run.module.max_grad_norm, c)
        run.module.max_grad_norm = c = c / 2
        assert 0.99 * c < joint_norm(*run.sums(x, w)) <= c
        for got in run.step(*zeros()):
            assert_normal(got / (2.0 * c / EXPECTED))


def check_rollback(of: Engine) -> None:
    """After a checkpoint is loaded, no noise that has been drawn is drawn again."""
    model, (x, w) = wide_model(), zeros()
    generator = seeded()
    state = generator.get_state()
    engine = of.engine(accountant="rdp")

    def start() -> tuple[Any, Any, Any]:
        copied = copy.deepcopy(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return engine.make_private(
                module=copied, optimizer=torch.optim.SGD(copied.parameters(), lr=0.0),
                criterion=Weighted(), noise_multiplier=1.0, max_grad_norm=1.0,
                data_loader=DataLoader(engine.dataset or TensorDataset(torch.zeros(SIZE, 1)), 8),
                noise_generator=generator, grad_sample_mode="ghost_fused",
            )[:3]  # fmt: skip

    def step(made: tuple[Any, Any, Any]) -> Tensor:
        module, optimizer, criterion = made
        optimizer.zero_grad()
        criterion(module(x), w).backward()
        optimizer.step()
        return optimizer.params[0].grad.clone()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        made = start()
        engine.save_checkpoint(path=path, module=made[0], optimizer=made[1])
        first = step(made)
        spent = engine.get_epsilon(1e-5)
        generator.set_state(state)
        assert torch.equal(step(made), first)  # what would happen without a load
        for again in (made, start()):
            generator.set_state(state)
            engine.load_checkpoint(path=path, module=again[0], optimizer=again[1])
            assert engine.get_epsilon(1e-5) < spent
            assert not correlated(step(again), first), "noise of before is used again"


def check_sampler(of: Engine) -> None:
    """Each record's inclusion is Bernoulli(q) of its own, from bits that no seed gives."""
    n, rate, steps = 400, 0.07, 600

    def draw(generator: torch.Generator | None = None) -> Tensor:
        sampler = of.sampling.PoissonSampler(
            num_samples=n, sample_rate=rate, steps=steps, generator=generator
        )
        out = torch.zeros(steps, n, dtype=F64)
        for i, batch in enumerate(sampler):
            assert batch == sorted(set(batch))
            out[i, batch] = 1
        return out

    torch.manual_seed(3)
    first = draw()
    torch.manual_seed(3)
    assert not torch.equal(draw(), first), "the seed of torch repeats the sampler"
    assert torch.equal(draw(seeded()), draw(seeded()))
    for drawn in (first, draw(seeded())):
        unit = (drawn - rate) / math.sqrt(rate * (1 - rate))
        assert abs(float(unit.sum())) < Z * math.sqrt(unit.numel()), "rate"
        for dim, other in ((0, steps), (1, n)):  # each record's, and each batch's, count
            spread = (unit.sum(dim).square() / other).sum() - unit.shape[1 - dim]
            assert abs(float(spread)) < 1.1 * Z * math.sqrt(2 * unit.shape[1 - dim]), "spread"
        assert not correlated(unit[:, 1:], unit[:, :-1]), "records of a batch"
        assert not correlated(unit[1:], unit[:-1]), "batches"


def check_loader(of: Engine) -> None:
    """Through make_private: secure unless told otherwise, even where torch is seeded."""
    for secure in (False, True):

        def draw(**settings: Any) -> list[list[float]]:
            torch.manual_seed(3)
            data = TensorDataset(torch.arange(100.0)[:, None], torch.zeros(100))
            model = nn.Linear(1, 1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loader = of.engine(accountant="rdp", secure_mode=secure).make_private(  # noqa: B023
                    module=model, optimizer=torch.optim.SGD(model.parameters()),
                    data_loader=DataLoader(data, 20, generator=seeded(), shuffle=True),
                    noise_multiplier=1.0, max_grad_norm=1.0, grad_sample_mode="ghost_fused",
                    **settings,
                )[3]  # fmt: skip
            return [x.flatten().tolist() for x, _ in loader]

        assert draw() != draw(), "the sampler of a secure run is seeded"
    assert len(draw()) == 5


def check_accountant(of: Engine) -> None:
    """The accountant has exactly the steps taken; epsilon is Opacus's for the same history."""
    for name, opacus_s in (("rdp", RDPAccountant), ("prv", PRVAccountant)):
        engine = of.engine(accountant=name)
        data = TensorDataset(torch.randn(100, 6), torch.randn(100, 5))
        model = mlp(F32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module, optimizer, criterion, loader = engine.make_private(
                module=model, optimizer=torch.optim.SGD(model.parameters(), 0.1),
                criterion=Weighted(), data_loader=DataLoader(data, 20), noise_multiplier=1.1,
                max_grad_norm=1.0, grad_sample_mode="ghost_fused",
            )  # fmt: skip
        ends = 0
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=6, optimizer=optimizer
        ) as batches:
            for x, w in batches:
                ends += not optimizer._step_skip_queue[0]
                optimizer.zero_grad()
                criterion(module(x), w).backward()
                optimizer.step()
        assert ends == 5
        assert engine.accountant.history == [(1.1, 0.2, 5)]
        want = opacus_s()
        want.history = [(1.1, 0.2, 5)]
        assert engine.get_epsilon(1e-5) == want.get_epsilon(1e-5)
        assert engine.accountant.mechanism() == name


def check_debit(of: Engine) -> None:
    """Nothing is released that has not been debited: the account comes before the noise."""

    def fail(optimizer: Any) -> None:
        raise OSError("the ledger cannot be written")

    run = Run(of, mlp(), 1.0)
    run.optimizer.attach_step_hook(fail)
    run.optimizer.zero_grad()
    run.backward(*records(3, 6))
    try:
        run.optimizer.step()
    except OSError:
        assert all(p.grad is None for p in run.optimizer.params), "released, but not debited"
        return
    raise AssertionError("the account was not asked")


def check_refusals(of: Engine) -> None:
    """What would not be what the accountant says."""
    model = nn.Linear(3, 2)
    for settings in (dict(clipping="adaptive"), dict(rand_on_empty=True), dict(wrap_model=False)):
        _refused(lambda settings=settings: of.private(model, 1.0, **settings))
    _refused(lambda: of.engine(accountant="gdp"))
    secure = of._replace(
        engine=lambda memory_budget, accountant: of.engine(
            accountant=accountant, secure_mode=True, memory_budget=memory_budget
        )
    )
    _refused(lambda: secure.private(model, 1.0, noise_generator=seeded()))
    run = Run(of, mlp(), 1.0)
    x, w = records(3, 6)
    run.backward(x, w)
    _refused(lambda: run.backward(x, w))  # sums that no step has taken
    run.optimizer.step()
    _refused(lambda: run.backward(x, w))  # no zero_grad
    run = Run(of, mlp(), 1.0)
    run.optimizer.signal_skip_step(do_skip=True)
    run.backward(x, w)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.optimizer.max_grad_norm = 0.1  # in the middle of a logical batch
    _refused(lambda: run.backward(x, w))
    run = Run(of, mlp(), 1.0)
    _refused(lambda: run.backward(*records(80, 6)))  # of 8 expected
    run = Run(of, Outside(), 1.0)
    _refused(lambda: run.backward(torch.randn(3, 5), torch.randn(3, 5)))


class Outside(nn.Module):
    """A weight that is used where no layer sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.layer(x), self.layer.weight)


def _refused(call: Callable[[], Any]) -> None:
    try:
        call()
    except (ValueError, RuntimeError):
        return
    raise AssertionError("not refused")


class Difference(nn.Module):
    """Two rows of weights: a canary moves one coordinate of each, in opposite directions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(width, 1, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) - self.b(x)


def check_audit(of: Engine) -> None:
    """White-box audit in Gaussian DP: what canaries show is near 1 / sigma and never beyond.

    Each canary is a record of one coordinate, or of one in each of two tensors, whose difference is
    free of noise if the tensors share a counter.
    """
    sigma, rounds, present, width = 1.0, 160, 128, 1024
    x, w = torch.eye(width)[:present], torch.full((present, 1), 10.0)
    both = dict(loss_reduction="sum", expected_batch_size=present, sample_rate=0.5, steps=1)
    single = Run(of, nn.Linear(width, 1, bias=False), sigma, **both)
    double = Run(of, Difference(width), sigma, **both)
    alone = torch.cat([single.step(x, w)[0] for _ in range(rounds)])
    pairs = [double.step(x, w) for _ in range(rounds)]
    across = torch.cat([(a - b) / math.sqrt(2) for a, b in pairs])
    for scores in (alone, across):
        mu = mu_lower_bound(scores[:, :present].flatten(), scores[:, present:].flatten())
        assert 0.85 / sigma <= mu <= 1 / sigma, mu


CHECKS = [
    check_formula, check_sensitivity, check_autocast, check_neighbours, check_cancellation,
    check_cancellation_of_convolutions, check_far, check_tied, check_replay, check_not_finite,
    check_virtual, check_noise, check_secrecy, check_per_layer, check_schedule, check_rollback,
    check_sampler, check_loader, check_accountant, check_debit, check_refusals, check_audit,
]  # fmt: skip
