"""The compiled CPU module: instruction sets, threads, memory, life in a process."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_backend import python
from test_kd_values import BF16, F16, F32, F64, logits, run

import fastdistill as fd
from fastdistill import _native

MODULE = _native.cpu().module
pytestmark = pytest.mark.skipif(MODULE is None, reason=str(_native.cpu().reason))
TESTS = Path(__file__).parent


def other_isas():
    if MODULE is None:
        return []
    return [name for name, has in MODULE.isas() if has and name != MODULE.active_isa()]


@pytest.mark.parametrize("isa", other_isas())
def test_every_instruction_set_passes_the_values(isa):
    """The suites of values and edges again, with this level forced."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cpu"]
    rooms = {"kd": ("values", "edges"), "privacy": ("values", "noise", "edges", "products")}
    files = [str(TESTS / f"test_{room}_{x}.py") for room, kinds in rooms.items() for x in kinds]
    done = subprocess.run(
        [*command, *files], env={**os.environ, "FASTDISTILL_CPU_ISA": isa}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\d+ passed", done.stdout) or "100%" in done.stdout


def test_forced_instruction_set_is_taken_or_refused():
    code = "from fastdistill import _native; print(_native.cpu().module.active_isa())"
    for name, has in MODULE.isas():
        status, text = python(code, FASTDISTILL_CPU_ISA=name)
        if has:
            assert status == 0 and text.strip() == name
        else:
            assert status != 0 and f"does not support {name}" in text
    status, text = python(code, FASTDISTILL_CPU_ISA="sse9")
    assert status != 0 and "FASTDISTILL_CPU_ISA: expected one of" in text


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_each_level_keeps_to_its_instructions():
    """A function of another level, picked by the linker, would stop an older processor."""
    done = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", "-C", MODULE.__file__], capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    widest, vector_work, isa = {}, {}, None
    for line in done.stdout.splitlines():
        if header := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            level = re.search(r"fd::(avx512|avx2|baseline)::", header[1])
            isa = level[1] if level else "common"
        elif isa and (registers := re.findall(r"%([xyz])mm\d", line)):
            widest[isa] = max(widest.get(isa, "x"), *registers)
            fused = "vfmadd" in line or "vfnmadd" in line or "vfmsub" in line
            vector_work[isa] = vector_work.get(isa, 0) + fused
    assert widest["baseline"] == "x" and vector_work["baseline"] == 0
    assert widest.get("common", "x") == "x"
    if "avx2" in widest:
        assert widest["avx2"] == "y" and vector_work["avx2"] > 100
        assert widest["avx512"] == "z" and vector_work["avx512"] > 100


def test_one_openmp_runtime_in_the_process():
    run("cpu", logits((64, 1000)), logits((64, 1000)))
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    code = (
        "import torch, fastdistill as fd\n"
        "fd.kd_loss(torch.randn(64, 1000), torch.randn(64, 1000))\n"
        "names = {l.split()[-1] for l in open('/proc/self/maps') if 'gomp' in l or 'omp5' in l}\n"
        "print(len(names), names)\n"
    )
    status, text = python(code)
    assert status == 0 and int(text.split()[0]) <= 1, text


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_same_bits_for_any_number_of_threads(dtype):
    settings = [((300, 100), {}), ((37, 5000), {"divergence": "reverse_kl"}), ((9, 40_000), {})]
    threads = torch.get_num_threads()
    try:
        for shape, extra in settings:
            s, t = logits(shape, dtype), logits(shape, dtype)
            y = torch.randint(shape[1], shape[:1])
            results = []
            for count in (1, 2, 3, 8, 1):
                torch.set_num_threads(count)
                results.append(
                    run("cpu", s, t, torch.tensor(0.3), labels=y, hard_weight=0.5, **extra)
                )
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_a_forked_child_can_compute_with_one_thread():
    code = (
        "import os, torch, fastdistill as fd\n"
        "s, t = torch.randn(64, 2000), torch.randn(64, 2000)\n"
        "torch.set_num_threads(1)\n"
        "fd.kd_loss(s, t)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    fd.kd_loss(s, t); os._exit(0)\n"
        "print(os.waitpid(pid, 0)[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "0"


PEAK = """
import sys, torch, fastdistill as fd
rows, classes, dtype, mode = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.set_num_threads(2)
s = torch.zeros(rows, classes, dtype=getattr(torch, dtype)).uniform_()
t = torch.zeros(rows, classes, dtype=getattr(torch, dtype)).uniform_()
s.requires_grad_(mode != "forward")
def step():
    loss = fd.kd_loss(s, t, temperature=2.0)
    if mode == "backward": (loss * 1.5).backward()
    if mode == "retain": (loss * 1.5).backward(retain_graph=True)
def status(key):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) * 1024
small, s_all, t_all = s.detach()[:8].clone(), s, t
s, t = small.requires_grad_(mode != "forward"), t[:8]
step()                                   # code and pools in place
s, t = s_all, t_all
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
step()
print((status("VmHWM") - before) / (rows * classes * s.element_size()))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs clear_refs")
@pytest.mark.parametrize(
    "mode, dtype, limit",
    [
        ("forward", "float32", 0.1),
        ("backward", "float32", 1.1),
        ("backward", "bfloat16", 1.1),
        ("retain", "float32", 2.1),
        ("backward", "float16", 2.1),
    ],
)
def test_peak_memory_is_the_gradient_and_no_more(mode, dtype, limit):
    """Beyond the inputs, in gradients: none without need of one, one, two under retain_graph."""
    command = [sys.executable, "-c", PEAK, "1024", "32000", dtype, mode]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) <= limit


def test_a_factor_of_one_touches_nothing():
    """In place and 1: the buffer of the forward pass becomes the gradient as it is."""
    s, t = logits((64, 3000)).requires_grad_(), logits((64, 3000))
    with fd.backend("cpu"):
        _, _, _, grad, scale = torch.ops.fastdistill.kd_fwd(
            s.detach(), t, None, None, None, None, 2.0, 0.0, 1.0, "forward_kl", True, -100, 0.0,
            "mean", 1.0, True, "cpu",
        )  # fmt: skip
        before = grad.clone()
        torch.ops.fastdistill.kd_bwd_(grad, scale, torch.tensor(1.0), "cpu")
        assert torch.equal(grad, before)
        torch.ops.fastdistill.kd_bwd_(grad, scale, torch.tensor(2.0), "cpu")
        assert torch.equal(grad, 2 * before)
        copy = torch.ops.fastdistill.kd_bwd(grad, scale, torch.tensor(1.0), "cpu")
        assert torch.equal(copy, grad) and copy.data_ptr() != grad.data_ptr()
