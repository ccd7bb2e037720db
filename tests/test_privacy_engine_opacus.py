"""Opacus's defects that the engine is without, as they are; and Opacus's signatures."""

import inspect
import warnings

import opacus
import pytest
import torch
from opacus.schedulers import LambdaGradClip
from private_models import Transformer, assert_close, ours, theirs
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastdistill as fd

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


@pytest.fixture(autouse=True)
def quietly(one_thread):
    yield


def made(engine, mode):
    model = nn.Linear(3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(TensorDataset(torch.zeros(64, 1)), batch_size=8),
            noise_multiplier=0.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            grad_sample_mode=mode,
        )


def engines():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fd.privacy.PrivacyEngine(accountant="rdp"), opacus.PrivacyEngine(accountant="rdp")


@pytest.mark.parametrize(
    "name",
    ["make_private", "make_private_with_epsilon", "load_checkpoint", "save_checkpoint",
     "get_epsilon", "is_compatible", "validate"],
)  # fmt: skip
def test_engine_signatures(name):
    a, b = (
        inspect.signature(getattr(c, name)).parameters
        for c in (fd.privacy.PrivacyEngine, opacus.PrivacyEngine)
    )
    assert list(a) == list(b)
    assert [p.kind for p in a.values()] == [p.kind for p in b.values()]


def test_engine_returns_as_many_as_opacus():
    ours_, theirs_ = engines()
    assert len(made(ours_, "ghost_fused")) == len(made(theirs_, "ghost")) == 4
    assert len(made(ours_, "hooks")) == len(made(theirs_, "hooks")) == 3


def test_engine_scheduler_of_the_clip_norm():
    """Opacus's ghost goes on clipping to the norm before; ten times what the noise is of."""
    seen = []
    for engine, mode in zip(engines(), ("ghost_fused", "ghost"), strict=True):
        module, optimizer, criterion, _ = made(engine, mode)
        LambdaGradClip(optimizer, scheduler_function=lambda k: 0.1 if k else 1.0).step()
        assert optimizer.max_grad_norm == pytest.approx(0.1)
        optimizer.zero_grad()
        x = 100 * torch.randn(1, 3)
        with torch.no_grad():
            wrong = 1 - module(x).argmax(1)
        criterion(module(x), wrong).backward()
        optimizer.step()
        grads = torch.cat([p.grad.flatten() for p in optimizer.params])
        seen.append(float(grads.norm()) * 8)
    assert seen[0] <= 0.1 < 0.9 < seen[1]


def test_engine_padding_that_opacus_counts():
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        model = Transformer(padding=0)
        x = torch.randint(1, 13, (6, 5))
        x[:, 3:] = 0

        def call(m, c, x, y):
            return c(m(x).transpose(1, 2), y)

        got, hooks = (run(model, [(x, x)], call=call) for run in (ours, theirs))
        assert not got[0][0].any() and hooks[0][0].any()
        with pytest.raises(AssertionError):
            assert_close(got, hooks)
    finally:
        torch.set_default_dtype(torch.float32)


def test_engine_refuses_modules_that_are_wrapped():
    from opacus.grad_sample import GradSampleModule

    engine, _ = engines()
    model = nn.Linear(3, 2)
    wrapped = GradSampleModule(model)
    with pytest.raises(
        (ValueError, TypeError), match="module: expected the plain module, got GradSampleModule"
    ):
        engine.make_private(
            module=wrapped,
            optimizer=torch.optim.SGD(wrapped.parameters(), lr=0.1),
            data_loader=DataLoader(TensorDataset(torch.zeros(64, 1)), batch_size=8),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            grad_sample_mode="ghost_fused",
        )


def test_engine_with_epsilon_refuses_other_sampling():
    engine, _ = engines()
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="poisson_sampling: expected True"):
        engine.make_private_with_epsilon(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(TensorDataset(torch.zeros(64, 1)), batch_size=8),
            target_epsilon=1.0,
            target_delta=1e-5,
            epochs=1,
            max_grad_norm=1.0,
            poisson_sampling=False,
            grad_sample_mode="ghost_fused",
        )


