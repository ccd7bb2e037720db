"""Makes Triton's interpreter honest where it is silently wrong (Triton 3.7).

- bfloat16 is held as raw uint16. Casts to it truncate, where the hardware rounds to nearest even,
  and arithmetic on it is done on the raw bits: here casts round, and arithmetic raises.
- `tl.maximum` and `tl.minimum` propagate NaN there; on a GPU they drop it unless told otherwise.
- `tl.dot` multiplies bfloat16's raw bits: here it widens its operands.
- An access outside every tensor of the launch is silent there, and so is a false promise of
  alignment (`tl.multiple_of`): both raise. Tensors whose addresses are in a table that the launch
  is given (fastdistill.privacy.gpu.on_device) are of the launch.
- Each call of one jit function by another patches all of triton.language again, though the launch
  has done so: 3/4 of the time of a kernel made of functions.

`install()` patches the interpreter of this process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from fastdistill.privacy import gpu


def widen(raw: np.ndarray) -> np.ndarray:
    """float32 of raw bfloat16."""
    return (raw.astype(np.uint32) << 16).view(np.float32)


def narrow(x: np.ndarray) -> np.ndarray:
    """Raw bfloat16 of float32, rounded to nearest even; NaN becomes the quiet one."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded.astype(np.uint16))


def _is_bfloat16(*handles: Any) -> bool:
    return any(h.dtype.scalar == tl.bfloat16 for h in handles)


_original = {name: getattr(InterpreterBuilder, name) for name in ("cast_impl", "create_fp_to_fp")}
_original |= {name: getattr(InterpreterBuilder, name) for name in ("binary_op", "unary_op")}
_accesses = ("create_masked_load", "create_masked_store")
_original |= {name: getattr(InterpreterBuilder, name) for name in _accesses}
_original_run = interpreter.InterpretedFunction.run


def _cast(self: Any, source: Any, target: Any) -> Any:
    kind = target.scalar
    if source.dtype.scalar == tl.bfloat16 and kind.is_floating() and kind != tl.bfloat16:
        return TensorHandle(widen(source.data).astype(interpreter._get_np_dtype(kind)), kind)
    if kind == tl.bfloat16 and source.dtype.scalar != tl.bfloat16:
        return TensorHandle(narrow(source.data.astype(np.float32)), kind)
    return _original["cast_impl"](self, source, target)


def _float_to_float(self: Any, source: Any, target: Any, rounding: Any) -> Any:
    if tl.bfloat16 in (source.dtype.scalar, target.scalar):
        return _cast(self, source, target)
    return _original["create_fp_to_fp"](self, source, target, rounding)


def _binary(self: Any, left: Any, right: Any, op: Any) -> Any:
    if _is_bfloat16(left, right):
        raise TypeError("bfloat16 arithmetic: the interpreter would do it on raw bits")
    return _original["binary_op"](self, left, right, op)


def _unary(self: Any, argument: Any, op: Any) -> Any:
    if _is_bfloat16(argument):
        raise TypeError("bfloat16 arithmetic: the interpreter would do it on raw bits")
    return _original["unary_op"](self, argument, op)


def _dot(self: Any, a: Any, b: Any, total: Any, precision: Any, most: Any) -> Any:
    x, y = (
        widen(m.data) if _is_bfloat16(m) else m.data.astype(np.result_type(m.data, np.float32))
        for m in (a, b)
    )
    return TensorHandle(np.matmul(x, y) + total.data, total.dtype.scalar)


_ranges: list[tuple[int, int]] = []
"""First address and end of each tensor of the launch."""


def _run(self: Any, *args: Any, **kwargs: Any) -> Any:
    tensors = [x for x in (*args, *kwargs.values()) if hasattr(x, "data_ptr") and x.numel()]
    tensors += [x for table in tensors for x in getattr(table, "addressed", ())]
    _ranges[:] = []
    for x in tensors:
        last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
        _ranges.append((x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()))
    return _original_run(self, *args, **kwargs)


def _in_ranges(at: np.ndarray, ranges: list[tuple[int, int]]) -> np.ndarray:
    good = np.zeros(at.shape, bool)
    for begin, end in ranges:
        good |= (at >= begin) & (at < end)
    return good


def _inside(pointers: Any, mask: Any) -> None:
    at = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)].astype(
        np.int64
    )
    good = _in_ranges(at, _ranges)
    if not good.all():
        raise IndexError(f"out of bounds: {int((~good).sum())} elements outside every tensor")


def _masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
    _inside(pointers, mask)
    return _original["create_masked_load"](self, pointers, mask, *rest)


def _masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
    _inside(pointers, mask)
    return _original["create_masked_store"](self, pointers, value, mask, *rest)


def _promise(self: Any, key: str, value: Any) -> None:
    """A hint on pointers into a tensor has to hold at the start of each run of neighbours.

    Rows after the last one point beyond it, perhaps into the tensor that the allocator put there,
    and nothing is read there: what counts is the tensor of the first pointer.
    """
    if key == "tt.divisibility" and isinstance(self.dtype.scalar, tl.pointer_type):
        at = np.atleast_1d(self.data).astype(np.int64)
        width = self.dtype.scalar.element_ty.primitive_bitwidth // 8
        begins = np.concatenate(
            [np.ones_like(at[..., :1], bool), np.diff(at, axis=-1) != width], axis=-1
        )
        own = [(begin, end) for begin, end in _ranges if begin <= at.flat[0] < end]
        begins &= _in_ranges(at, own)
        divisor = int(np.atleast_1d(value)[-1])
        if (at[begins] % divisor).any():
            raise ValueError(f"false alignment: pointers that are no multiples of {divisor}")
    self.attr[key] = value


_on_device = gpu.on_device


def _remembered(table: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    table = _on_device(table, tensors)
    table.addressed = tensors  # type: ignore[attr-defined]
    return table


_patched_modules: set[int] = set()


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    module = id(self.fn.__globals__)
    if module not in _patched_modules:  # those of triton.language itself, which a launch leaves out
        _patched_modules.add(module)
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


def install() -> None:
    """Patch the interpreter."""
    interpreter.InterpretedFunction.__call__ = _call
    interpreter.InterpretedFunction.run = _run
    gpu.on_device = _remembered
    InterpreterBuilder.create_masked_load = _masked_load
    InterpreterBuilder.create_masked_store = _masked_store
    TensorHandle.set_attr = _promise
    InterpreterBuilder.cast_impl = _cast
    InterpreterBuilder.create_fp_to_fp = _float_to_float
    InterpreterBuilder.binary_op = _binary
    InterpreterBuilder.unary_op = _unary
    InterpreterBuilder.create_dot = _dot
    InterpreterBuilder.create_maxnumf = lambda self, a, b: _binary(self, a, b, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, a, b: _binary(self, a, b, np.fmin)
