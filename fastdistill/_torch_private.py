"""The few private names of torch that the package relies on, in one place (tests/test_private.py).

Each has a safe answer where torch does not offer the name.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

_transform_active = getattr(torch._C, "_are_functorch_transforms_active", None)
_level = getattr(torch._C._functorch, "maybe_current_level", None)  # torch.compile can trace it
_keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)


def transforms_active() -> bool:
    """A functorch transform (grad, vmap, jvp, hessian, ...) or forward-mode AD is active."""
    if torch.compiler.is_compiling():
        return _level is not None and _level() is not None
    if _transform_active is not None and _transform_active():
        return True
    return getattr(forward_ad, "_current_level", -1) >= 0


def graph_is_kept() -> bool:
    """The backward pass that is running may run again: its saved tensors must stay as they are."""
    return True if _keep_graph is None else bool(_keep_graph())
