"""The inner loops of the compiled kernels keep to their budgets of instructions."""

import shutil
import subprocess

import pytest

from bench import __main__ as command
from bench import instructions
from bench.instructions import Loop
from fastdistill import _native

reason = instructions.unavailable()
needs_objdump = pytest.mark.skipif(reason is not None, reason=str(reason))


@needs_objdump
def test_no_inner_loop_is_longer_than_recorded():
    built_by = instructions.compiler()
    allowed = instructions.budgets(built_by)
    if allowed is None:
        pytest.skip(
            f"no budgets of {built_by}: `python -m bench instructions --record` on a commit that "
            "is known to be good writes them"
        )
    counts = instructions.count()
    levels = {name for name in instructions.LEVELS if name in allowed}
    assert levels == set(counts)
    for level in levels:
        vectors = [x for loops in counts[level].values() for x in loops if x.elements]
        assert len(vectors) > 30  # the loops are found at all
    assert not instructions.over(counts, allowed)


def parsed(text):
    ((_, _), (_, code)) = instructions._functions(text)
    return code


def test_loops_and_their_elements():
    """One inner loop of 16 floats a turn, in an outer one; one of scalars; one that calls."""
    code = parsed("""0000000000000010 <f()>:
  10:\txor    %eax,%eax
  12:\tvmovups (%rdi,%rax,1),%ymm0
  14:\tvaddps 0x20(%rdi,%rax,1),%ymm0,%ymm1
  16:\tnopl   0x0(%rax)
  18:\tvmovups %ymm1,(%rsi,%rax,1)
  1a:\tadd    $0x40,%rax
  1c:\tcmp    %rdx,%rax
  1e:\tjne    12 <f()+0x2>
  20:\tadd    $0x1,%r8
  22:\tjne    10 <f()>
  24:\tvaddss (%rdi),%xmm0,%xmm0
  26:\tadd    $0x4,%rdi
  28:\tjne    24 <f()+0x14>
  2a:\tvaddps (%rdi),%ymm0,%ymm0
  2c:\tcall   99 <g()>
  2e:\tjne    2a <f()+0x1a>
  30:\tvmulpd (%rdi,%rcx,8),%ymm0,%ymm0
  32:\tsub    $0xfffffffffffffffc,%rcx
  34:\tjne    30 <f()+0x20>
""")
    assert list(instructions.inner_loops(code, 4)) == [(6, 16), (3, 8)]
    assert list(instructions.inner_loops(code, 8)) == [(6, 8), (3, 4)]


def test_what_is_over():
    allowed = {"avx2": {"a": [Loop(40, 16), Loop(10, 16)], "b": [Loop(5, 8)]}}
    assert instructions.over(allowed, allowed) == []
    assert instructions.over({"avx2": {**allowed["avx2"], "b": [Loop(10, 16)]}}, allowed) == []
    longer = {"avx2": {**allowed["avx2"], "a": [Loop(41, 16), Loop(10, 16)]}}
    (found,) = instructions.over(longer, allowed)
    assert "avx2 a: 41/16 10/16, recorded 40/16 10/16" in found and found.endswith("longer")
    (found,) = instructions.over({"avx2": {"a": allowed["avx2"]["a"]}}, allowed)
    assert "b: none, recorded 5/8" in found and found.endswith("other loops")
    (found,) = instructions.over({"avx2": {**allowed["avx2"], "new": [Loop(1, 4)]}}, allowed)
    assert "new: 1/4, recorded none" in found


SOURCE = """
namespace fd { namespace avx2 {
float exp_loop(const float* x, float* e, long n) {
  for (long i = 0; i < n; i++) e[i] = x[i] * x[i] + %s;
  return e[0];
}
}}
"""


@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("objdump") is None,
                    reason="needs g++ and objdump")  # fmt: skip
def test_a_slower_source_is_seen(tmp_path):
    """From the source to the verdict: one more operation an element."""
    counts = []
    for i, term in enumerate(("1.0f", "x[i] / 3.0f")):
        path, out = tmp_path / f"{i}.cpp", tmp_path / f"{i}.so"
        path.write_text(SOURCE % term)
        subprocess.run(["g++", "-O3", "-shared", "-fPIC", str(path), "-o", str(out)], check=True)
        counts.append(instructions.count(out))
    fast, slow = counts
    assert fast["avx2"]["exponential"][-1].elements in (4, 8, 16)
    assert instructions.over(fast, fast) == []
    assert any("avx2 exponential" in x for x in instructions.over(slow, fast))
    assert "GCC" in instructions.compiler(out) or "clang" in instructions.compiler(out)


@needs_objdump
def test_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(instructions, "BUDGETS", tmp_path / "budgets.json")
    short = {"avx2": {"exponential": [Loop(50, 16)]}}
    monkeypatch.setattr(instructions, "count", lambda: short)
    assert command.main(["instructions"]) == 0
    assert "no budgets of" in capsys.readouterr().out
    assert command.main(["instructions", "--record"]) == 0
    assert instructions.budgets(instructions.compiler()) == short
    longer = {"avx2": {"exponential": [Loop(51, 16)]}}
    monkeypatch.setattr(instructions, "count", lambda: longer)
    assert command.main(["instructions"]) == 1
    assert "longer" in capsys.readouterr().out


def test_without_objdump_it_says_so(monkeypatch, capsys):
    if _native.cpu().module is None:
        pytest.skip(str(_native.cpu().reason))
    monkeypatch.setattr(instructions.shutil, "which", lambda name: None)
    assert command.main(["instructions"]) == 2
    assert "needs objdump" in capsys.readouterr().err
