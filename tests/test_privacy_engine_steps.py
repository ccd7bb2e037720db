"""PrivacyEngine over many steps: noise, virtual steps, schedulers, sampling, resuming."""

import copy
import math
import warnings

import opacus
import privacy_checks as checks
import pytest
import torch
from opacus.schedulers import LambdaGradClip, LambdaNoise
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastdistill as fd
from fastdistill.privacy import mechanism
from fastdistill.privacy.engine import gradients, settings
from fastdistill.privacy.engine.sampling import PoissonSampler


@pytest.fixture(autouse=True)
def quiet(one_thread):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def private(n=64, batch=8, seed=None, model=None, engine=None, **arguments):
    """(engine, module, optimizer, criterion, loader)."""
    engine = engine or fd.privacy.PrivacyEngine(accountant="rdp")
    model = model or nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    data = TensorDataset(torch.randn(n, 5), torch.randint(3, (n,)))
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    made = engine.make_private(
        **{
            "module": model,
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
            "data_loader": DataLoader(data, batch_size=batch),
            "noise_multiplier": 1.0,
            "max_grad_norm": 1.0,
            "grad_sample_mode": "ghost_fused",
            "noise_generator": generator,
            **arguments,
        }
    )
    return engine, *made


def step(module, optimizer, criterion, x, y):
    optimizer.zero_grad()
    criterion(module(x), y).backward()
    optimizer.step()
    return torch.cat([p.grad.flatten() for p in optimizer.params])


def test_engine_is_opacus_to_opacus():
    engine, module, optimizer, criterion, loader = private()
    assert isinstance(engine, opacus.PrivacyEngine)
    assert isinstance(module, opacus.grad_sample.AbstractGradSampleModule)
    assert isinstance(module, opacus.grad_sample.GradSampleModuleFastGradientClipping)
    assert isinstance(optimizer, opacus.optimizers.DPOptimizer)
    assert isinstance(loader, opacus.data_loader.DPDataLoader)
    assert len(private(grad_sample_mode="hooks")[1:]) == 3
    assert len(private(grad_sample_mode="ghost")[1:]) == 4


@pytest.mark.parametrize("batch", [0, 1, 40])
def test_engine_noise_has_its_law_whatever_the_batch(batch):
    """N(0, (sigma C / expected)^2), and the batch's size is nowhere."""
    model = nn.Linear(5, 4000, bias=False)
    _, module, optimizer, criterion, _ = private(
        model=model, noise_multiplier=1.5, max_grad_norm=2.0, criterion=nn.MSELoss()
    )
    x = torch.zeros(min(batch, 40), 5)  # gradients are zero
    got = step(module, optimizer, criterion, x, torch.zeros(len(x), 4000))
    unit = 1.5 * 2.0 / 8
    checks.assert_normal(got / unit)
    again = step(module, optimizer, criterion, x, torch.zeros(len(x), 4000))
    assert not checks.correlated(got, again)


def test_engine_parameters_have_noise_of_their_own():
    model = nn.Sequential(nn.Linear(60, 60, bias=False), nn.Linear(60, 60, bias=False))
    _, module, optimizer, criterion, _ = private(model=model, criterion=nn.MSELoss())
    step(module, optimizer, criterion, torch.zeros(4, 60), torch.zeros(4, 60))
    first, second = (p.grad.flatten() for p in optimizer.params)
    assert not checks.correlated(first, second)