def names():
    """(where, attributes, parameters that are given by name) of what the engine relies on."""
    from opacus import accountants, data_loader, grad_sample, optimizers
    from opacus.accountants import utils
    from opacus.grad_sample import functorch
    from opacus.layers import dp_rnn
    from opacus.optimizers import optimizer
    from opacus.utils import uniform_sampler

    private_optimizer = (
        "params clip_and_accumulate add_noise scale_grad pre_step step zero_grad load_state_dict "
        "accumulated_iterations attach_step_hook signal_skip_step _check_skip_next_step"
    )
    wrapper = "add_hooks remove_hooks enable_hooks disable_hooks forbid_grad_accumulation"
    sizes = "optimizer noise_multiplier max_grad_norm expected_batch_size loss_reduction"
    return [
        (opacus.PrivacyEngine, "validate save_checkpoint load_checkpoint get_epsilon", ""),
        (opacus.PrivacyEngine._prepare_model, "", "module batch_first loss_reduction"),
        (opacus.PrivacyEngine._prepare_optimizer, "", "optimizer noise_generator clipping"),
        (opacus.PrivacyEngine._prepare_criterion, "", "module optimizer criterion"),
        (optimizers.DPOptimizer, private_optimizer, f"{sizes} generator secure_mode"),
        (optimizer, "_check_processed_flag _mark_as_processed", ""),
        (grad_sample, "AbstractGradSampleModule", ""),
        (grad_sample.GradSampleModule, "GRAD_SAMPLERS", ""),
        (grad_sample.GradSampleModuleFastGradientClipping, wrapper,
         "m batch_first loss_reduction strict max_grad_norm"),
        (functorch, "ft_compute_per_sample_gradient", ""),
        (functorch.prepare_layer, "", "layer batch_first"),
        (dp_rnn, "RNNLinear DPRNN DPLSTM DPGRU", ""),
        (opacus.layers, "DPMultiheadAttention", ""),
        (data_loader, "DPDataLoader", ""),
        (uniform_sampler.UniformWithReplacementSampler, "",
         "num_samples sample_rate generator steps"),
        (accountants.RDPAccountant, "get_optimizer_hook_fn mechanism get_epsilon state_dict", ""),
        (accountants, "create_accountant", ""),
        (utils.get_noise_multiplier, "",
         "target_epsilon target_delta sample_rate steps accountant epsilon_tolerance"),
    ]  # fmt: skip


@pytest.mark.parametrize("where, attributes, parameters", names(), ids=lambda x: str(x)[:40])
def test_engine_names_of_opacus(where, attributes, parameters):
    """Opacus's own, many of them private: an update that moves one fails here first."""
    for name in attributes.split():
        assert hasattr(where, name), name
    assert set(parameters.split()) <= set(inspect.signature(where).parameters if parameters else ())


def test_engine_state_of_opacus():
    """What its objects keep and the engine reads or writes."""
    engine, theirs_ = engines()
    for module, optimizer, *_ in (made(engine, "ghost_fused"), made(theirs_, "ghost")):
        for name in ("_step_skip_queue", "_is_last_step_skipped", "step_hook", "original_optimizer",
                     "generator", "secure_mode", "expected_batch_size"):  # fmt: skip
            assert hasattr(optimizer, name), name
        for name in ("hooks_enabled", "autograd_grad_sample_hooks", "_module", "batch_first",
                     "loss_reduction", "max_grad_norm"):  # fmt: skip
            assert hasattr(module, name), name
        assert hasattr(optimizer.params[0], "summed_grad")
    assert theirs_.accountant.history == []


def test_engine_counts_a_batch_of_several_passes_once():
    """Opacus's ghost says 1 whatever was accumulated; a second pass is refused here."""
    module, optimizer, criterion, _ = made(engines()[0], "ghost_fused")
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    (criterion(module(x), y) + criterion(module(2 * x), y)).backward()
    assert optimizer.accumulated_iterations == 1
    with pytest.raises(ValueError, match="grad accumulation"):
        criterion(module(x), y).backward()
