"""PrivacyEngine: what people bring from Opacus that would be clipped or sampled wrongly."""

import warnings

import pytest
import torch
from opacus.layers import DPMultiheadAttention
from opacus.schedulers import ExponentialGradClip, ExponentialNoise
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import fastdistill as fd


@pytest.fixture(autouse=True)
def quietly(one_thread):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


DATA = TensorDataset(torch.randn(40, 3), torch.randint(2, (40,)))


def private(model=None, loader=None, **settings):
    model = nn.Linear(3, 2) if model is None else model
    return fd.privacy.PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(DATA, batch_size=8) if loader is None else loader,
        grad_sample_mode="ghost_fused",
        **{"noise_multiplier": 0.0, "max_grad_norm": 1.0, **settings},
    )


@pytest.mark.parametrize(
    "criterion",
    [nn.MSELoss(), nn.HuberLoss(), nn.HingeEmbeddingLoss(), nn.PoissonNLLLoss(), nn.KLDivLoss(),
     nn.functional.smooth_l1_loss],
    ids=str,
)  # fmt: skip
def test_engine_refuses_losses_of_all_pairs(criterion):
    """[B, 1] and [B] broadcast to [B, B]: each sample's loss would depend on all labels."""
    model, _, criterion, _ = private(nn.Linear(3, 1), criterion=criterion)
    x, y = torch.randn(4, 3), torch.rand(4)
    with pytest.raises(ValueError, match=r"one shape, got \[4, 1\] and \[4\]: .*depend on others"):
        criterion(model(x), y)
    criterion(model(x), y[:, None]).backward()


class Tokens(nn.Module):
    """A head on the tokens of a frozen body, flattened: no layer sees the samples."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Embedding(7, 3).requires_grad_(False), nn.Linear(3, 7)

    def forward(self, x):
        return self.head(self.body(x).reshape(-1, 3))


def test_engine_refuses_more_losses_than_samples():
    """Clipped token by token, a sample would count as often as it has tokens."""
    model, _, criterion, _ = private(Tokens())
    x = torch.randint(7, (4, 2))
    with pytest.raises(ValueError, match="criterion: .* at most 4 samples .* got 8"):
        criterion(model(x), x.view(-1)).backward()
    with pytest.raises(ValueError, match=r"got shape \[8, 3\].*shape=\(samples, tokens\)"):
        criterion(model(x), x.view(-1), shape=(4, 2)).backward()
    with torch.no_grad():  # a larger batch of validation does not excuse it
        model(torch.randint(7, (20, 2)))
    with pytest.raises(ValueError, match="criterion: .* at most 4 samples"):
        criterion(model(x), x.view(-1)).backward()


@pytest.mark.parametrize(
    "order",
    [
        dict(sampler=SubsetRandomSampler(range(20))),
        dict(sampler=WeightedRandomSampler(torch.ones(40), 40)),
        dict(sampler=RandomSampler(DATA, replacement=True)),
        dict(batch_sampler=[[0, 1], [2, 3]]),
    ],
    ids=["subset", "weighted", "replacement", "batches"],
)
def test_engine_refuses_an_order_that_poisson_sampling_would_drop(order):
    """Samples that were held out would be trained on, and nobody told."""
    order = {"batch_size": 8, **order} if "sampler" in order else order
    loader = DataLoader(DATA, **order)
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="data_loader: .*got .*: Poisson sampling draws from the"):
        private(model, loader)
    private(model, loader, poisson_sampling=False)


def test_engine_takes_the_ordinary_loaders():
    batches = BatchSampler(RandomSampler(DATA), 8, drop_last=True)
    for loader in (
        DataLoader(DATA, batch_size=8, shuffle=True, drop_last=True),
        DataLoader(DATA, batch_sampler=batches),
        private()[3],
    ):
        assert len(private(loader=loader)[3]) == 5


def test_engine_refuses_a_loader_without_indices_and_bags():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([])

    with pytest.raises(ValueError, match="data_loader: .*got an IterableDataset"):
        private(loader=DataLoader(Stream(), batch_size=8))
    with pytest.raises(ValueError, match=r"module: 1 \(EmbeddingBag\)"):
        private(nn.Sequential(nn.Linear(3, 3), nn.EmbeddingBag(3, 2)))


def test_engine_leaves_a_module_as_it_was_where_it_refuses():
    """So that a notebook's cell can be mended and run again."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    for wrong in (dict(criterion=len), dict(max_grad_norm=[1.0])):
        with pytest.raises((TypeError, ValueError)):
            fd.privacy.PrivacyEngine().make_private(
                module=model,
                optimizer=torch.optim.SGD(model.parameters()),
                data_loader=DataLoader(DATA, batch_size=8),
                grad_sample_mode="ghost_fused",
                **{"noise_multiplier": 1.0, "max_grad_norm": 1.0, **wrong},
            )
    bag = nn.Sequential(model, nn.EmbeddingBag(3, 2))
    with pytest.raises(ValueError, match="EmbeddingBag"):
        private(bag)
    wrapped, _, criterion, _ = private(model)
    criterion(wrapped(torch.randn(4, 3)), torch.randint(2, (4,))).backward()


