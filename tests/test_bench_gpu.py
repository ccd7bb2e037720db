"""`make gpu` where there is no GPU: it says so, and the parts that need none are right."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu, modelled

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err


def test_outcomes_of_a_test_run():
    junit = """<testsuites><testsuite>
      <testcase classname="a" name="one"/>
      <testcase classname="a" name="two"><failure message="no"/></testcase>
      <testcase classname="a" name="three"><skipped message="needs a second device"/></testcase>
    </testsuite></testsuites>"""
    assert gpu.outcomes(junit) == {
        "passed": 1, "failed": ["a::two"], "skipped": {"needs a second device": 1}
    }  # fmt: skip


def test_a_package_that_is_missing_skips_its_tests(tmp_path):
    """Not all of them: the machine with the GPU need not have what plots and jobs need."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules['matplotlib'] = None  # as if it were not installed\n"
    )
    files = [ROOT / "tests" / name for name in ("test_distill_job.py", "test_gpu.py")]
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "--collect-only", "-rs", "-p", "no:cacheprovider"]

    def collect(*arguments):
        return subprocess.run(
            [*command, *arguments], capture_output=True, text=True, cwd=ROOT,
            env=os.environ | {"PYTHONPATH": paths},
        )  # fmt: skip

    found = collect("-m", "gpu", *files)
    assert found.returncode == 0, found.stdout
    assert "test_distill_job.py:1: no package matplotlib" in found.stdout
    assert "test_gpu.py" in found.stdout
    assert collect(files[0]).returncode != 0  # elsewhere nothing is passed over


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no triton")
def test_the_model_stands_beside_the_figure():
    row = {"op": "kd", "shape": (512, 50257), "dtype": "bf16", "ms": {"triton": 1.0}}
    rows = [{**row, "pass": "both"}, {**row, "pass": "forward"}]
    modelled.add_models(rows, "NVIDIA H100 80GB HBM3")
    found = rows[0]["modelled"]
    assert found["gpu"] == "H100" and found["kernel"] == "_kd_blocks_kernel"
    # 10 bytes an element at 3.35 TB/s, unless issue or exponentials take longer; 6 are needed.
    assert found["ms"] >= 512 * 50257 * 10 / 3.35e12 * 1e3 * 0.999
    assert found["least_ms"] == pytest.approx(512 * 50257 * 6 / 3.35e12 * 1e3)
    assert found["measured_over_modelled"]["triton"] == pytest.approx(1 / found["ms"])
    assert rows[1]["modelled"] is None
    modelled.add_models(rows, "NVIDIA Unknown")
    assert "no peak rates" in rows[0]["modelled"]["skipped"]
