"""The CUDA C++ backend of kd_loss, run by the CPU under cuemu/cuemu.h.

Judged against the reference in float64 on the same inputs. A float32 kernel may err twice as much
as the float32 reference, and by a band of roundings that covers ex2.approx (2 units in the last
place, which the emulation imposes). Every torch.empty is NaN in these tests.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import cuda_emulation as emulation
import pytest
import torch
from torch import Tensor

import fastdistill
from fastdistill import _backend
from fastdistill.kd import native_cuda

pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=str(emulation.missing()))

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PAIRS = [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (BF16, F32), (F32, F16), (F16, F32)]
DIVERGENCES = ["forward_kl", "reverse_kl", "cross_entropy"]
# In registers up to 1010 classes (not all of one row length: chunks begin on 16 bytes).
WIDTHS = [1, 2, 10, 33, 100, 1000, 1011, 4096]

EPS = 2.0**-23


@pytest.fixture(scope="module")
def launcher(emulated_cuda: ModuleType) -> ModuleType:
    return emulation.launcher(emulated_cuda, native_cuda.__name__)


@pytest.fixture(autouse=True)
def emulated(emulated_cuda: ModuleType) -> Iterator[None]:
    deterministic: Any = torch.utils.deterministic
    filled = deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: more threads only wait for each other
    torch.manual_seed(0)
    with emulation.registered(emulated_cuda):
        yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(before)
    deterministic.fill_uninitialized_memory = filled


@pytest.fixture
def streaming(monkeypatch: pytest.MonkeyPatch) -> None:
    """No row fits in shared memory: the kernels read it from memory in every pass."""
    monkeypatch.setenv("CUEMU_SHARED_LIMIT", "2048")


def logits(*shape: int, dtype: torch.dtype = F32, scale: float = 3.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


def kd(backend: str, student: Tensor, *args: Any, grad_output: Any = 1.0, **kwargs: Any) -> Any:
    """(loss, hard, soft, gradient) on a backend."""
    student = student.detach().requires_grad_()
    with fastdistill.backend(backend):
        parts: Any = fastdistill.kd_loss(student, *args, return_parts=True, **kwargs)
    grad_output = torch.as_tensor(grad_output, dtype=parts.loss.dtype).expand_as(parts.loss)
    (gradient,) = torch.autograd.grad(parts.loss, student, grad_output)
    return *(x.detach() for x in parts), gradient


def check(
    student: Tensor, teacher: Tensor, *args: Any, cancelled: float = 0.0, **kwargs: Any
) -> None:
    """The kernel's loss, parts and gradient are within their budgets.

    `cancelled`: the size of what cancels in the gradient, where that is larger than the gradient.
    """
    got = kd(emulation.NAME, student, teacher, *args, **kwargs)
    want = kd("reference", student.double(), teacher.double(), *args, **kwargs)
    native = kd("reference", student.float(), teacher.float(), *args, **kwargs)
    for name, g, w, n in zip(("loss", "hard", "soft"), got, want, native, strict=False):
        assert g.dtype == F32
        same_kind(g, w, name)
        budget = 2 * worst(n, w) + 8 * EPS * biggest(w)
        assert worst(g, w) <= budget, (name, worst(g, w), budget)
    g, w, n = got[3], want[3], native[3]
    assert g.dtype == student.dtype and g.is_contiguous()
    same_kind(g, w, "gradient")
    budget = 2 * worst(n, w) + 4 * EPS * (biggest(w) + cancelled)
    if student.dtype == F32:
        assert worst(g, w) <= budget, (worst(g, w), budget)
    else:  # rounded once, and again by a backward that multiplies: float16's always does
        once = student.dtype == BF16 and "grad_output" not in kwargs
        rounding = torch.finfo(student.dtype).eps / 2 * (1 if once else 2)
        smallest = torch.finfo(student.dtype).smallest_normal * torch.finfo(student.dtype).eps
        allowed = 1.01 * rounding * w.abs() + budget + smallest
        bad = ~((g.double() - w).abs() <= allowed) & w.isfinite()
        assert not bad.any(), (g[bad][:4], w[bad][:4])


def cancelling(student: Tensor, teacher: Tensor, temperature: float, divergence: str) -> float:
    """The size of the terms of the soft gradient over c: q - p, or q (u - KL(q || p))."""
    log_q, log_p = (torch.log_softmax(x.double() / temperature, -1) for x in (student, teacher))
    q, p = log_q.exp(), log_p.exp()
    if divergence == "reverse_kl":
        return 2 * float((q * (log_q - log_p)).abs().max())
    return float(torch.maximum(p, q).max())


def worst(x: Tensor, y: Tensor) -> float:
    finite = y.isfinite()
    return float((x.double() - y.double())[finite].abs().max()) if finite.any() else 0.0


def biggest(x: Tensor) -> float:
    finite = x.isfinite()
    return float(x[finite].abs().max()) if finite.any() else 0.0


def same_kind(x: Tensor, y: Tensor, name: str) -> None:
    """NaN where NaN is expected, inf where inf is."""
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(x), kind(y)), (name, kind, x, y)


def parts(name: str) -> dict[str, float]:
    return {
        "soft": dict(hard_weight=0.0, soft_weight=0.7),
        "hard": dict(hard_weight=1.3, soft_weight=0.0),
        "both": dict(hard_weight=0.5, soft_weight=0.7),
    }[name]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_values_and_grads(pair: tuple[torch.dtype, torch.dtype], divergence: str) -> None:
    for width, part in itertools.product(WIDTHS, ("soft", "both")):
        student, teacher = logits(3, width, dtype=pair[0]), logits(3, width, dtype=pair[1])
        labels = torch.randint(width, (3,))
        check(
            student, teacher, labels, temperature=2.0, divergence=divergence, grad_output=-1.7,
            **parts(part),
        )  # fmt: skip


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_values_and_grads_streaming(dtype: torch.dtype, divergence: str, streaming: None) -> None:
    for width in (1011, 4096, 5003):
        student, teacher = logits(2, width, dtype=dtype), logits(2, width, dtype=dtype)
        labels = torch.randint(width, (2,))
        check(student, teacher, labels, temperature=2.0, divergence=divergence, **parts("both"))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_vocabulary(divergence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2's odd width, in bfloat16: in sm_90's shared memory, and too long for sm_80's.

    Where a row is kept does not change its bits.
    """
    student, teacher = (logits(2, 50257, dtype=BF16) for _ in range(2))
    labels = torch.randint(50257, (2,))
    kwargs: Any = dict(temperature=2.0, divergence=divergence, **parts("both"))
    check(student, teacher, labels, **kwargs)
    kept = kd(emulation.NAME, student, teacher, labels, **kwargs)
    monkeypatch.setenv("CUEMU_SHARED_LIMIT", str(163 * 1024))
    again = kd(emulation.NAME, student, teacher, labels, **kwargs)
    assert all(torch.equal(x, y) for x, y in zip(kept, again, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_hard_term_alone(dtype: torch.dtype) -> None:
    """The teacher is not read: it may be NaN, of any type."""
    for width, smoothing in itertools.product((1, 10, 1000, 4099), (0.0, 0.1, 1.0)):
        student = logits(3, width, dtype=dtype)
        nothing = torch.full((3, width), float("nan"), dtype=BF16)
        labels = torch.randint(width, (3,))
        nothing = nothing if dtype != F16 else nothing.float()
        check(student, nothing, labels, label_smoothing=smoothing, temperature=3.0, **parts("hard"))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1e-3, 0.5, 1.0, 2.0, 3.0, 1e3])
