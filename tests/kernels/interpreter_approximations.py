"""Gives Triton's interpreter the errors of a GPU's fast arithmetic, which numpy rounds correctly.

A kernel's exp is `ex2.approx` of a rounded product, exp2 the same without the product, `/` is `div.full`, and sqrt
and rsqrt are approximations too: each errs by up to the bound in the PTX manual. Here each errs by a share of that
bound that depends on the bits of the result, so that the same computation gives the same result. Operations with
correct rounding (tl.div_rn, tl.sqrt_rn) keep it.
"""

import numpy as np
from triton.runtime import interpreter

LOG2_E = np.float32(1.4426950408889634)


def patch() -> None:
    """Make this process's interpreter err as a GPU may; a second call does nothing."""
    if getattr(interpreter, "_hdfast_approximations", False):
        return
    interpreter._hdfast_approximations = True
    builder = interpreter.InterpreterBuilder
    builder.create_exp = lambda self, x: self.unary_op(x, exp)
    builder.create_exp2 = lambda self, x: self.unary_op(x, lambda x: off_by(np.exp2(x), 2**-22.5))
    builder.create_log = lambda self, x: self.unary_op(x, lambda x: off_by_units(np.log(x), 1))
    builder.create_sqrt = lambda self, x: self.unary_op(x, lambda x: off_by(np.sqrt(x), 2**-23))
    builder.create_rsqrt = lambda self, x: self.unary_op(x, rsqrt)
    builder.create_fdiv = lambda self, x, y: self.binary_op(x, y, lambda x, y: off_by_units(x / y, 2))


def exp(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x)
    power = np.exp2((x * LOG2_E).astype(np.float64)).astype(x.dtype)
    return np.where(x == 0, power, off_by(power, 2**-22.5))  # exp(0) is exactly one


def rsqrt(x: np.ndarray) -> np.ndarray:
    return off_by((1 / np.sqrt(x.astype(np.float64))).astype(x.dtype), 2**-22.9)


def off_by(x: np.ndarray, share: float) -> np.ndarray:
    """float32 x with a relative error of at most `share`."""
    return (x * (1 + share * _noise(x))).astype(x.dtype)


def off_by_units(x: np.ndarray, units: float) -> np.ndarray:
    """float32 x with an error of at most `units` in the last place; zero, infinity and NaN stay."""
    size = np.where(np.isfinite(x) & (x != 0), np.spacing(np.abs(x)), 0.0)
    return (x + units * _noise(x) * size.astype(np.float64)).astype(x.dtype)


def _noise(x: np.ndarray) -> np.ndarray:
    """Float64 numbers in [-1, 1), a function of the bits of float32 x."""
    assert x.dtype == np.float32, x.dtype
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64) * 2654435761 % 2**32
    return bits.astype(np.float64).reshape(x.shape) / 2**31 - 1
