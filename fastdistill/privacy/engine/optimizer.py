"""The optimizer: clips by factors, adds up virtual steps, adds noise once a logical batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from torch import Tensor

from fastdistill.privacy import mechanism, release, source
from fastdistill.privacy.engine.exact import full_precision
from fastdistill.privacy.engine.gradients import Gradient
from fastdistill.privacy.engine.settings import Settings
from fastdistill.privacy.sums import add_noise_


class PrivateOptimizer(DPOptimizer):
    """Opacus's DPOptimizer over sums that are clipped already.

    `p.grad` is None until `step`: what is in it afterwards is private. The sums in between, and
    `p.summed_grad`, are not.

    Args:
        optimizer: any torch optimizer; one group of parameters or several, on one device.
        noise_multiplier, max_grad_norm, expected_batch_size, loss_reduction, generator: as in
            Opacus; `max_grad_norm` may be a list with `clipping="per_layer"`.
        clipping: "flat", or "per_layer": each parameter's gradient is clipped to C / sqrt(L) (or to
            its number of the list), so that the joint norm is C.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float | Sequence[float],
        expected_batch_size: float,
        loss_reduction: str = "mean",
        generator: torch.Generator | None = None,
        secure_mode: bool = False,
        clipping: str = "flat",
    ) -> None:
        self.settings = Settings(
            noise_multiplier, max_grad_norm, expected_batch_size, loss_reduction,
            clipping == "per_layer",
        )  # fmt: skip
        self._planned: tuple[float, float] | None = None  # of the logical batch that has begun
        self._sums: list[Tensor] | None = None  # of the last backward pass, not yet accumulated
        self._samples = 0  # of the logical batch
        self._nonce = 0
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=self.settings.max_grad_norm,
            expected_batch_size=expected_batch_size,  # type: ignore[arg-type]
            loss_reduction=loss_reduction,
            generator=generator,
            secure_mode=secure_mode,
        )
        devices = {p.device for p in self.params}
        if len(devices) > 1:
            raise ValueError(
                f"optimizer: expected parameters on one device, got {sorted(map(str, devices))}"
            )
        if self.settings.per_layer:
            self.settings.norms(len(self.params))

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the noise over the clip norm."""
        return self.settings.noise_multiplier

    @noise_multiplier.setter
    def noise_multiplier(self, value: float) -> None:
        self.settings.noise_multiplier = value

    @property
    def max_grad_norm(self) -> float:
        """The clip norm of a sample's whole gradient."""
        return self.settings.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        self.settings.max_grad_norm = value

    @property
    def accumulated_iterations(self) -> int:
        """1: a logical batch is one draw of the sampler, however many backward passes it takes."""
        return 1

    def restart(self) -> None:
        """Never repeat the noise of an earlier run of the same seed: mix in fresh bits."""
        self._nonce = source.nonce()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the wrapped optimizer's. What follows has noise of its own."""
        super().load_state_dict(state_dict)
        self.restart()

    def _plan(self) -> mechanism.Mechanism:
        """Of the logical batch; the clip norm and noise multiplier it began with."""
        now = (self.noise_multiplier, self.max_grad_norm)
        if self._planned is None:
            self._planned = now
        if now != self._planned:
            raise RuntimeError(
                "noise_multiplier, max_grad_norm: expected what the batch began with, "
                f"{self._planned}, got {now}; step the schedulers after a step that was not skipped"
            )
        parameters = self.params
        return self.settings.plan(
            sum(p.numel() for p in parameters),
            any(p.dtype is not torch.float64 for p in parameters),
        )

    def take(self, gradients: dict[Tensor, Gradient], samples: int) -> None:
        """The per-sample gradients of one backward pass: clip and add up. The mapping is emptied.

        Raises:
            ValueError: there are sums of a backward pass that no `step` has taken.
            RuntimeError: the logical batch has become larger than the rounding was planned for.
        """
        if self._sums is not None:
            raise ValueError(
                "Poisson sampling is not compatible with grad accumulation. You need to call "
                "optimizer.step() after every forward/backward pass or consider using "
                "BatchMemoryManager"
            )
        for p in self.params:
            _check_processed_flag(p.summed_grad)
        if self._samples + samples > self.settings.most:
            raise RuntimeError(
                f"expected_batch_size: a batch of {self._samples + samples} samples is too large "
                f"for {self.settings.expected_batch_size:g} expected ones (at most "
                f"{self.settings.most}, which chance does not exceed)"
            )
        plan = self._plan()
        used = [gradients.pop(p, None) for p in self.params]
        self._samples += samples
        with full_precision(self.params[0].device):
            factors = self._factors(used, plan, samples)
            sums = []
            for i, (p, factor) in enumerate(zip(self.params, factors, strict=True)):
                gradient, used[i] = used[i], None  # its factors are let go as the sums grow
                sums.append(self._total(p, gradient, factor))
            self._sums = sums

    def _total(self, p: Tensor, gradient: Gradient | None, factor: Tensor | None) -> Tensor:
        """The sum of the clipped gradients of one parameter."""
        if gradient is None or factor is None:
            dtype = p.dtype if p.dtype is torch.float64 else torch.float32
            return torch.zeros(p.shape, dtype=dtype, device=p.device)
        return gradient.total(factor, self.settings.chunk).view(p.shape)

    def _factors(
        self, used: Sequence[Gradient | None], plan: mechanism.Mechanism, samples: int
    ) -> list[Tensor | None]:
        """The factor of each parameter's samples, float64 [B]; non-finite samples select zero."""
        present = [g for g in used if g is not None]
        if samples == 0 or not present:
            return [None] * len(used)
        squares = [None if g is None else g.square() for g in used]
        found = torch.stack([s for s in squares if s is not None])
        joint = found.sum(0)
        kept = joint.isfinite()
        if joint.device.type != "cpu" or not bool(kept.all()):
            for g in present:
                g.select(kept)
            found = torch.where(kept, found, 0.0)
            joint = torch.where(kept, joint, 0.0)
        single = any(p.dtype is not torch.float64 for p in self.params)
        if not self.settings.per_layer:
            return [_factor(joint, plan.clip, kept, single)] * len(used)
        shares = self.settings.norms(len(used))
        return [
            None
            if s is None
            else _factor(torch.where(kept, s, 0.0), share * plan.clip, kept, single)
            for s, share in zip(squares, shares, strict=True)
        ]

    def clip_and_accumulate(self) -> None:
        """Add the last backward pass's sums to those of the logical batch."""
        if self._sums is None:
            raise ValueError(
                "step: expected a backward() of the criterion's loss before it, got none since the "
                "last step or zero_grad"
            )
        for p, total in zip(self.params, self._sums, strict=True):
            if p.summed_grad is None:
                p.summed_grad = total
            else:
                _check_processed_flag(p.summed_grad)
                p.summed_grad = p.summed_grad.double() + total
        self._sums = None

    def add_noise(self) -> None:
        """The logical batch's release: noise once, divided by the expected batch size."""
        plan = self._plan()
        parameters = self.params
        for p in parameters:
            _check_processed_flag(p.summed_grad)
        bits = release.stream(self.noise_multiplier, self.generator)
        sums = [p.summed_grad for p in parameters]
        add_noise_(sums, plan, source.mixed(bits, self._nonce))
        for p, value in zip(parameters, sums, strict=True):
            p.grad = value.to(p.dtype)
            _mark_as_processed(p.summed_grad)
        self._planned, self._samples = None, 0

    def scale_grad(self) -> None:
        """Nothing: `add_noise` divides."""

    def pre_step(self, closure: Any = None) -> bool:  # type: ignore[override]
        """What comes before the wrapped optimizer's step; False where that is skipped."""
        if not self.params:
            return True
        self.clip_and_accumulate()
        if self._check_skip_next_step():
            self._is_last_step_skipped = True
            return False
        if self.step_hook:  # the budget is debited before there is anything to see
            self.step_hook(self)
        self.add_noise()
        self._is_last_step_skipped = False
        return True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, and the sums of a backward pass that no step has taken."""
        self._sums = None
        super().zero_grad(set_to_none)
        if not self._is_last_step_skipped:
            self._planned, self._samples = None, 0


def _factor(square: Tensor, clip: float, kept: Tensor, single: bool) -> Tensor:
    """min(1, C / (n + 1e-6)), rounded down, 0 for what is not kept."""
    factor = (clip / (square.sqrt() + mechanism.EPS)).clamp(max=1)
    if single:
        short = factor.float()
        below = torch.nextafter(short, torch.zeros_like(short))
        factor = torch.where(short.double() > factor, below, short).double()
    return torch.where(kept, factor, 0.0)
