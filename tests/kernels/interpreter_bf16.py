"""Mends bfloat16 in Triton's interpreter, which truncates instead of rounding and multiplies raw bits in tl.dot.

Works on Triton 3.6 to 3.9, checked by test_triton_interpreter.py.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def to_bits(x: np.ndarray) -> np.ndarray:
    """float32 -> the uint16 bits of bfloat16, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(bits.view(np.float32)), np.uint16(0x7FC0), rounded)


def from_bits(bits: np.ndarray) -> np.ndarray:
    """The uint16 bits of bfloat16 -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def patch() -> None:
    """Make this process's interpreter round and multiply bfloat16 as a GPU does; a second call does nothing."""
    if getattr(interpreter, "_hdfast_bf16", False):
        return
    interpreter._hdfast_bf16 = True
    builder, convert = interpreter.InterpreterBuilder, interpreter._convert_float
    dot = builder.create_dot

    def convert_float(values, source, target, rounding):
        if source == tl.float32 and target == tl.bfloat16:
            return to_bits(values.view(np.float32)).reshape(values.shape)
        if source == tl.bfloat16 and target == tl.float32:
            return from_bits(values.view(np.uint16)).view(np.uint32).reshape(values.shape)
        return convert(values, source, target, rounding)

    def wide(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(from_bits(handle.data), tl.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, wide(a), wide(b), *rest)

    interpreter._convert_float = convert_float
    builder.create_dot = create_dot