def test_temperatures(temperature: float, divergence: str) -> None:
    for dtype, width, scale_t2 in itertools.product((F32, BF16), (33, 4096), (True, False)):
        student, teacher = logits(3, width, dtype=dtype), logits(3, width, dtype=dtype)
        labels = torch.randint(width, (3,))
        factor = 0.7 * (temperature if scale_t2 else 1 / temperature) / 3
        cancelled = factor * cancelling(student, teacher, temperature, divergence)
        check(
            student, teacher, labels, temperature=temperature, divergence=divergence,
            scale_t2=scale_t2, label_smoothing=0.1, cancelled=cancelled, **parts("both"),
        )  # fmt: skip


def layouts(width: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    yield "a slice of wider rows", logits(4, width + 3, dtype=dtype)[:, 1 : width + 1]
    yield "an offset in memory", logits(4 * width + 5, dtype=dtype)[5:].view(4, width)
    yield "every second row", logits(8, width, dtype=dtype)[::2]
    yield "one row, expanded", logits(1, width, dtype=dtype).expand(4, width)
    yield "transposed rows", logits(2, 2, width + 1, dtype=dtype)[..., :width].transpose(0, 1)
    yield "four dimensions", logits(2, 1, 2, width, dtype=dtype).transpose(0, 2)
    yield "classes not dense", logits(width, 4, dtype=dtype).t()


@pytest.mark.parametrize("pair", [(F32, F32), (BF16, BF16), (F16, F32), (F32, BF16)], ids=str)
def test_layouts(pair: tuple[torch.dtype, torch.dtype]) -> None:
    for width in (9, 1030):
        for name, student in layouts(width, pair[0]):
            others = [logits(*student.shape, dtype=pair[1])]
            others += [t for _, t in layouts(width, pair[1]) if t.shape == student.shape]
            for teacher in others:
                labels = torch.randint(width, student.shape[:-1])
                try:
                    check(student, teacher, labels, temperature=2.0, **parts("both"))
                except AssertionError as error:
                    raise AssertionError(f"{name}, {teacher.stride()}") from error


def test_rows_far_apart(launcher: ModuleType) -> None:
    """A row more than 2^31 elements after the first: row offsets take 64 bits."""
    width, step = 10, 2**31 + 8
    memory = mmap.mmap(-1, 2 * (step + width))  # pages that are not touched cost nothing
    flat = torch.frombuffer(memory, dtype=BF16)
    far = flat.as_strided((2, width), (step, 1))
    far.copy_(logits(2, width))
    check(far, logits(2, width, dtype=BF16), temperature=2.0)
    check(logits(2, width, dtype=BF16), far, temperature=2.0)


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("width", [12, 1100])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_infinities_and_nan(divergence: str, width: int) -> None:
    """Row by row as the reference has it, and no row spoils another."""
    student, teacher = logits(12, width), logits(12, width)
    student[0, 1] = -INF  # the teacher has mass there
    teacher[1, 2] = -INF
    student[2, :3] = teacher[2, :3] = -INF
    student[3, 0] = INF
    teacher[4, 5] = INF
    student[5] = -INF
    teacher[6] = -INF
    student[7, width - 1] = NAN
    teacher[8, 0] = NAN
    student[9, 8:] = teacher[9, 8:] = -INF  # all that most of the threads have
    student[10, 1:] = -1e30  # finite: no mask
    labels = torch.zeros(12, dtype=torch.int64)
    labels[0] = 1  # the masked class
    for part, smoothing in (("soft", 0.0), ("both", 0.0), ("both", 0.1)):
        check(
            student, teacher, labels, temperature=2.0, divergence=divergence,
            label_smoothing=smoothing, reduction="none", **parts(part),
        )  # fmt: skip


def test_infinite_forward_kl_has_a_finite_gradient() -> None:
    student, teacher = torch.tensor([[0.0, -INF, 1.0]]), torch.tensor([[0.0, 1.0, 1.0]])
    loss, _, _, gradient = kd(emulation.NAME, student, teacher)
    assert loss == INF
    difference = torch.softmax(student, -1) - torch.softmax(teacher, -1)
    torch.testing.assert_close(gradient, difference)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("width", [12, 1100])
def test_dropped_rows(width: int, dtype: torch.dtype) -> None:
    """Dropped rows are not read, whatever they hold, and have a zero gradient."""
    student, teacher = logits(6, width, dtype=dtype), logits(6, width, dtype=dtype)
    student[1:4], teacher[1:4] = NAN, INF
    labels = torch.tensor([3, -100, 2, 2, 1, 0])
    mask = torch.tensor([True, True, False, True, True, True])
    row_weight = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.5, 2.0])
    for reduction in ("mean", "sum", "none", "batchmean"):
        check(
            student, teacher, labels, mask=mask, row_weight=row_weight, reduction=reduction,
            temperature=2.0, **parts("both"),
        )  # fmt: skip
    loss, _, _, gradient = kd(emulation.NAME, student, teacher, mask=torch.zeros(6).bool())
    assert loss == 0 and not gradient.any()


