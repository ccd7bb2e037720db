"""The package with one change, made by program in its source: what a check that proves anything
has to notice. A test lists its mutations; a mutation whose place is gone fails, and is not caught.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple


class Files(NamedTuple):
    """Files of one package that are made anew, each after those of them that it imports."""

    package: ModuleType
    names: Sequence[str]

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return Path(str(self.package.__file__)).parent


class Mutation(NamedTuple):
    """One change, and the check that has to notice it."""

    file: str
    old: str
    new: str
    check: str


UNCHANGED = Mutation("", "", "", "")


@contextmanager
def made(files: Files, mutation: Mutation = UNCHANGED) -> Iterator[dict[str, ModuleType]]:
    """Name -> module. They import one another, and everything else from the package as it is."""
    package, prefix = files.package.__name__, "mutated_" + files.package.__name__.replace(".", "_")
    any_name = "|".join(files.names)
    modules = {name: ModuleType(f"{prefix}_{name}") for name in files.names}
    try:
        for name, module in modules.items():
            text = (files.folder / f"{name}.py").read_text()
            if name == mutation.file:
                assert mutation.old in text, f"{name}.py has no {mutation.old!r}: it is out of date"
                text = text.replace(mutation.old, mutation.new)
            alone = rf"^from {package} import ({any_name})$"
            text = re.sub(alone, rf"import {prefix}_\1 as \1", text, flags=re.MULTILINE)
            text = re.sub(rf"\b{package}\.({any_name})\b", rf"{prefix}_\1", text)
            real = re.search(rf"from {package} import .*\b({any_name})\b", text)
            assert real is None, f"{name}.py would import a part that is not made anew: {real}"
            sys.modules[module.__name__] = module
            exec(compile(text, f"{name}.py", "exec"), module.__dict__)
        yield modules
    finally:
        for module in modules.values():
            sys.modules.pop(module.__name__, None)
