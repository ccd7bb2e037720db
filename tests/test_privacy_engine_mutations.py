"""Broken engines, made by program from the engine: each has to fail the check that it should.

The checks are those that the engine passes (test_privacy_engine_proof.py).
"""

import mutants
import privacy_engine_checks as checks
import pytest

from fastdistill.privacy import engine

FILES = mutants.Files(
    engine,
    (
        "exact", "gradients", "capture", "layers", "module", "losses", "settings", "optimizer",
        "criterion", "sampling", "engine",
    ),
)  # fmt: skip

MUTATIONS = {
    "not clipped": ("optimizer", ".clamp(max=1)", ".clamp(min=1)", "sensitivity"),
    "factor above 1": ("optimizer", ".clamp(max=1)", "", "formula"),
    "noise before the clip": (
        "optimizer", "            p.grad = value.to(p.dtype)\n",
        "            norm = sum(s.square().sum() for s in sums).sqrt()\n"
        "            p.grad = (value * (self.max_grad_norm / norm).clamp(max=1)).to(p.dtype)\n",
        "noise",
    ),
    "noise of 0.9": (
        "optimizer", "add_noise_(sums, plan,",
        "add_noise_(sums, plan._replace(scale=0.9 * plan.scale),",
        "noise",
    ),
    "noise of 0.9, by the audit": (
        "optimizer", "add_noise_(sums, plan,",
        "add_noise_(sums, plan._replace(scale=0.9 * plan.scale),",
        "audit",
    ),
    "divided by the actual batch": (
        "optimizer", "add_noise_(sums, plan,",
        "add_noise_(sums, plan._replace(inverse=1 / max(self._samples, 1)),", "replay",
    ),
    "noise scaled by the actual batch": (
        "optimizer", "add_noise_(sums, plan,",
        "add_noise_(sums, plan._replace(scale=plan.scale * max(self._samples, 1) ** 0.5),",
        "replay",
    ),
    "losses divided by the actual batch": (
        "criterion", "self.loss_per_sample.sum(), samples", "self.loss_per_sample.mean(), samples",
        "replay",
    ),
    "no noise on an empty batch": (
        "optimizer", "release.stream(self.noise_multiplier,",
        "release.stream(self.noise_multiplier * (self._samples > 0),", "replay",
    ),
    "divided twice": (
        "optimizer", "        self.add_noise()\n",
        "        self.add_noise()\n        super().scale_grad()\n", "noise",
    ),
    "noise before the debit": (
        "optimizer", "        if self.step_hook:  #",
        "        self.add_noise()\n        if self.step_hook:  #", "debit",
    ),
    "the norms of the step before": (
        "optimizer", "        found = torch.stack(",
        "        squares = vars(self).setdefault('stale', squares)\n        found = torch.stack(",
        "sensitivity",
    ),
    "a buffer that is not cleared": (
        "gradients", "self._square = products.linear(self.a, self.g, self.made)",
        "self._square = square_norms(self.made.add_(torch.bmm(self.g.mT, self.a)))", "formula",
    ),
    "norm of the first tensor only": (
        "optimizer", "joint = found.sum(0)", "joint = found[0]", "sensitivity",
    ),
    "noise of the clip norm before": (
        "optimizer", "add_noise_(sums, plan,",
        "add_noise_(sums, plan._replace(scale=self.noise_multiplier * "
        "vars(self).setdefault('first', self.max_grad_norm)),",
        "schedule",
    ),
    "another clip norm in the module": (
        "module", "            self._settings.max_grad_norm = value", "            pass",
        "schedule",
    ),
    "the module's clip norm stays": (
        "module", "self._before if self._settings is None else self._settings.max_grad_norm",
        "self._before", "schedule",
    ),
    "per layer without sqrt(L)": (
        "settings", "[1 / math.sqrt(parameters)]", "[1.0]", "per_layer",
    ),
    "a stream is used twice": (
        "optimizer", "bits = release.stream(self.noise_multiplier, self.generator)",
        "bits = release.stream(self.noise_multiplier, self.generator)\n"
        "        bits = vars(self).setdefault('bits', bits)",
        "noise",
    ),
    "one counter for all tensors": (
        "optimizer", "add_noise_(sums, plan, source.mixed(bits, self._nonce))",
        "[add_noise_([s], plan, bits) for s in sums]", "noise",
    ),
    "one counter for all tensors, by the audit": (
        "optimizer", "add_noise_(sums, plan, source.mixed(bits, self._nonce))",
        "[add_noise_([s], plan, bits) for s in sums]", "audit",
    ),
    "noise of torch's seed": (
        "optimizer", "release.stream(self.noise_multiplier, self.generator)",
        "release.stream(self.noise_multiplier, self.generator or torch.default_generator)",
        "secrecy",
    ),
    "0 times NaN": (
        "gradients",
        "torch.where(kept.view(-1, *(1,) * (x.ndim - 1)), x, torch.zeros((), dtype=x.dtype))",
        "x * kept.view(-1, *(1,) * (x.ndim - 1)).to(x.dtype)", "not_finite",
    ),
    "nothing selected": ("optimizer", "g.select(kept)", "pass", "not_finite"),
    "selected in one layer only": (
        "optimizer", "kept = joint.isfinite()", "kept = found[-1].isfinite()", "not_finite",
    ),
    "tied: no cross term": ("gradients", " + 2 * torch.stack(cross)", "", "tied"),
    "a table's second use forgotten": (
        "gradients", "            rows.add_to(product.made)\n", "", "formula",
    ),
    "a token's uses one by one": (
        "gradients", "torch.unique(keys, return_inverse=True)", "keys, torch.arange(len(keys))",
        "formula",
    ),
    "padding counted": ("gradients", "if padding is not None:", "if False:", "formula"),
    "Gram in float32": (
        "gradients", "        a, g = self.a.double(), self.g.double()\n        inner",
        "        a, g = self.a, self.g\n        inner", "cancellation",
    ),
    "Gram without its bound": (
        "gradients", "sum((1, 2)).clamp_(min=0) + GRAM_MARGIN * self.reach().square()",
        "sum((1, 2)).clamp_(min=0)", "cancellation",
    ),
    "tiles without their bound": (
        "gradients", "twice(self.rows, self.a) * self.reach()", "0", "cancellation",
    ),
    "convolutions without their bound": (
        "gradients", "twice(g.shape[2], g) * reach", "0", "cancellation_of_convolutions",
    ),
    "factors below float32's normal numbers": (
        "gradients", "torch.where(a > FAR**2, torch.inf, a)", "a", "far",
    ),
    "sums under autocast": (
        "exact", "torch.autocast(device.type, enabled=False)", "contextlib.nullcontext()",
        "autocast",
    ),
    "the rounding of sums not paid for": (
        "settings", "lost = gradients.rounding(self.most, self.chunk) if single else 0.0",
        "lost = 0.0", "neighbours",
    ),
    "roll-back with the same counter": (
        "optimizer", "self._nonce = source.nonce()", "self._nonce = 0", "rollback",
    ),
    "rand_on_empty": ("engine", "if rand_on_empty:", "if False:", "refusals"),
    "central limit accountant": (
        "engine", '        if accountant == "gdp":\n',
        '        if accountant == "gdp":\n            return\n        if False:\n', "refusals",
    ),
    "secure mode with a generator": (
        "engine", "if self.secure_mode and noise_generator is not None:", "if False:", "refusals",
    ),
    "a seeded sampler in secure mode": (
        "engine", "        generator = None\n", "        generator = data_loader.generator\n",
        "loader",
    ),
    "a sampler of torch's seed": (
        "sampling", "bytearray(os.urandom(8 * self.num_samples))",
        "bytearray(torch.randint(256, (8 * self.num_samples,), dtype=torch.uint8).numpy())",
        "sampler",
    ),
    "batches of a fixed size": (
        "sampling", "(self._uniform() < self.sample_rate).nonzero().flatten().tolist()",
        "sorted(self._uniform().argsort()[: int(self.num_samples * self.sample_rate)].tolist())",
        "sampler",
    ),
    "whole runs of records": (
        "sampling", "(self._uniform() < self.sample_rate)",
        "(self._uniform()[::2].repeat_interleave(2) < self.sample_rate)", "sampler",
    ),
    "virtual steps counted": (
        "optimizer", "        if self._check_skip_next_step():\n",
        "        if self.step_hook:\n            self.step_hook(self)\n"
        "        if self._check_skip_next_step():\n",
        "accountant",
    ),
    "noise on virtual steps too": (
        "optimizer", "            self._is_last_step_skipped = True\n",
        "            self._is_last_step_skipped = True\n"
        "            bits = release.stream(self.noise_multiplier, self.generator)\n"
        "            add_noise_([p.summed_grad for p in self.params], self._plan(), bits)\n",
        "virtual",
    ),
    "another sample rate in the account": (
        "engine", "hook_fn(sample_rate=sampling.sample_rate)",
        "hook_fn(sample_rate=sampling.sample_rate / 2)", "accountant",
    ),
    "sums of two backward passes": (
        "optimizer", "        if self._sums is not None:\n", "        if False:\n", "refusals",
    ),
    "sums that have been released": (
        "optimizer", "            _mark_as_processed(p.summed_grad)\n", "", "refusals",
    ),
    "another clip norm within a batch": (
        "optimizer", "if now != self._planned:", "if False:", "refusals",
    ),
    "batches of any size": (
        "optimizer", "if self._samples + samples > self.settings.most:", "if False:", "refusals",
    ),
    "parameters used outside their layer": (
        "module", "        if outside:\n", "        if False:\n", "refusals",
    ),
}  # fmt: skip


def implementation(parts):
    return checks.Engine("mutated", parts["engine"].PrivacyEngine, parts["sampling"])


@pytest.fixture(autouse=True)
def quietly(one_thread):
    yield


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_engine_is_caught(name):
    mutation = mutants.Mutation(*MUTATIONS[name])
    with mutants.made(FILES, mutation) as parts, pytest.raises(AssertionError):
        getattr(checks, f"check_{mutation.check}")(implementation(parts))


def test_the_machinery_passes_what_is_not_broken():
    """Those that take least; the whole engine passes all of them."""
    with mutants.made(FILES) as parts:
        for check in (checks.check_replay, checks.check_noise, checks.check_refusals):
            check(implementation(parts))


def test_every_file_of_the_engine_is_loaded():
    """No part of a broken engine is that of the whole one."""
    assert {p.stem for p in FILES.folder.glob("*.py")} == {*FILES.names, "__init__"}