def test_bad_values_spoil_their_row_alone() -> None:
    """On a GPU nothing is checked on the host: a bad label or weight is NaN in its row."""
    student, teacher = logits(5, 12), logits(5, 12)
    labels = torch.tensor([3, 12, -1, 2**40, 0])
    row_weight = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0])
    for dtype in (F32, F16):
        kwargs: Any = dict(reduction="none", **parts("both"))
        loss, _, _, gradient = kd(
            emulation.NAME, student.to(dtype), teacher, labels, row_weight=row_weight, **kwargs
        )
        assert loss.isnan().tolist() == [False, True, True, True, True]
        assert gradient[1:].isnan().all()
        want = kd("reference", student[:1].to(dtype), teacher[:1], labels[:1], **kwargs)
        torch.testing.assert_close(loss[:1], want[0])


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_reductions(dtype: torch.dtype) -> None:
    student, teacher = logits(2, 3, 33, dtype=dtype), logits(2, 3, 33, dtype=dtype)
    labels = torch.randint(33, (2, 3))
    weight = torch.rand(3, 2).t()  # not contiguous
    for reduction in ("mean", "sum", "none", "batchmean"):
        for row_weight in (None, weight):
            check(
                student, teacher, labels, reduction=reduction, row_weight=row_weight,
                grad_output=0.3, **parts("both"),
            )  # fmt: skip
    for normalizer in (7.0, torch.tensor(7.0), torch.tensor(7)):
        check(student, teacher, labels, normalizer=normalizer, **parts("both"))
    check(student, teacher, labels, reduction="none", grad_output=torch.randn(2, 3))
    check(student, teacher, labels, reduction="none", grad_output=torch.randn(3, 2).t())
    check(student[0, 0], teacher[0, 0], labels[0, 0], grad_output=2.0, **parts("both"))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_identical_logits(pair: tuple[torch.dtype, torch.dtype], divergence: str) -> None:
    """Exactly 0, gradient too, also in different types that hold the same values."""
    for width in (10, 1000, 4099):
        values = logits(3, width).to(BF16).to(F16)  # held exactly by each of the three types
        values[0, :5] = -INF
        loss, _, _, gradient = kd(
            emulation.NAME, values.to(pair[0]), values.to(pair[1]), temperature=3.0,
            divergence=divergence, reduction="none",
        )  # fmt: skip
        assert torch.equal(loss, torch.zeros(3)) and not gradient.any()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("noise", [1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
def test_a_teacher_close_by(noise: float, divergence: str) -> None:
    """The divergence to 1 %, where a difference of log-softmaxes would be all rounding."""
    teacher = logits(2, 32000)
    student = teacher + noise * torch.randn(2, 32000)
    for temperature in (1.0, 2.0, 3.0):
        kwargs: Any = dict(temperature=temperature, divergence=divergence, reduction="none")
        got = kd(emulation.NAME, student, teacher, **kwargs)
        want = kd("reference", student.double(), teacher.double(), **kwargs)
        assert (got[0] > 0).all()
        torch.testing.assert_close(got[0].double(), want[0], rtol=0.01, atol=0.0)
        error = (got[3].double() - want[3]).norm() / want[3].norm()
        assert error < 0.03, float(error)


def test_a_divergence_is_never_negative() -> None:
    for noise, dtype in itertools.product((1e-7, 1e-6, 1e-5, 1e-3, 0.09, 0.11, 1.0), (F32, BF16)):
        teacher = logits(8, 200)
        student = (teacher + noise * torch.randn(8, 200)).to(dtype)
        for divergence in ("forward_kl", "reverse_kl"):
            loss = kd(emulation.NAME, student, teacher, divergence=divergence, reduction="none")[0]
            assert (loss >= 0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float16_keeps_small_gradients(divergence: str) -> None:
    """4096 rows under a loss scale of 65536: 1 / 4096 in the saved gradient would flush it."""
    student, teacher = logits(4, 2000, dtype=F16, scale=1.0), logits(4, 2000, dtype=F16, scale=1.0)
    kwargs: Any = dict(
        divergence=divergence, reduction="mean", normalizer=4096.0, grad_output=65536.0
    )
    check(student, teacher, **kwargs)
    gradient = kd(emulation.NAME, student, teacher, **kwargs)[3]
    want = kd("reference", student.double(), teacher.double(), **kwargs)[3]
    flushed = (gradient == 0) & (want.abs() > 1e-6)
    assert not flushed.any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float16_saved_gradient(divergence: str, launcher: ModuleType) -> None:
    """Scaled by a power of two so that nothing overflows, and next to nothing is flushed to 0."""
    for scale, weight, temperature in itertools.product((0.1, 30.0), (1e-6, 1.0, 1e6), (0.1, 10.0)):
        student, teacher = (logits(4, 50, dtype=F16, scale=scale) for _ in range(2))
        row_weight = torch.tensor([1.0, 2.0, 0.0, 4.0])
        *_, grad, grad_scale = launcher.kd_fwd(
            student, teacher, None, None, row_weight, None, temperature, 0.0, weight, divergence,
            True, -100, 0.0, "sum", 1.0, True,
        )  # fmt: skip
        power = row_weight[[0, 1, 3]] / grad_scale[[0, 1, 3]]
        assert torch.equal(torch.exp2(torch.log2(power).round()), power)
        assert grad.isfinite().all() and grad_scale[2] == 0 and not grad[2].any()
        want = kd(
            "reference", student.double(), teacher.double(), row_weight=row_weight,
            temperature=temperature, soft_weight=weight, divergence=divergence, reduction="sum",
        )[3]  # fmt: skip
        got = grad.double() * grad_scale[:, None]
        size = weight * temperature * 4 * cancelling(student, teacher, temperature, divergence)
        torch.testing.assert_close(got, want, rtol=2e-3, atol=4 * EPS * size)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("width", [3, 700, 9001])
def test_backward(width: int, dtype: torch.dtype, launcher: ModuleType) -> None:
    """In place and into a new tensor, one factor and one per row, across pieces of long rows."""
    grad = logits(5, width, dtype=dtype)
    scale = torch.rand(5) + 0.5 if dtype == F16 else torch.empty(0)
    for grad_output in (torch.tensor(-2.5), torch.tensor(3.0).expand(5), torch.randn(10)[::2]):
        factor = (scale if dtype == F16 else 1.0) * grad_output
        want = (grad.float() * factor.expand(5)[:, None]).to(dtype)
        before = grad.clone()
        assert torch.equal(launcher.kd_bwd(grad, scale, grad_output), want)
        assert torch.equal(grad, before)
        launcher.kd_bwd_(before, scale, grad_output)
        assert torch.equal(before, want)


def test_backward_in_place_at_factor_1_touches_nothing(launcher: ModuleType) -> None:
    """Decided on the device: the gradient lies in memory that can be neither read nor written."""
    memory = mmap.mmap(-1, 4 * mmap.PAGESIZE)
    grad = torch.frombuffer(memory, dtype=BF16).view(4, -1)
    none = torch.empty(0)
    address = ctypes.c_void_p(grad.data_ptr())
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(address, ctypes.c_size_t(4 * mmap.PAGESIZE), 0) == 0
    launcher.kd_bwd_(grad, none, torch.tensor(1.0))
    launcher.kd_bwd_(grad, none, torch.ones(4))
    libc.mprotect(address, ctypes.c_size_t(4 * mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_WRITE)
    grad.fill_(2.0)
    launcher.kd_bwd_(grad, none, torch.tensor([1.0, 3.0, 1.0, 1.0]))
    assert grad.float().amax(-1).tolist() == [2.0, 6.0, 2.0, 2.0]


def test_no_rows_no_gradient_and_a_kept_graph() -> None:
    for dtype in (F32, F16):
        loss, _, _, gradient = kd(emulation.NAME, logits(0, 7, dtype=dtype), logits(0, 7))
        assert loss == 0 and gradient.shape == (0, 7)
    student, teacher = logits(3, 1100), logits(3, 1100)
    for divergence in DIVERGENCES:
        with fastdistill.backend(emulation.NAME):
            plain = fastdistill.kd_loss(student, teacher, divergence=divergence)
        assert plain == kd(emulation.NAME, student, teacher, divergence=divergence)[0]
    leaf = student.requires_grad_()
    with fastdistill.backend(emulation.NAME):
        loss = fastdistill.kd_loss(leaf, teacher)
    first, second = (
        torch.autograd.grad(loss, leaf, torch.tensor(3.0), retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [F32, F16])
def test_the_order_of_threads_changes_nothing(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for width, divergence in itertools.product((100, 4099), DIVERGENCES):
        student, teacher = logits(3, width, dtype=dtype), logits(3, width, dtype=dtype)
        labels = torch.randint(width, (3,))
        kwargs: Any = dict(divergence=divergence, label_smoothing=0.1, **parts("both"))
        forward = kd(emulation.NAME, student, teacher, labels, temperature=2.0, **kwargs)
        monkeypatch.setenv("CUEMU_REVERSE", "1")
        reverse = kd(emulation.NAME, student, teacher, labels, temperature=2.0, **kwargs)
        monkeypatch.delenv("CUEMU_REVERSE")
        assert all(torch.equal(x, y) for x, y in zip(forward, reverse, strict=True))


def test_op_check() -> None:
    for dtype in (F32, F16):
        student, teacher = logits(2, 3, 9, dtype=dtype), logits(2, 3, 9, dtype=dtype)
        labels = torch.randint(9, (2, 3))
        args: Any = (
            student, teacher, labels, None, None, None, 2.0, 0.5, 0.5, "forward_kl", True, -100,
            0.0, "mean", 1.0, True, emulation.NAME,
        )  # fmt: skip
        torch.library.opcheck(torch.ops.fastdistill.kd_fwd, args)
        *_, grad, grad_scale = torch.ops.fastdistill.kd_fwd(*args)
        torch.library.opcheck(
            torch.ops.fastdistill.kd_bwd, (grad, grad_scale, torch.tensor(2.0), emulation.NAME)
        )


def test_a_failed_launch_raises(launcher: ModuleType) -> None:
    """A float64 gradient, which nothing but a call past the refusals can ask for."""
    with pytest.raises(RuntimeError, match="kd_loss backward: the CUDA kernel did not start"):
        launcher._launch(
            "kd_scale", torch.device("cpu"), input=0, output=0, type=1, rows=1, cols=1,
            grad_scale=0, grad_output=0, uniform=True,
        )  # fmt: skip


def test_pairs_of_element_types() -> None:
    every = (F32, BF16, F16, torch.float64)
    native = {pair for pair in itertools.product(every, every) if native_cuda.supports(*pair)}
    assert native == set(PAIRS)


def test_refusals() -> None:
    student = logits(2, 3)
    with fastdistill.backend("cuda"), pytest.raises(RuntimeError, match="not on cpu"):
        fastdistill.kd_loss(student, student)
    case = _backend.Case("cuda", (BF16, F16), False)
    reason = _backend.ops()["kd_loss"]["cuda"](case)
    assert reason is not None and "torch.bfloat16 with torch.float16" in reason