def test_engine_a_record_moves_the_sum_by_less_than_the_clip_norm():
    """In float32, with the others there, for records made large, tiny, and not finite."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    for clipping in ("flat", "per_layer"):
        for record in (torch.full((1, 5), 1e4), torch.randn(1, 5), torch.full((1, 5), 1e30)):
            _, module, optimizer, criterion, _ = private(
                model=copy.deepcopy(model), noise_multiplier=1e-6, clipping=clipping, seed=1
            )
            others, labels = torch.randn(7, 5) * 100, torch.randint(3, (8,))
            sums = []
            for x in (others, torch.cat([others, record])):
                optimizer.zero_grad()
                criterion(module(x), labels[: len(x)]).backward()
                sums.append(torch.cat([s.double().flatten() for s in optimizer._sums]))
            assert float((sums[1] - sums[0]).norm()) <= 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_engine_a_record_that_is_not_finite_counts_as_none(bad, clipping):
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    made = [
        private(model=copy.deepcopy(model), noise_multiplier=0.0, clipping=clipping)
        for _ in range(2)
    ]
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(3, (6,))
    want = step(*made[0][1:4], torch.cat([x[:3], x[4:]]), torch.cat([y[:3], y[4:]]))
    x[3, 2] = bad
    got = step(*made[1][1:4], x, y)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_engine_virtual_steps():
    """Physical batches add up to the logical one, with its noise once and one entry to account."""
    for sigma in (0.0, 1.0):
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        engine, module, optimizer, criterion, loader = private(
            model=copy.deepcopy(model), noise_multiplier=sigma, seed=3, batch=16
        )
        released = []
        for x, y in loader:
            released.append(step(module, optimizer, criterion, x.double(), y))
        torch.manual_seed(0)
        engine2, module, optimizer, criterion, loader2 = private(
            model=copy.deepcopy(model), noise_multiplier=sigma, seed=3, batch=16
        )
        loader2.dataset.tensors = loader.dataset.tensors
        manager = BatchMemoryManager(
            data_loader=loader2, max_physical_batch_size=3, optimizer=optimizer
        )
        virtual, physical = [], 0
        with manager as split:
            for x, y in split:
                optimizer.zero_grad()
                criterion(module(x.double()), y).backward()
                assert len(x) <= 3 and all(p.grad is None for p in optimizer.params)
                optimizer.step()
                physical += 1
                if not optimizer._is_last_step_skipped:
                    virtual.append(torch.cat([p.grad.flatten() for p in optimizer.params]))
        assert physical > len(virtual) == len(released) == 4
        for a, b in zip(released, virtual, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert engine.accountant.history == engine2.accountant.history == [(sigma, 0.25, 4)]


def test_engine_schedulers_reach_module_and_optimizer():
    engine, module, optimizer, criterion, _ = private(noise_multiplier=2.0, max_grad_norm=0.5)
    noise = LambdaNoise(optimizer, noise_lambda=lambda n: 1 / (n + 1))
    clip = LambdaGradClip(optimizer, scheduler_function=lambda n: 10.0**-n)
    x, y = torch.randn(8, 5) * 100, torch.randint(3, (8,))
    for n in range(3):
        assert module.max_grad_norm == optimizer.max_grad_norm == pytest.approx(0.5 * 10.0**-n)
        optimizer.zero_grad()
        criterion(module(x), y).backward()
        total = torch.cat([s.flatten() for s in optimizer._sums]).norm()
        assert total <= 8 * module.max_grad_norm
        if n == 1:
            clip.step()
            with pytest.raises(RuntimeError, match="max_grad_norm: expected what the batch began"):
                optimizer.step()
            clip.last_epoch -= 2
            clip.step()
        optimizer.zero_grad()
        step(module, optimizer, criterion, x, y)
        noise.step()
        clip.step()
    module.max_grad_norm = 7.0
    assert optimizer.max_grad_norm == 7.0
    assert [sigma for sigma, _, _ in engine.accountant.history] == pytest.approx([2, 1, 2 / 3])


def test_engine_poisson_sampler_is_secure_and_has_its_rate():
    """Seeds do not reach it; each sample comes with probability q, on its own."""
    drawn = []
    for _ in range(2):
        torch.manual_seed(1)
        sampler = PoissonSampler(num_samples=2000, sample_rate=0.3, steps=25)
        drawn.append([i for batch in sampler for i in batch])
    assert drawn[0] != drawn[1]
    for some in drawn:
        n, q = 25 * 2000, 0.3
        assert abs(len(some) - n * q) < checks.Z * math.sqrt(n * q * (1 - q))
    counts = torch.bincount(torch.tensor(drawn[0]), minlength=2000).double()
    assert abs(float(counts.var()) / (25 * 0.3 * 0.7) - 1) < checks.Z * math.sqrt(2 / 2000) * 1.2
    loader = private()[-1]
    assert loader.batch_sampler.generator is None
    own = DataLoader(
        TensorDataset(torch.randn(64, 5), torch.zeros(64).long()), batch_size=8,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    assert private(data_loader=own)[-1].batch_sampler.generator is None
    assert private(data_loader=own, seed=1)[-1].batch_sampler.generator is own.generator


def test_engine_empty_batches_come_out_of_the_loader():
    _, module, optimizer, criterion, loader = private(n=6, batch=1, steps=30, sample_rate=0.05,
                                                      expected_batch_size=1)  # fmt: skip
    sizes = []
    for x, y in loader:
        assert x.shape[1:] == (5,) and y.dtype is torch.int64
        sizes.append(len(x))
        assert step(module, optimizer, criterion, x, y).isfinite().all()
    assert len(sizes) == 30 and 0 in sizes


def test_engine_reproducible_runs_and_resumed_ones(tmp_path):
    """A seed repeats a run; a checkpoint goes on with other noise and the same account."""
    x, y = torch.randn(8, 5), torch.randint(3, (8,))
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    runs = [private(model=copy.deepcopy(model), seed=7) for _ in range(3)]
    first, same, more = (
        [step(*run[1:4], x, y) for _ in range(2)] for run in (runs[0], runs[1], runs[0])
    )
    assert torch.equal(first[0], same[0]) and torch.equal(first[1], same[1])
    engine, module, optimizer, _, _ = runs[0]
    path = tmp_path / "checkpoint.pt"
    engine.save_checkpoint(path=path, module=module, optimizer=optimizer)
    engine2, module2, optimizer2, criterion2, _ = runs[2]
    engine2.load_checkpoint(path=path, module=module2, optimizer=optimizer2)
    assert engine2.accountant.history == engine.accountant.history == [(1.0, 0.125, 4)]
    assert engine2.get_epsilon(1e-5) == engine.get_epsilon(1e-5)
    after = [step(module2, optimizer2, criterion2, x, y) for _ in range(2)]
    signal = torch.cat([p.grad.flatten() for p in optimizer.params])
    assert not any(torch.equal(a, b) for a in after for b in first + more)
    assert signal.isfinite().all()


def test_engine_epsilon_and_adjacency():
    engine, *_ = private(expected_batch_size=8, steps=3, sample_rate=0.1)
    assert engine.adjacency == "add/remove"
    engine = fd.privacy.PrivacyEngine(accountant="rdp")
    model = nn.Linear(5, 3)
    data = TensorDataset(torch.randn(64, 5), torch.randint(3, (64,)))
    module, optimizer, criterion, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=8),
        target_epsilon=3.0,
        target_delta=1e-5,
        epochs=2,
        max_grad_norm=1.0,
        grad_sample_mode="ghost_fused",
    )
    assert engine.adjacency == "zero-out"
    for _ in range(2):
        for x, y in loader:
            step(module, optimizer, criterion, x, y)
    assert 2.9 < engine.get_epsilon(1e-5) <= 3.0


def test_engine_pays_for_the_rounding_of_its_sums():
    """Float32 sums cost at most about a hundredth of the clip norm; more samples, shorter sums."""
    for expected in (1, 8, 256, 1024, 4096):
        s = settings.Settings(1.0, 1.0, expected, "mean", False)
        plan = s.plan(1000, True)
        lost = gradients.rounding(s.most, s.chunk)
        assert lost < 0.02 and plan.clip <= 1 - lost
        assert mechanism.plan(1.0, 1.0, expected, 1000, True).clip > plan.clip
    with pytest.raises(ValueError, match="expected_batch_size: .*float64"):
        settings.Settings(1.0, 1.0, 1e6, "mean", False).plan(1000, True)


def test_engine_adds_up_in_chunks():
    """More samples than one float32 sum may have: the same gradient, from shorter ones."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(60, 5), torch.randint(3, (60,))
    got = []
    for chunk in (1000, 7):
        _, module, optimizer, criterion, _ = private(
            model=copy.deepcopy(model), noise_multiplier=0.0, n=600, batch=60
        )
        optimizer.settings.chunk = chunk
        got.append(step(module, optimizer, criterion, x, y))
    torch.testing.assert_close(got[0], got[1], rtol=1e-5, atol=1e-6)


