"""The one ordered list of backends, and the choice among them.

Every op registers, per backend, a function that says why it cannot run a call, or None when it
can. `choose` asks in the order of `ORDER`. "auto" takes the first that can; an explicit request
that cannot run raises, with every reason. A fallback is chosen here, never caught around a kernel.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Mapping
from types import ModuleType, TracebackType
from typing import NamedTuple

ORDER = ("triton", "cuda", "cpu", "reference")
"""All public backends, the one that auto prefers first."""

ENVIRONMENT_VARIABLE = "FASTDISTILL_BACKEND"


class Case(NamedTuple):
    """What a backend needs to know of a call to say whether it can run it."""

    device: str  # "cpu", "cuda", ...
    dtypes: tuple[object, ...]  # the element types of the op's inputs, in the op's own order
    transforms: bool  # a functorch transform or forward-mode AD is active
    row_temperature: bool = False  # the temperature is a tensor, one for each row


Refusal = Callable[[Case], "str | None"]

_ops: dict[str, dict[str, Refusal]] = {}
_chosen: dict[tuple[str, str, Case], str] = {}
_local = threading.local()
_from_environment: str | None = None


def register(op: str, refusals: Mapping[str, Refusal]) -> None:
    """Make `op` known, with one refusal function per backend that implements it."""
    _ops[op] = dict(refusals)
    _chosen.clear()


def ops() -> Mapping[str, Mapping[str, Refusal]]:
    """Every registered op with its backends (for `fastdistill doctor` and the tests)."""
    return _ops


def _check_name(name: object, source: str) -> str:
    known = ("auto", *ORDER)
    if isinstance(name, str) and (name in known or any(name in table for table in _ops.values())):
        return name
    raise ValueError(f"{source}: expected one of {', '.join(known)}; got {name!r}")


def requested() -> str:
    """The backend asked for in this thread: the innermost `backend(...)`, or the environment."""
    global _from_environment
    name: str | None = getattr(_local, "name", None)
    if name is not None:
        return name
    if _from_environment is None:  # read at first use, not at import
        _from_environment = _check_name(
            os.environ.get(ENVIRONMENT_VARIABLE, "").strip() or "auto", ENVIRONMENT_VARIABLE
        )
    return _from_environment


class backend:  # noqa: N801 - used as a function: `with fastdistill.backend("cpu"):`
    """Ask for one backend in a `with` block, in this thread.

    Args:
        name: "reference", "cpu", "triton", "cuda", or "auto" (the default outside any block).

    An explicit backend that cannot run a call makes that call raise a RuntimeError that lists the
    reason; only "auto" may choose another one. Blocks nest.

    Raises:
        ValueError: the name is not known.
    """

    def __init__(self, name: str) -> None:
        self.name = _check_name(name, "backend")
        self._outer: list[str | None] = []  # a stack, so that one object may be entered twice

    def __enter__(self) -> backend:
        self._outer.append(getattr(_local, "name", None))
        _local.name = self.name
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _local.name = self._outer.pop()


def reasons(op: str, case: Case) -> dict[str, str | None]:
    """For each backend of `op`, in order: why it cannot run this case, or None."""
    table = _ops[op]
    names = [*ORDER, *(name for name in table if name not in ORDER)]
    return {
        name: table[name](case) if name in table else f"{op} has no {name} implementation"
        for name in names
    }


def choose(op: str, case: Case) -> str:
    """The backend that runs this call.

    Raises:
        RuntimeError: the requested backend cannot, or none can; the message gives each reason.
    """
    name = requested()
    key = (op, name, case)
    found = _chosen.get(key)
    if found is None:
        found = _choose(op, name, case)
        _chosen[key] = found
    return found


def _choose(op: str, name: str, case: Case) -> str:
    why = reasons(op, case)
    if name == "auto":
        for candidate in ORDER:
            if why[candidate] is None:
                return candidate
    elif why.get(name, "") is None:
        return name
    listed = why if name == "auto" else {name: why.get(name)}
    others = [n for n, reason in why.items() if reason is None and n in ORDER]
    lines = [
        f"{op}: backend {name!r} cannot run on device {case.device!r} with dtypes "
        f"({', '.join(str(d) for d in case.dtypes)})"
        + (" under a functorch transform or forward-mode AD" if case.transforms else "")
    ]
    lines += [f"  {n}: {reason}" for n, reason in listed.items()]
    if others:
        lines.append(f"  these can: {', '.join(others)} (for example backend({others[-1]!r}))")
    raise RuntimeError("\n".join(lines))


class Launchers:
    """backend -> the module whose functions of the ops' names launch its kernels.

    Called with a backend it gives the module, imported at first use.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = dict(names)
        self.modules: dict[str, ModuleType] = {}

    def __call__(self, backend: object) -> ModuleType:
        name = str(backend)
        module = self.modules.get(name)
        if module is None:
            module = self.modules[name] = importlib.import_module(self.names[name])
        return module