def test_engine_makes_an_empty_batch_of_texts():
    class Texts(torch.utils.data.Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, i):
            return {"text": f"text {i}", "label": i % 2}

    loader = private(loader=DataLoader(Texts(), batch_size=8))[3]
    empty = loader.collate_fn([])
    assert empty["text"] == [] and empty["label"].shape == (0,)
    full = loader.collate_fn([Texts()[i] for i in range(3)])
    assert full["text"] == ["text 0", "text 1", "text 2"]


def test_engine_prints_a_loss():
    model, _, criterion, _ = private()
    loss = criterion(model(torch.zeros(4, 3)), torch.zeros(4, dtype=torch.long))
    assert f"{loss:.4f}" == f"{loss.item():.4f}" and f"{loss}" == repr(loss)


class Attends(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.attention, self.head = DPMultiheadAttention(4, 2, **settings), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0].mean(0))


def test_engine_refuses_attention_with_the_batch_elsewhere():
    """At T = B Opacus clips places in place of samples, and says nothing."""
    with pytest.raises(ValueError, match="attention: .*batch_first=True, .*got False"):
        private(Attends())
    with pytest.raises(ValueError, match="attention: .*batch_first=False, .*got True"):
        private(Attends(batch_first=True), batch_first=False, poisson_sampling=False)
    with pytest.raises(ValueError, match="attention: .*without add_bias_kv"):
        private(Attends(batch_first=True, add_bias_kv=True))
    private(Attends().requires_grad_(False))


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias_kv"])
def test_engine_clips_attention_by_samples_where_there_are_as_many_places(bias):
    model = Attends(add_bias_kv=bias)
    parameters = list(model.parameters())
    x, y = torch.randn(5, 5, 4), torch.randint(3, (5,))
    want = [torch.zeros_like(p) for p in parameters]
    for i in range(5):
        loss = nn.functional.cross_entropy(model(x[:, i : i + 1]), y[i : i + 1])
        grads = torch.autograd.grad(loss, parameters)
        norm = torch.cat([g.flatten() for g in grads]).norm()
        for total, grad in zip(want, grads, strict=True):
            total += grad * (0.1 / norm).clamp(max=1) / 8
    module, optimizer, criterion, _ = private(
        model, batch_first=False, poisson_sampling=False, expected_batch_size=8, steps=1,
        sample_rate=0.2, max_grad_norm=0.1,
    )  # fmt: skip
    criterion(module(x), y).backward()
    optimizer.step()
    for p, total in zip(parameters, want, strict=True):
        assert torch.allclose(p.grad, total, rtol=0.03, atol=1e-5)


def test_engine_resumes_schedules_where_they_were(tmp_path):
    """Opacus's start again from make_private's values."""

    def run():
        engine = fd.privacy.PrivacyEngine(accountant="rdp")
        model = nn.Linear(3, 2)
        module, optimizer, *_ = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(DATA, batch_size=8),
            noise_multiplier=2.0,
            max_grad_norm=1.0,
            grad_sample_mode="ghost_fused",
        )
        schedules = {
            "noise_scheduler": ExponentialNoise(optimizer, gamma=0.5),
            "grad_clip_scheduler": ExponentialGradClip(optimizer, gamma=0.25),
        }
        return engine, module, optimizer, schedules

    engine, module, _, schedules = run()
    for schedule in schedules.values():
        schedule.step()
    given = {"epoch": 3}
    path = tmp_path / "checkpoint.pt"
    engine.save_checkpoint(path=path, module=module, checkpoint_dict=given, **schedules)
    engine, module, optimizer, schedules = run()
    found = engine.load_checkpoint(path=path, module=module, **schedules)
    assert found["epoch"] == 3 and given == {"epoch": 3}
    assert (optimizer.noise_multiplier, optimizer.max_grad_norm) == (1.0, 0.25)
    for schedule in schedules.values():
        schedule.step()
    assert (optimizer.noise_multiplier, optimizer.max_grad_norm) == (0.5, 0.0625)
    engine, module, optimizer, _ = run()
    engine.load_checkpoint(path=path, module=module)
    assert (optimizer.noise_multiplier, optimizer.max_grad_norm) == (2.0, 1.0)


class Places(nn.Module):
    def __init__(self, expand):
        super().__init__()
        self.expand, self.places, self.head = expand, nn.Embedding(6, 3), nn.Linear(3, 2)

    def forward(self, x):
        places = torch.arange(x.shape[1])
        places = places.expand(len(x), -1) if self.expand else places
        return self.head((x + self.places(places)).mean(1))


@pytest.mark.parametrize("length", [4, 5], ids=["T = B", "T != B"])
def test_engine_refuses_places_that_samples_share(length):
    """Of one index a place, each place's gradient would be clipped as if it were a sample's."""
    x, y = torch.randn(4, length, 3), torch.randint(2, (4,))
    model, _, criterion, _ = private(Places(False))
    with pytest.raises(ValueError, match=r"module: places \(Embedding\): .*expand"):
        criterion(model(x), y).backward()
    model, _, criterion, _ = private(Places(True))
    criterion(model(x), y).backward()


def test_engine_takes_a_squeezed_output_of_one_sample():
    """Poisson batches have one sample at times."""
    model, _, criterion, _ = private(nn.Linear(3, 1), criterion=nn.MSELoss())
    for b in (0, 1, 3):
        loss = criterion(model(torch.randn(b, 3)).squeeze(), torch.randn(b))
        assert len(loss.loss_per_sample) == b
