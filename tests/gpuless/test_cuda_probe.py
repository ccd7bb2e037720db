"""The CUDA C++ kernels under sanitizers, with faults put into them, and the SIMT header's own test.

A probe runs every kind of kernel of a room on small rows. It has to be clean under
AddressSanitizer and UndefinedBehaviorSanitizer, in both orders of threads, and under
ThreadSanitizer with a thread per CUDA thread; and each fault that cuda_faults.py can make in the
kernels has to be found, or these checks prove nothing.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import cuda_emulation as emulation
import cuda_faults as faults
import pytest

pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=str(emulation.missing()))

PROBES = faults.probes()
CLUSTER = "probe_cluster.cu"


@pytest.mark.parametrize("probe", [*PROBES, CLUSTER])
def test_memory_and_undefined_behaviour(probe: str, tmp_path: Path) -> None:
    sources = emulation.instrumented(emulation.SOURCES, tmp_path / "cuda")
    program = faults.build(probe, faults.MEMORY, sources, tmp_path / "probe")
    assert faults.run(program) == faults.run(program, CUEMU_REVERSE="1") == ""


@pytest.mark.parametrize("probe", [*PROBES, CLUSTER])
def test_races(probe: str, tmp_path: Path) -> None:
    sources = emulation.instrumented(emulation.SOURCES, tmp_path / "cuda")
    program = faults.build(probe, faults.RACES, sources, tmp_path / "probe")
    assert faults.run(program) == ""


@pytest.mark.parametrize("probe", PROBES)
def test_every_fault_is_found(probe: str, tmp_path: Path) -> None:
    outcomes = faults.hunt(probe, PROBES[probe], tmp_path)
    excused = faults.harmless(probe)
    survivors = {str(o.fault) for o in outcomes if not o.caught}
    assert not survivors - excused.keys(), survivors - excused.keys()
    assert not excused.keys() - survivors, "excused, but found or not there"
    caught = set().union(*(o.caught for o in outcomes))
    barriers = any(o.fault.kind == "barrier removed" for o in outcomes)
    expected = {"values", "addresses", "undefined behaviour"}
    expected |= {"barriers", "races"} if barriers else set()
    assert expected <= caught, f"no fault was there for {expected - caught}"
    for outcome in outcomes:
        if outcome.fault.kind == "barrier removed":
            assert outcome.race == "races", outcome


def test_clusters_and_launch_bounds_are_modelled(tmp_path: Path) -> None:
    """Faults in the header's own cluster kernel, each found by the check that is meant to."""
    sources = emulation.instrumented(emulation.SOURCES, tmp_path / "cuda")
    (tmp_path / "faulty").mkdir()
    probes = emulation.instrumented(emulation.EMULATOR, tmp_path / "faulty" / "cuemu")
    made = {str(f): f.number for f in faults.put_in(probes, (CLUSTER,))}
    program = tmp_path / "probe"
    subprocess.run(
        emulation.compile_kernels(probes / CLUSTER, program, faults.MEMORY, sources), check=True
    )

    def reports(fault: str) -> str:
        chosen = {"CUEMU_FAULT": str(made[fault])}
        found = [faults.run(program, **chosen, **e) for e in ({}, {"CUEMU_REVERSE": "1"})]
        return "".join(found)

    sync = f"barrier removed: {CLUSTER}: cluster.sync();"
    assert "probe: sum of a cluster" in reports(sync)
    assert "shared memory of a block that has returned" in reports(f"{sync} (#2)")
    stale = f"stale shared memory: {CLUSTER}: if (threadIdx.x == 0) part[0] = sum;"
    assert "probe: " in reports(stale)
    assert "cuemu: " in reports(f"barrier for one warp: {CLUSTER}: cluster.sync();")
    assert "more threads than the kernel's __launch_bounds__" in faults.run(program, "128")
