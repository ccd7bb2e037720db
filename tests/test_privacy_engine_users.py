"""PrivacyEngine: what people bring from Opacus that would be clipped or sampled wrongly."""

import warnings

import pytest
import torch
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
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        grad_sample_mode="ghost_fused",
        **settings,
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
