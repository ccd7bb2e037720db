"""What a figure depends on besides the code: recorded with every run."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path

import torch

import fastdistill
from fastdistill import _native

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "triton", "numpy")


def describe(device: str) -> dict[str, object]:
    """Versions, processor, instruction set, threads, allocator, date, commit, load."""
    found: dict[str, object] = {
        "fastdistill": fastdistill.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": isa(),
        "allocator": "thp" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "default",
        "transparent_hugepage": _chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "load_average": round(os.getloadavg()[0], 2),
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


def isa() -> str | None:
    """The instruction set that the CPU kernels use here."""
    module = _native.cpu().module
    return module.active_isa() if module else None


def commit() -> str | None:
    """The git commit; with "+" where tracked files differ from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], **_TEXT)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], **_TEXT)
    except OSError:
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "") or None


_TEXT: dict = {"capture_output": True, "text": True}


class Others:
    """The share of the machine's time that other processes took, from creation to `share()`."""

    def __init__(self) -> None:
        self.start = self._now()

    def share(self) -> float | None:
        """0 to 1; None where /proc does not tell."""
        now = self._now()
        if now is None or self.start is None:
            return None
        total, busy, own = (b - a for a, b in zip(self.start, now, strict=True))
        return max(0.0, (busy - own) / total) if total > 0 else 0.0

    @classmethod
    def wait(cls, share: float, seconds: float) -> float:
        """Sleep until a second goes by in which they take at most `share`; seconds waited."""
        begin = time.monotonic()
        while seconds > 0:
            others = cls()
            time.sleep(min(1.0, seconds))
            waited = time.monotonic() - begin
            if (others.share() or 0.0) <= share or waited >= seconds:
                return waited
        return 0.0

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, idle, wait, irq, soft, steal = (float(f) for f in fields)
        busy = user + nice + system + irq + soft + steal
        times = os.times()
        ticks = os.sysconf("SC_CLK_TCK")
        return busy + idle + wait, busy, (times.user + times.system) * ticks


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    for line in text.splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _chosen(path: str) -> str | None:
    try:
        text = Path(path).read_text()
    except OSError:
        return None
    return text.partition("[")[2].partition("]")[0] or None
