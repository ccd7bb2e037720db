"""On a GPU: both kernels of kd_loss against float64, of clip_and_noise against the oracle's bits.

Skipped where there is none.
"""

import itertools

import privacy_checks
import privacy_teacher_checks as teacher_checks
import pytest
import torch
from budget import assert_within
from test_kd_values import BF16, DIVERGENCES, F16, F32, logits, run

import fastdistill as fd
from fastdistill.privacy import mechanism, reference, source

pytestmark = pytest.mark.gpu
KERNELS = ["triton", "cuda"]


def check(backend, student, teacher, labels, **settings):
    """Values and gradient of a kernel on the GPU within the budget of float64."""
    settings = {"labels": labels, "hard_weight": 0.5, **settings}
    got = run(backend, student, teacher, **settings)
    want = run("reference", student.double(), teacher.double(), **settings)
    native = run("reference", student, teacher, **settings)
    assert_within("loss", got[0].unsqueeze(-1), want[0].unsqueeze(-1), native[0].unsqueeze(-1))
    assert_within("gradient", got[3], want[3], native[3])


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("classes", [1, 10, 100, 1000, 8192, 32000, 50257, 128256])
def test_kd_values_and_grads(backend, dtype, classes):
    s, t = logits((9, classes), dtype).cuda(), logits((9, classes), dtype).cuda()
    y = torch.randint(classes, (9,)).cuda()
    for divergence, temperature in itertools.product(DIVERGENCES, (1.0, 2.0, 3.0)):
        check(backend, s, t, y, divergence=divergence, temperature=temperature)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_kd_identical_logits_are_exactly_zero(backend, dtype):
    for classes, divergence in itertools.product((10, 1000, 50257), ("forward_kl", "reverse_kl")):
        x = logits((5, classes), dtype).cuda()
        loss, _, _, grad = run(backend, x, x.clone(), temperature=2.0, divergence=divergence)
        assert loss == 0 and (grad == 0).all()


@pytest.mark.parametrize("backend", KERNELS)
def test_kd_strided_rows_bad_rows_and_dropped_rows(backend):
    base, other = logits((3, 7, 501), BF16).cuda(), logits((3, 7, 501), BF16).cuda()
    s, t, y = base[:, :-1], other[:, 1:], torch.randint(501, (3, 6)).cuda()
    y[0, 0] = -100
    s[0, 0], s[1, 1, 3] = float("nan"), float("nan")
    y[2, 2] = 501  # no class: NaN for that row, no synchronisation
    loss, _, _, grad = run(
        backend, s, t, torch.ones(3, 6).cuda(), labels=y, hard_weight=0.5, reduction="none"
    )
    bad = loss.isnan()
    assert loss[0, 0] == 0 and (grad[0, 0] == 0).all()
    assert bad.sum() == 2 and bad[1, 1] and bad[2, 2]
    assert torch.equal(grad.isnan().any(-1), bad)


@pytest.mark.parametrize("backend", KERNELS)
def test_kd_never_synchronises_and_can_be_captured(backend):
    s = logits((64, 5000), BF16).cuda().requires_grad_()
    t, y = logits((64, 5000), BF16).cuda(), torch.randint(5000, (64,)).cuda()

    def step():
        s.grad = None
        with fd.backend(backend):
            fd.kd_loss(s, t, y, hard_weight=0.5, temperature=2.0).backward()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    want = s.grad.clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    captured = s.grad
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, want)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_kd_sanitized(backend, dtype):
    """Small, for compute-sanitizer (bench/gpu.py): each kernel once, at odd widths."""
    for classes in (10, 1001, 9001):
        s, t = logits((3, classes), dtype).cuda(), logits((3, classes), dtype).cuda()
        check(backend, s, t, torch.randint(classes, (3,)).cuda(), temperature=2.0)


def check_privacy(backend, dtype, batch, sizes, device="cuda"):
    """All bits of the noise and of the sums on their grid are those of the reference on the CPU.

    A norm is a sum in another order: its last bit may move a contribution by one grid in 2^31.
    """
    samples = [torch.randn(batch, n).mul(3 / n**0.5).to(dtype) for n in sizes]
    if batch > 2:
        samples[0][1, 0] = float("nan")
    for bits in (privacy_checks.philox(5), privacy_checks.chacha20(1 << 40), source.silent()):
        sigma = 0.0 if bits.kind == source.NONE else 2.0
        planned = mechanism.plan(1.0, sigma, 3.0, sum(sizes), dtype is not torch.float64)
        want = reference.clip_and_noise(samples, planned, bits)
        got = torch.ops.fastdistill.clip_and_noise(
            [x.to(device) for x in samples], *planned, *bits, backend
        )
        for a, b in zip(got, want, strict=True):
            if sigma:
                assert int((a.cpu() != b).sum()) <= 1
            else:
                torch.testing.assert_close(a.cpu(), b, rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16, torch.float64])
def test_privacy_has_the_reference_s_bits(backend, dtype):
    for batch in (0, 1, 7, 64):
        check_privacy(backend, dtype, batch, (5, 4099, 1 << 16))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16, torch.float64])
@pytest.mark.parametrize("kind", teacher_checks.SUMS)
def test_privacy_teachers_have_the_reference_s_bits(backend, dtype, kind):
    for k, n, c in ((1, 1, 1), (250, 33, 10), (3, 5, 512), (6, 4, 50257)):
        teachers = list((torch.randn(k, n, c) * 3).to(dtype))
        teachers[k // 2][0, c // 2] = float("nan")
        for bits in (privacy_checks.philox(5), privacy_checks.chacha20(1 << 40)):
            want = teacher_checks.of_backend("reference").sum(kind, teachers, 1.0, bits, 1.7)
            on_gpu = [x.cuda() for x in teachers]
            got = teacher_checks.of_backend(backend).sum(kind, on_gpu, 1.0, bits, 1.7).cpu()
            assert int((got != want).sum()) <= (kind == "gradient")


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_privacy_sanitized(backend, dtype):
    """Small, for compute-sanitizer: both kernels, aligned and not, each generator."""
    check_privacy(backend, dtype, 5, (5, 2056, 1031))
    for kind in teacher_checks.SUMS:
        for shape in ((3, 5, 10), (2, 3, 1032), (2, 3, 1031)):
            teachers = list(torch.randn(shape).to(dtype).cuda())
            got = teacher_checks.of_backend(backend).sum(kind, teachers, 1.0)
            assert got.isfinite().all()


@pytest.mark.parametrize("backend", KERNELS)
def test_privacy_never_synchronises_and_refuses_a_graph(backend):
    x = torch.randn(8, 5000, device="cuda")

    def release():
        with fd.backend(backend):
            fd.privacy.noisy_softmax_sum([x, x], 1.0, 1.0)
            return fd.privacy.clip_and_noise([x], 1.0, 1.0, expected_batch_size=8)[0]

    release()
    torch.cuda.set_sync_debug_mode("error")
    try:
        release()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(RuntimeError, match="replayed"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        release()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second device")
@pytest.mark.parametrize("backend", KERNELS)
def test_kd_on_the_second_device(backend):
    """While the first one is current: the launchers guard the device."""
    assert torch.cuda.current_device() == 0
    s, t = logits((4, 300)).to("cuda:1"), logits((4, 300)).to("cuda:1")
    check(backend, s, t, torch.randint(300, (4,)).to("cuda:1"))
    check_privacy(backend, F32, 4, (300,), "cuda:1")
