"""Why a backend cannot run a call, in words: what every room says in the same way.

Each function takes the `_backend.Case` and gives the reason, or None.
"""

from __future__ import annotations

from importlib.util import find_spec

from fastdistill import _native
from fastdistill._backend import Case

# Found without being imported, and now: torch.compile can trace neither.
_TRITON_MISSING = None if find_spec("triton") else "the package triton is not installed"


def transforms(case: Case) -> str | None:
    """Fused kernels under a functorch transform or forward-mode AD."""
    if case.transforms:
        return (
            "the fused kernels have one derivative, in reverse mode; functorch transforms and "
            'forward-mode AD run on backend("reference")'
        )
    return None


def cpu(case: Case) -> str | None:
    """The C++ kernels."""
    if case.device != "cpu":
        return f"it runs on tensors on the CPU, not on {case.device}"
    return _native.cpu().reason or transforms(case)


def triton(case: Case) -> str | None:
    """The Triton kernels."""
    if case.device != "cuda":
        return f"it runs on tensors on an NVIDIA or AMD GPU, not on {case.device}"
    return _TRITON_MISSING or transforms(case)


def cuda(case: Case, dtypes: str | None) -> str | None:
    """The CUDA C++ kernels; `dtypes` says what is wrong with the element types, if anything."""
    if case.device != "cuda":
        return f"it runs on tensors on an NVIDIA GPU, not on {case.device}"
    return dtypes or _native.cuda().reason or transforms(case)


def nothing(case: Case) -> str | None:
    """The reference runs everywhere."""
    return None
