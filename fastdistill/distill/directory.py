"""The output directory: which job it holds, who may write into it, what is whose."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastdistill.distill import store
from fastdistill.distill.errors import JobError

try:
    import fcntl
except ImportError:  # Windows has none; two jobs in one directory are then not noticed
    fcntl = None  # type: ignore[assignment]

MANIFEST = "job.json"
FORMAT = 1
OUTPUTS = (
    "results.json",
    "students.csv",
    "curves.csv",
    "curves.png",
    "agreement.png",
    "disagreement.png",
    "report.html",
)
"""Those of `fastdistill distill`."""


class Directory:
    """One output directory.

    Args:
        path: where it is.
        outputs: every file that the job writes beside its checkpoints and its manifest.
        job: the command, so that no job takes another one's run for its own.

    `job.json` names the job (a random id) and its settings. Checkpoints carry the id, so those of
    an earlier job are never mistaken for this one's, at whatever moment a kill comes.
    """

    def __init__(self, path: str, outputs: tuple[str, ...] = OUTPUTS, job: str = "distill") -> None:
        self.outputs = outputs
        self.job = job
        self.path = Path(path).expanduser()
        self.checkpoints = self.path / "checkpoints"
        self.manifest = self.path / MANIFEST

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the directory and keep other jobs out of it; the system unlocks it after a kill.

        Raises:
            JobError: it cannot be created, or another job is at work in it.
        """
        title = f"The output directory {self.path} cannot be used."
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            lock = open(self.checkpoints / ".lock", "a")  # noqa: SIM115 - closed below
        except OSError as error:
            raise JobError(title, f"{error}.", "Choose another one with --out.") from None
        with lock:
            if fcntl is not None:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise JobError(
                        title,
                        f"Another fastdistill {self.job} is at work in it.",
                        "Wait for it, or choose another one with --out.",
                    ) from None
            yield

    def read(self) -> dict[str, Any] | None:
        """The manifest of the job in this directory, None if there is none.

        Raises:
            JobError: it is damaged or of another format.
        """
        try:
            manifest = json.loads(self.manifest.read_text(encoding="utf-8"))
            if manifest["format"] != FORMAT or not isinstance(manifest["settings"], dict):
                raise ValueError(f"format {manifest['format']}, expected {FORMAT}")
            job = manifest.get("job", "distill")
            if job != self.job:
                raise ValueError(f"it is of fastdistill {job}, not of fastdistill {self.job}")
            return dict(manifest)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise JobError(
                f"{self.manifest} is not the record of a fastdistill job.",
                f"{type(error).__name__}: {error}.",
                "Move it away, or choose another directory with --out.",
            ) from None

    def start(self, checkpoints: Iterable[str], facts: Mapping[str, Any]) -> str:
        """Begin a new job: remove what an earlier one left, write the manifest, return the id.

        Files that no job wrote stay where they are.

        Args:
            checkpoints: names of the files that the job will write into `checkpoints/`.
            facts: what the manifest records beside format and id.

        Raises:
            JobError: there is no earlier job, but there are files of the same names.
        """
        ours = [self.path / name for name in self.outputs]
        trained = [self.checkpoints / name for name in checkpoints]
        if self.read() is None:
            foreign = [path.name for path in (*ours, *trained) if path.exists()]
            if foreign:
                raise JobError(
                    f"The output directory {self.path} cannot be used.",
                    f"It holds {', '.join(foreign)}, but no {MANIFEST}: no job wrote them.",
                    "Move them away, or choose another directory with --out.",
                )
        # Results first, then the manifest, then checkpoints: a kill in between leaves either the
        # earlier job, still complete, or the new one with checkpoints that it does not recognise.
        for path in ours:
            path.unlink(missing_ok=True)
        run = uuid.uuid4().hex
        store.write_json(self.manifest, {"format": FORMAT, "job": self.job, "run": run, **facts})
        for path in self.checkpoints.glob("*.safetensors"):
            if path in trained or _written_by_us(path):
                path.unlink()
        self.sweep()
        return run

    def sweep(self) -> None:
        """Remove the temporary files that a kill left."""
        for folder in (self.path, self.checkpoints):
            for path in folder.glob(f".*{store.TEMPORARY}"):
                path.unlink(missing_ok=True)


def _written_by_us(path: Path) -> bool:
    try:
        return "run" in store.load(path)[1]
    except JobError:
        return False


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each setting in `now` that the earlier job had otherwise."""
    return [
        f"{key}: {_show(earlier.get(key))} in the earlier run, now {_show(value)}"
        for key, value in now.items()
        if earlier.get(key) != value
    ]


def _show(value: object) -> str:
    return "the default" if value is None else str(value)
