"""No kernel without the checks: what the sources launch is what the table has."""

from __future__ import annotations

from pathlib import Path

import pytest
import table


def test_every_triton_kernel_is_in_the_table() -> None:
    listed = [(k.module, k.name) for k in table.TRITON]
    assert len(set(listed)) == len(listed)
    assert set(listed) == table.triton_kernels(), "docs/verification.md: how to add a kernel"


def test_every_cuda_kernel_is_in_the_table() -> None:
    listed = [(k.source, k.name) for k in table.CUDA]
    assert len(set(listed)) == len(listed)
    assert set(listed) == table.cuda_kernels(), "docs/verification.md: how to add a kernel"


def test_discovery_finds_kernels_however_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "a.py").write_text(
        "import triton\nfrom triton import jit\n"
        "@triton.jit\ndef helper(x):\n    return x\n"
        "@triton.jit(do_not_specialize=['n'])\ndef _one(x):\n    helper(x)\n"
        "@jit\ndef two(x):\n    helper(x)\n"
        "def launcher(x):\n    _one[(1,)](x)\n"
    )
    assert table.triton_kernels(tmp_path / "pkg") == {("pkg.a", "_one"), ("pkg.a", "two")}
    (tmp_path / "k.cu").write_text(
        "// __global__ void not_this() {\n"
        "template <class T>\n__global__ void __launch_bounds__(f(T::n), 2)\n  one(T x) { }\n"
        'extern "C" __global__ void two(int x)\n{ }\n'
    )
    assert table.cuda_kernels(tmp_path) == {("k.cu", "one"), ("k.cu", "two")}


@pytest.mark.parametrize("kernel", table.TRITON, ids=lambda k: k.name)
def test_headlines_and_faults_are_possible(kernel: table.TritonKernel) -> None:
    assert kernel.headlines and kernel.faults
    for config in (*kernel.headlines.values(), *kernel.faults):
        assert config.keys() == kernel.factors.keys() and kernel.possible(config)
