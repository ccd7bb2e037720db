"""A file of JSON lines that only grows, each line on the disk before `append` returns."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has none; two processes with one journal are then not noticed
    fcntl = None  # type: ignore[assignment]


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Keep other processes out while the block runs; the system unlocks it after a kill.

    Args:
        path: of the lock file, which stays.
    """
    with open(path, "a") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Journal:
    """Records in the order in which they were appended.

    A kill or a power cut while a line is written leaves a tail without its newline: whoever
    appended it had not been told that it was there, so the next `append` cuts it off. Any other
    damage is refused, as a debit may be missing.

    Args:
        path: the file; it need not exist. Its folder must.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def read(self) -> list[dict[str, Any]]:
        """All whole lines.

        Raises:
            ValueError: a line is not a JSON object.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        return [self._parse(i, line) for i, line in enumerate(data.split(b"\n")[:-1])]

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"it holds {type(record).__name__}")
        except ValueError as error:
            raise ValueError(
                f"{self.path}: line {number + 1} is damaged ({error}): expected a JSON object; "
                "what it debited is not known, so nothing more can be released with this journal"
            ) from None
        return record

    def locked(self) -> AbstractContextManager[None]:
        """Keep other processes from appending between a `read` and an `append`."""
        return exclusive(self.path.with_name(f".{self.path.name}.lock"))

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line and return when the disk has it. Call it under `locked`."""
        line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            data = self.path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole != len(data):
                os.ftruncate(descriptor, whole)
            os.lseek(descriptor, whole, os.SEEK_SET)
            while line:
                line = line[os.write(descriptor, line) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if hasattr(os, "O_DIRECTORY"):  # the name of a new file
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
