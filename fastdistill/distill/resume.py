"""Start a job, or continue the one in the directory: never a mixture of two."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch

from fastdistill.distill import environment
from fastdistill.distill.checks import Settings
from fastdistill.distill.directory import Directory, differences
from fastdistill.distill.errors import JobError
from fastdistill.distill.listener import Listener

Config = TypeVar("Config", bound=Settings)


def as_before(config: Config, explicit: Collection[str], earlier: dict[str, Any]) -> Config:
    """The earlier run's settings.

    Args:
        config: the settings now, device and backend resolved.
        explicit: names of those that the user gave: they must agree with the earlier run's. But
            `data` may have moved; `begin` compares its content.
        earlier: the manifest.

    Raises:
        JobError: names every setting that differs.
    """
    now = config.settings()
    given = {key: now[key] for key in now if key in explicit and key != "data"}
    _refuse(config.out, differences(earlier["settings"], given))
    kept = dict(earlier["settings"])
    if "data" in explicit:
        del kept["data"]
    return cast(Config, replace(cast(Any, config), **kept))


def settle(
    directory: Directory,
    config: Config,
    explicit: Collection[str],
    resolve: Callable[[Config], Config],
    listener: Listener,
) -> tuple[Config, dict[str, Any] | None]:
    """(the settings to run with, the manifest of the run to continue or None).

    Args:
        directory: locked.
        config: the settings as given.
        explicit: names of those that the user gave; see `as_before`.
        resolve: makes "auto" among them definite.
        listener: is told where there is nothing to continue.

    Raises:
        JobError: see `as_before`.
    """
    wanted = cast(Any, config).resume
    earlier = directory.read() if wanted else None
    if wanted and earlier is None:
        listener.say(f"Nothing to resume in {config.out}: starting from the beginning.")
    config = resolve(config)
    if earlier is not None:
        config = resolve(as_before(config, explicit, earlier))
    return config, earlier


def begin(
    directory: Directory,
    config: Settings,
    sha256: str,
    earlier: dict[str, Any] | None,
    files: Iterable[str],
    listener: Listener,
    weights: Mapping[str, str] | None = None,
) -> str:
    """Check that the data are the earlier run's, or start a new job; the job's id.

    Args:
        directory: locked.
        config: all settings.
        sha256: of the data.
        earlier: the manifest of the run to continue, None for a new job.
        files: names of the checkpoints that the job will write.
        listener: is told which of the two it is.
        weights: sha256 of each file of weights that the job starts from, by setting.

    Raises:
        JobError: other data than before, or files in the way that no job wrote.
    """
    versions = environment.versions()
    if earlier is None:
        if directory.manifest.exists():
            listener.say(f"Starting over: replacing the earlier run in {config.out}.")
        facts = {
            "settings": config.settings(),
            "data_sha256": sha256,
            "threads": torch.get_num_threads(),
            "weights_sha256": dict(weights or {}),
            "versions": versions,
        }
        return directory.start(files, facts)
    if earlier["data_sha256"] != sha256:
        was, now = earlier["settings"]["data"], config.data
        changed = f"{was} in the earlier run, now {now}" if was != now else f"{now} has changed"
        _refuse(config.out, [f"data: {changed}"])
    for name, found in (weights or {}).items():
        if earlier.get("weights_sha256", {}).get(name) != found:
            _refuse(config.out, [f"{name}: the file has changed"])
    for package, version in versions.items():
        was = earlier["versions"].get(package)
        if was != version:
            listener.say(f"Note: the run began with {package} {was}; this is {version}.")
    listener.say(f"Continuing the run in {config.out}.")
    return str(earlier["run"])


def _refuse(out: str, changes: list[str]) -> None:
    if changes:
        raise JobError(
            f"The run in {out} cannot be resumed with other settings.",
            "\n".join(changes) + ".",
            "Leave these settings out to continue it, or leave out --resume to start over.",
        )
