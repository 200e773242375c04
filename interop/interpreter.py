"""Triton's interpreter with bfloat16 arithmetic that a GPU would recognise.

The interpreter of Triton 3.8 keeps bfloat16 as uint16, and then multiplies those integers in tl.dot, sends them through
float16 in tl.dot_scaled, and truncates instead of rounding when it converts from float32.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def widen(data: np.ndarray) -> np.ndarray:
    """uint16 bits of bfloat16 -> float32."""
    return (data.astype(np.uint32) << 16).view(np.float32)


def narrow(data: np.ndarray) -> np.ndarray:
    """float32 -> uint16 bits of the nearest bfloat16, ties to even, NaN kept."""
    rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
    return rounded.view(torch.uint16).numpy().reshape(data.shape)


def as_float32(handle: Any) -> Any:
    """A float32 handle of the same values if the handle holds bfloat16, else the handle."""
    if handle.dtype.scalar == tl.bfloat16:
        return interpreter.TensorHandle(widen(handle.data), tl.float32)
    return handle


@contextlib.contextmanager
def bfloat16_arithmetic() -> Iterator[None]:
    """While it is open, interpreted kernels convert and multiply bfloat16 as hardware does."""
    builder: Any = interpreter.interpreter_builder
    dot, cast, to_float = builder.create_dot, builder.cast_impl, interpreter._mxfp_value_handle_to_float32

    def create_dot(a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        return dot(as_float32(a), as_float32(b), d, input_precision, max_num_imprecise_acc)

    def cast_impl(src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target == tl.float32:
            return interpreter.TensorHandle(widen(src.data), tl.float32)
        if source == tl.float32 and target == tl.bfloat16:
            return interpreter.TensorHandle(narrow(src.data), tl.bfloat16)
        return cast(src, dst_type)

    def value_to_float32(handle: Any) -> np.ndarray:
        return widen(handle.data) if handle.dtype.scalar == tl.bfloat16 else to_float(handle)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    interpreter._mxfp_value_handle_to_float32 = value_to_float32
    try:
        with np.errstate(all="ignore"):  # infinities and NaN are results here, as on a GPU
            yield
    finally:
        del builder.create_dot, builder.cast_impl
        interpreter._mxfp_value_handle_to_float32 = to_float
