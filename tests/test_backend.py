"""The choice of a backend, and what `fastdistill doctor` says of it."""

import os
import subprocess
import sys
import threading

import pytest
import torch

import fastdistill as fd
from fastdistill import _backend, _doctor, _native

S, T = torch.randn(3, 5), torch.randn(3, 5)


def python(code, **environment):
    """Run code in a fresh interpreter; (exit status, output)."""
    environment = {k: v for k, v in environment.items() if v is not None}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True,
        text=True,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="backend: expected one of auto, triton.*got 'gpu'"):
        fd.backend("gpu")
    with pytest.raises(ValueError, match="got None"):
        fd.backend(None)


def test_blocks_nest_and_end_with_an_exception():
    assert _backend.requested() == "auto"
    outer = fd.backend("reference")
    with outer:
        with fd.backend("auto"):
            assert _backend.requested() == "auto"
            with outer:
                assert _backend.requested() == "reference"
        assert _backend.requested() == "reference"
    with pytest.raises(KeyError), fd.backend("cuda"):
        raise KeyError
    assert _backend.requested() == "auto"


def test_a_request_holds_for_its_thread_only():
    seen = []
    with fd.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(_backend.requested()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_an_explicit_backend_that_cannot_run_says_why_and_what_can():
    for name in ("cuda", "triton"):
        with fd.backend(name), pytest.raises(RuntimeError) as caught:
            fd.kd_loss(S, T)
        text = str(caught.value)
        assert f"kd_loss: backend {name!r} cannot run on device 'cpu'" in text
        assert f"  {name}: " in text and "these can: " in text and "reference" in text


def test_auto_takes_the_first_that_can(monkeypatch):
    case = _backend.Case("cpu", (torch.float32, torch.float32), False)
    expected = "cpu" if _native.cpu().module else "reference"
    assert _backend.choose("kd_loss", case) == expected
    assert _backend.choose("kd_loss", case._replace(transforms=True)) == "reference"
    refuse = {name: (lambda c: "no") for name in _backend.ORDER}
    monkeypatch.setitem(_backend._ops, "nothing", refuse)
    with pytest.raises(RuntimeError, match="triton: no\n  cuda: no\n  cpu: no\n  reference: no"):
        _backend.choose("nothing", case)


def test_environment_variable():
    code = "import torch, fastdistill as fd; print(fd.kd_loss(torch.ones(2, 3), torch.ones(2, 3)))"
    assert python(code, FASTDISTILL_BACKEND="reference")[0] == 0
    status, text = python(code, FASTDISTILL_BACKEND="cuda")
    assert status != 0 and "backend 'cuda' cannot run" in text
    status, text = python(code, FASTDISTILL_BACKEND="fast")
    assert status != 0 and "FASTDISTILL_BACKEND: expected one of auto" in text
    unused = "import fastdistill"  # read at first use, not at import
    assert python(unused, FASTDISTILL_BACKEND="fast")[0] == 0


def test_without_the_compiled_module_auto_takes_the_reference():
    code = (
        "import sys; sys.modules['fastdistill._cpu'] = None\n"
        "import torch, fastdistill as fd\n"
        "s = torch.randn(2, 3, requires_grad=True)\n"
        "fd.kd_loss(s, torch.ones(2, 3)).backward()\n"
        "try:\n"
        "    with fd.backend('cpu'): fd.kd_loss(s, torch.ones(2, 3))\n"
        "except RuntimeError as error: print(error)\n"
    )
    status, text = python(code)
    assert status == 0 and "fastdistill._cpu did not load" in text and "C++ compiler" in text


def test_import_is_light_and_touches_no_device():
    code = (
        "import sys, time, torch\n"
        "before = set(sys.modules); start = time.perf_counter()\n"
        "import fastdistill\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "assert not new & {'triton', 'opacus', 'matplotlib', 'pandas', 'sklearn'}, new\n"
        "assert 'fastdistill.distill' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(time.perf_counter() - start)\n"
    )
    status, text = python(code)
    assert status == 0, text


def test_the_choice_on_a_gpu_can_be_traced():
    """torch.compile meets it on a GPU as its first call; here as far as the choice goes."""
    code = (
        "import torch, fastdistill\n"
        "from fastdistill import _backend\n"
        "def reasons(x):\n"
        "    case = _backend.Case('cuda', (torch.float32, torch.float32), False)\n"
        "    why = _backend.reasons('kd_loss', case)\n"
        "    return x + (why['triton'] is None) + 2 * (why['cpu'] is None)\n"
        "f = torch.compile(reasons, fullgraph=True, backend='eager')\n"
        "print(f(torch.zeros(())).item())\n"
    )
    status, text = python(code)
    assert status == 0 and float(text.split()[-1]) in (0.0, 1.0), text


def test_doctor_names_what_is_there_and_why_not():
    text = _doctor.report()
    for word in (
        "torch",
        "triton",
        "threads",
        "instruction set",
        "backend requested",
        "kd_loss on",
    ):
        assert word in text
    assert "not cuda: " in text or torch.cuda.is_available()
