"""`PrivacyEngine`: what Opacus's engine does, with one more grad_sample_mode."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import opacus
import torch
from opacus.accountants import create_accountant
from opacus.accountants.utils import get_noise_multiplier
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from opacus.grad_sample import AbstractGradSampleModule
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from fastdistill import _validate
from fastdistill.privacy import release
from fastdistill.privacy.engine.criterion import PrivateCriterion
from fastdistill.privacy.engine.module import MEMORY_BUDGET, PrivateModule
from fastdistill.privacy.engine.optimizer import PrivateOptimizer
from fastdistill.privacy.engine.sampling import PoissonDataLoader, check_order

MODE = "ghost_fused"
ZERO_OUT, ADD_REMOVE = "zero-out", "add/remove"
_PUBLIC = ("sample_rate", "steps", "expected_batch_size")


class _Sampling(NamedTuple):
    sample_rate: float
    steps: int  # of one pass of the loader
    expected_batch_size: float
    adjacency: str


class PrivacyEngine(opacus.PrivacyEngine):
    """Opacus's `PrivacyEngine` with `grad_sample_mode="ghost_fused"`.

    In that mode private gradients take one backward pass, which computes no ordinary gradient of a
    weight; noise comes from ChaCha20 keyed by the operating system, and the Poisson sampler from
    the operating system's generator. `make_private` then returns (module, optimizer, criterion,
    data_loader), as Opacus's "ghost" does. The other modes are Opacus's own, with its own noise.

    What is released is the sum of the samples' gradients, each clipped to `max_grad_norm` with
    every rounding counted, plus Gaussian noise, over the *expected* batch size: the actual one
    enters nothing. `adjacency` says which neighbours the accountant's epsilon is for:

    - "zero-out": data sets of one public size, in which one sample is replaced by nothing. Sample
      rate, steps and expected batch size then come from the data loader, as Opacus has it.
    - "add/remove", where `make_private` is given all three of `sample_rate`, `steps` and
      `expected_batch_size`, chosen without looking at the size of the data set.

    Not private, and not to be published: losses, the number of samples that were clipped or were
    not finite, times, and whether an error was raised. A sample whose gradient is not finite
    contributes zero; so does one with a float32 input of norm beyond 2^80.

    Args:
        accountant: "prv" or "rdp". "gdp" is refused: it is a central limit estimate, which lies
            below the true epsilon.
        secure_mode: True refuses a `noise_generator`. ghost_fused is secure without one anyway;
            Opacus's modes are not, and are refused under it.
        memory_budget: bytes of per-sample gradients that a step may hold at once (256 MB).

    Raises:
        ValueError, TypeError: the argument's name, what was expected and what came.
    """

    def __init__(
        self,
        *,
        accountant: str = "prv",
        secure_mode: bool = False,
        memory_budget: int = MEMORY_BUDGET,
    ) -> None:
        if accountant == "gdp":
            raise ValueError(
                'accountant: expected "prv" or "rdp", got "gdp": a central limit estimate, which '
                "lies below the true epsilon (5.56 for 7.44 at sample rate 0.01, noise 0.6, 1000 "
                "steps)"
            )
        self.accountant = create_accountant(
            _validate.choice("accountant", accountant, ("prv", "rdp"))
        )
        self.secure_mode = _validate.boolean("secure_mode", secure_mode)
        self.secure_rng = None  # Opacus's, from a package that is no longer made
        self.dataset = None
        self.memory_budget = _validate.integer("memory_budget", memory_budget)
        self.adjacency: str | None = None
        self._optimizers: weakref.WeakSet[PrivateOptimizer] = weakref.WeakSet()

    def make_private(  # type: ignore[override]
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Any = nn.CrossEntropyLoss(),  # noqa: B008 - Opacus's default
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float | list[float],
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str = "flat",
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        rand_on_empty: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Opacus's `make_private`; its defaults are Opacus's too.

        Args:
            module, optimizer, criterion, data_loader: as in Opacus; criteria: `losses.PerSample`.
            noise_multiplier: standard deviation of the noise over the clip norm.
            max_grad_norm: the norm to which a sample's gradient is clipped, over all parameters of
                the optimizer; with `clipping="per_layer"` that joint norm (each parameter gets
                C / sqrt(L)), or a list of one norm for each.
            batch_first: False where inputs are [T, B, ...].
            loss_reduction: "mean" or "sum", the criterion's.
            poisson_sampling: False keeps the loader as it is; the accountant's epsilon is for
                Poisson sampling.
            clipping: "flat" or "per_layer".
            noise_generator: makes a run reproducible, noise and sampling: not for release.
            grad_sample_mode: "ghost_fused", or one of Opacus's.
            wrap_model, rand_on_empty: only True and False here.
            kwargs: `sample_rate` (probability of a sample to be in a batch), `steps` (batches of
                one pass of the loader) and `expected_batch_size`, all three or none: see the class.

        Returns:
            (module, optimizer, criterion, data_loader); in Opacus's modes what Opacus returns.
        """
        if clipping == "adaptive":
            raise ValueError(
                'clipping: expected "flat" or "per_layer", got "adaptive": its unclipped count has '
                "twice the sensitivity that its noise assumes, and is divided by the actual batch"
            )
        if rand_on_empty:
            raise ValueError(
                "rand_on_empty: expected False, got True: an empty batch would then differ from "
                "one with a single sample by up to twice the clip norm"
            )
        if self.secure_mode and noise_generator is not None:
            raise ValueError(
                "noise_generator: expected None with secure_mode=True, got a generator"
            )
        if grad_sample_mode != MODE:
            return self._opacus(
                module=module,
                optimizer=optimizer,
                criterion=criterion,
                data_loader=data_loader,
                noise_multiplier=noise_multiplier,
                max_grad_norm=max_grad_norm,
                batch_first=batch_first,
                loss_reduction=loss_reduction,
                poisson_sampling=poisson_sampling,
                clipping=clipping,
                noise_generator=noise_generator,
                grad_sample_mode=grad_sample_mode,
                wrap_model=wrap_model,
                **kwargs,
            )
        _validate.choice("clipping", clipping, ("flat", "per_layer"))
        release.check_generator(noise_generator)
        if isinstance(max_grad_norm, Sequence) and not isinstance(max_grad_norm, str):
            max_grad_norm = list(max_grad_norm)
        _refuse(module, optimizer, wrap_model)
        if poisson_sampling:
            check_order(data_loader)
        sampling = _sampling(data_loader, kwargs)
        if kwargs:
            raise TypeError(
                f"make_private: expected {', '.join(_PUBLIC)} besides Opacus's arguments; got "
                f"{', '.join(kwargs)}"
            )
        wrapped = self._prepare_model(
            module,
            batch_first=batch_first,
            loss_reduction=loss_reduction,
            grad_sample_mode=grad_sample_mode,
        )
        try:
            wrapped.forbid_grad_accumulation()
            private = self._prepare_optimizer(
                optimizer=optimizer,
                noise_multiplier=noise_multiplier,
                max_grad_norm=max_grad_norm,
                expected_batch_size=sampling.expected_batch_size,
                loss_reduction=loss_reduction,
                noise_generator=noise_generator,
                clipping=clipping,
                grad_sample_mode=grad_sample_mode,
            )
            wrapped.attach(private.settings)
            private.attach_step_hook(
                self.accountant.get_optimizer_hook_fn(sample_rate=sampling.sample_rate)
            )
            loader = self._loader(
                data_loader, poisson_sampling, batch_first, noise_generator, sampling
            )
            self.adjacency = sampling.adjacency
            private_criterion = self._prepare_criterion(
                module=wrapped,
                optimizer=private,
                criterion=criterion,
                loss_reduction=loss_reduction,
            )
        except Exception:
            if wrapped is not module:
                wrapped.remove_hooks()  # the module as it was, for another try
            raise
        return wrapped, private, private_criterion, loader

    def make_private_with_epsilon(  # type: ignore[override]
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Any = nn.CrossEntropyLoss(),  # noqa: B008 - Opacus's default
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: float | list[float],
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str = "flat",
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        **kwargs: Any,
    ) -> Any:
        """`make_private` with the noise that `epochs` passes of the loader need.

        The budget starts at zero: what the accountant holds already comes on top, with a warning.
        `kwargs` as there, and `epsilon_tolerance` (0.01).
        """
        if grad_sample_mode == MODE and not poisson_sampling:
            raise ValueError(
                "poisson_sampling: expected True with a target epsilon, got False: no accountant "
                "here is for a loader that samples otherwise"
            )
        tolerance = kwargs.pop("epsilon_tolerance", 0.01)
        if grad_sample_mode == MODE:
            check_order(data_loader)
            found = _sampling(data_loader, dict(kwargs))
            rate, steps = found.sample_rate, found.steps
        else:
            rate, steps = 1 / len(data_loader), len(data_loader)
        if len(self.accountant) > 0:
            warnings.warn(
                "make_private_with_epsilon: the accountant has spent budget already; the noise is "
                "for a start at zero, so the whole will be more than target_epsilon",
                stacklevel=2,
            )
        return self.make_private(
            module=module,
            optimizer=optimizer,
            criterion=criterion,
            data_loader=data_loader,
            noise_multiplier=get_noise_multiplier(
                target_epsilon=target_epsilon,
                target_delta=target_delta,
                sample_rate=rate,
                steps=steps * epochs,
                accountant=self.accountant.mechanism(),
                epsilon_tolerance=tolerance,
            ),
            max_grad_norm=max_grad_norm,
            batch_first=batch_first,
            loss_reduction=loss_reduction,
            poisson_sampling=poisson_sampling,
            clipping=clipping,
            noise_generator=noise_generator,
            grad_sample_mode=grad_sample_mode,
            wrap_model=wrap_model,
            **kwargs,
        )

    def save_checkpoint(
        self,
        *,
        path: Any,
        module: Any,
        optimizer: Any = None,
        noise_scheduler: Any = None,
        grad_clip_scheduler: Any = None,
        checkpoint_dict: dict[str, Any] | None = None,
        module_state_dict_kwargs: dict[str, Any] | None = None,
        torch_save_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Opacus's `save_checkpoint`, with the values that the given schedulers had reached.

        Opacus keeps their counts alone: a schedule that multiplies would start again.
        """
        reached = {
            name: getattr(scheduler.optimizer, name)
            for name, scheduler in (
                ("noise_multiplier", noise_scheduler), ("max_grad_norm", grad_clip_scheduler)
            )
            if scheduler is not None
        }  # fmt: skip
        super().save_checkpoint(
            path=path,
            module=module,
            optimizer=optimizer,
            noise_scheduler=noise_scheduler,
            grad_clip_scheduler=grad_clip_scheduler,
            checkpoint_dict={**(checkpoint_dict or {}), _REACHED: reached},
            module_state_dict_kwargs=module_state_dict_kwargs,
            torch_save_kwargs=torch_save_kwargs,
        )

    def load_checkpoint(
        self,
        *,
        path: Any,
        module: Any,
        optimizer: Any = None,
        noise_scheduler: Any = None,
        grad_clip_scheduler: Any = None,
        module_load_dict_kwargs: dict[str, Any] | None = None,
        torch_load_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Opacus's `load_checkpoint`: the accountant goes on exactly where it was.

        A run with a `noise_generator` gets other noise than before: its generator would repeat what
        the interrupted run added to other gradients, whose difference would be free of noise.
        """
        checkpoint: dict[str, Any] = super().load_checkpoint(
            path=path,
            module=module,
            optimizer=optimizer,
            noise_scheduler=noise_scheduler,
            grad_clip_scheduler=grad_clip_scheduler,
            module_load_dict_kwargs=module_load_dict_kwargs,
            torch_load_kwargs=torch_load_kwargs,
        )
        reached = checkpoint.pop(_REACHED, {})
        if noise_scheduler is not None and "noise_multiplier" in reached:
            noise_scheduler.optimizer.noise_multiplier = reached["noise_multiplier"]
        if grad_clip_scheduler is not None and "max_grad_norm" in reached:
            grad_clip_scheduler.optimizer.max_grad_norm = reached["max_grad_norm"]
        for known in self._optimizers:
            known.restart()
        return checkpoint

    def _opacus(self, *, grad_sample_mode: str, **arguments: Any) -> Any:
        """Opacus's own modes."""
        given = [name for name in _PUBLIC if name in arguments]
        if given:
            raise TypeError(
                f'{", ".join(given)}: expected with grad_sample_mode="{MODE}", got '
                f"{grad_sample_mode!r}"
            )
        if self.secure_mode:
            raise ValueError(
                f'secure_mode: expected grad_sample_mode="{MODE}" with it, got '
                f"{grad_sample_mode!r}, whose noise is torch.normal"
            )
        warnings.warn(
            f"grad_sample_mode={grad_sample_mode!r}: Opacus's own noise and sampling, which are "
            f'not secure; "{MODE}" is',
            stacklevel=3,
        )
        self.adjacency = ZERO_OUT
        return super().make_private(grad_sample_mode=grad_sample_mode, **arguments)

    def _prepare_model(self, module: nn.Module, **arguments: Any) -> Any:  # type: ignore[override]
        if arguments.get("grad_sample_mode") != MODE:
            return super()._prepare_model(module, **arguments)
        batch_first, reduction = arguments["batch_first"], arguments["loss_reduction"]
        if isinstance(module, PrivateModule):
            if (module.batch_first, module.loss_reduction) != (batch_first, reduction):
                raise ValueError(
                    "module: expected one made private with the same batch_first and "
                    f"loss_reduction, got {module.batch_first}, {module.loss_reduction!r}"
                )
            return module
        self.validate(module=module, optimizer=None, data_loader=None)
        return PrivateModule(
            module,
            batch_first=batch_first,
            loss_reduction=reduction,
            memory_budget=self.memory_budget,
        )

    def _prepare_optimizer(self, *, optimizer: Any, **arguments: Any) -> Any:  # type: ignore[override]
        if arguments.get("grad_sample_mode") != MODE:
            return super()._prepare_optimizer(optimizer=optimizer, **arguments)
        arguments.pop("grad_sample_mode")
        generator = arguments.pop("noise_generator")
        if isinstance(optimizer, opacus.optimizers.DPOptimizer):
            optimizer = optimizer.original_optimizer
        if generator is not None:
            warnings.warn("noise_generator: reproducible; not for release", stacklevel=3)
        private = PrivateOptimizer(
            optimizer, generator=generator, secure_mode=self.secure_mode, **arguments
        )
        self._optimizers.add(private)
        return private

    def _prepare_criterion(
        self, *, module: Any, optimizer: Any, criterion: Any, **kwargs: Any
    ) -> Any:  # type: ignore[override]
        if not isinstance(module, PrivateModule):
            return super()._prepare_criterion(
                module=module, optimizer=optimizer, criterion=criterion, **kwargs
            )
        return PrivateCriterion(module, optimizer, criterion, kwargs["loss_reduction"])

    def _loader(
        self,
        data_loader: DataLoader[Any],
        poisson: bool,
        batch_first: bool,
        noise_generator: torch.Generator | None,
        sampling: _Sampling,
    ) -> DataLoader[Any]:
        if self.dataset is None:
            self.dataset = data_loader.dataset  # type: ignore[assignment]
        elif self.dataset is not data_loader.dataset:
            warnings.warn(
                "data_loader: another data set than before; an accountant is for one data set, so "
                "take another PrivacyEngine unless the two are the same data",
                stacklevel=4,
            )
        if not poisson:
            warnings.warn(
                "poisson_sampling=False: the accountant's epsilon is for Poisson sampling, which "
                "this loader does not do",
                stacklevel=4,
            )
            return data_loader
        generator = None
        if noise_generator is not None:
            generator = data_loader.generator
            if generator is None:
                generator = torch.Generator().manual_seed(
                    noise_generator.initial_seed() ^ _SAMPLING
                )
        return PoissonDataLoader(
            data_loader,
            sample_rate=sampling.sample_rate,
            steps=sampling.steps,
            generator=generator,
            batch_first=batch_first,
        )


_REACHED = "schedulers_reached"
"""The checkpoint's entry for the schedulers' values."""

_SAMPLING = 0x706F6973
"""Makes the seed of a reproducible sampler another than that of the noise."""


_DISTRIBUTED = (
    DistributedDataParallel,
    DifferentiallyPrivateDistributedDataParallel,
    FSDPModule,
)


def _refuse(module: nn.Module, optimizer: torch.optim.Optimizer, wrap_model: bool) -> None:
    if not wrap_model:
        raise ValueError(f'wrap_model: expected True with grad_sample_mode="{MODE}", got False')
    if isinstance(module, _DISTRIBUTED):
        raise ValueError(
            f"module: expected one that is not distributed, got {type(module).__name__}: "
            f'grad_sample_mode="{MODE}" does not add up over processes yet'
        )
    if not isinstance(module, PrivateModule):
        for name, part in module.named_modules():
            if isinstance(part, AbstractGradSampleModule):
                raise ValueError(
                    f"module: expected the plain module, got {type(part).__name__} in "
                    f"{name or 'its place'}: another wrapper (its to_standard_module unwraps it)"
                )
    known = set(module.parameters())
    for p in chain.from_iterable(group["params"] for group in optimizer.param_groups):
        if p not in known:
            raise ValueError(
                "optimizer: expected parameters of the module, got others (make the optimizer "
                "after whatever replaces layers, such as ModuleValidator.fix)"
            )


def _sampling(data_loader: DataLoader[Any], kwargs: dict[str, Any]) -> _Sampling:
    """From the user, or from the loader and the size of its data set, which is then public."""
    given: Mapping[str, Any] = {name: kwargs.pop(name) for name in _PUBLIC if name in kwargs}
    if not given:
        steps = len(data_loader)
        size = len(data_loader.dataset)  # type: ignore[arg-type]
        return _Sampling(1 / steps, steps, int(size * (1 / steps)), ZERO_OUT)
    missing = [name for name in _PUBLIC if name not in given]
    if missing:
        raise ValueError(
            f"{', '.join(missing)}: expected with {', '.join(given)}: all three are given, or all "
            "come from the data loader"
        )
    rate = _validate.positive("sample_rate", given["sample_rate"])
    if rate > 1:
        raise ValueError(f"sample_rate: expected a number in (0, 1], got {rate}")
    steps = _validate.integer("steps", given["steps"])
    if steps < 1:
        raise ValueError(f"steps: expected a number >= 1, got {steps}")
    expected = _validate.positive("expected_batch_size", given["expected_batch_size"])
    return _Sampling(rate, steps, expected, ADD_REMOVE)
