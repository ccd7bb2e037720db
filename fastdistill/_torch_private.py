"""The few private names of torch that the package relies on, in one place (tests/test_private.py).

Each has a safe answer where torch does not offer the name.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_transform_active = getattr(torch._C, "_are_functorch_transforms_active", None)
_level = getattr(torch._C._functorch, "maybe_current_level", None)  # torch.compile can trace it
_keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", None)
_dispatch_mode = getattr(torch._C, "_get_dispatch_mode", None)
_mode_keys: Any = getattr(torch._C, "_TorchDispatchModeKey", None)
_fake: Any = getattr(torch._subclasses, "FakeTensor", None)


def transforms_active() -> bool:
    """A functorch transform (grad, vmap, jvp, hessian, ...) or forward-mode AD is active."""
    if torch.compiler.is_compiling():
        return _level is not None and _level() is not None
    if _transform_active is not None and _transform_active():
        return True
    return getattr(forward_ad, "_current_level", -1) >= 0


def has_values(x: Tensor) -> bool:
    """The values of this tensor may be looked at, and that costs no synchronisation.

    Not on a GPU, not under torch.compile, make_fx or a functorch transform, and there are none in
    the fake tensors that shapes and memory are worked out with.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or transforms_active():
        return False
    traced = _dispatch_mode is not None and _dispatch_mode(_mode_keys.PROXY) is not None
    return not traced and not (_fake is not None and isinstance(x, _fake))


def may_overwrite(grad_output: Tensor) -> bool:
    """The backward pass that is running may write into its saved tensors.

    Not if it may run again, and not with a batch of `grad_output` at once (under vmap, or for
    `is_grads_batched`, as in a vectorised jacobian): that is the same as again.
    """
    if torch.compiler.is_compiling() or transforms_active():
        return False
    if _batched is None or _batched(grad_output):
        return False
    return _keep_graph is not None and not _keep_graph()


@cache
def gemm_bf16bf16f32() -> Any:
    """oneMKL's public `cblas_gemm_bf16bf16f32` of the copy that torch is linked with, or None.

    torch itself rounds the product of two bfloat16 matrices on the CPU to bfloat16.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not torch.backends.mkl.is_available() or not library.exists():
        return None
    function = getattr(ctypes.CDLL(str(library)), "cblas_gemm_bf16bf16f32", None)
    if function is not None:
        integer, real, matrix = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
        function.restype = None
        function.argtypes = [integer] * 6 + [real, matrix, integer, matrix, integer, real]
        function.argtypes += [matrix, integer]
    return function