def test_engine_buffers_stay_within_the_budget():
    """Smaller batches fit in more layers: each kept the memory of the largest that fitted in it."""
    workspace, like = gradients.Workspace(4000), torch.zeros(1)
    for samples in (10, 5, 3, 2, 1):
        workspace.start()
        assert workspace.held() <= workspace.budget
        for layer in range(10):
            if workspace.fits(samples * 100, like):
                workspace.take(layer, (samples, 100), like)
        assert workspace.left >= 0
    workspace.start()
    assert workspace.held() <= workspace.budget


def test_engine_modules_can_be_copied_and_saved(tmp_path):
    """A copy (an average of weights, say) reports to a book of its own; a pickle loads."""
    _, module, optimizer, criterion, _ = private(seed=1)
    x, y = torch.randn(4, 5), torch.randint(3, (4,))
    other = copy.deepcopy(module)
    torch.save(module, tmp_path / "module.pt")
    loaded = torch.load(tmp_path / "module.pt", weights_only=False)
    for twin in (other, loaded):
        assert twin._book is not module._book and twin._book.model is twin
        torch.testing.assert_close(twin(x), module(x))
        with pytest.raises(RuntimeError, match="call the criterion"):
            twin(x).sum().backward()
        twin.eval()
        point = x.clone().requires_grad_()
        twin(point).sum().backward()  # in evaluation mode it is an ordinary model
        assert point.grad is not None
    before = [p.detach().clone() for p in other.parameters()]
    step(module, optimizer, criterion, x, y)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


def test_engine_can_be_called_again_on_what_it_made():
    """Phases of training: another noise, the same model, one account."""
    engine, module, optimizer, _, loader = private(noise_multiplier=1.0)
    again = private(engine=engine, model=module, optimizer=optimizer, noise_multiplier=2.0)
    assert again[1] is module and again[2].original_optimizer is optimizer.original_optimizer
    assert module.max_grad_norm == again[2].max_grad_norm
    x, y = torch.randn(4, 5), torch.randint(3, (4,))
    step(*again[1:4], x, y)
    assert engine.accountant.history == [(2.0, 0.125, 1)]
