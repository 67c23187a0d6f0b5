"""A linear layer: y = x W^T + b. A library does the matrix products; the backend decides which."""

import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .linear_fused import linear_fused
from .linear_native import linear_native
from .numerics import check_axes, check_device, check_shape, check_tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """x W^T + b over the last axis.

    Args:
        x: (..., K) float32 or bfloat16.
        weight: (N, K), bias: (N,) or None; rounded to x's dtype, which costs a copy where theirs is another.
        backend: "reference", "fused" or "native"; None lets `dispatch` choose.

    Returns (..., N) in x's dtype; fused may return a view of longer rows. Differentiable in all three, once.

    Raises ValueError on shapes or devices that do not fit, TypeError if the dtypes differ and x's is an integer
    one; `dispatch.BackendError` if the backend cannot run here.
    """
    check_axes("linear", "x", x, "...", "K")
    check_tensor("linear", "weight", weight)
    check_shape("linear", "weight", weight, (*weight.shape[:1], *x.shape[-1:]))
    if bias is not None:
        check_shape("linear", "bias", bias, weight.shape[:1])
    check_device("linear", x=x, weight=weight, bias=bias)
    if x.dtype != weight.dtype or (bias is not None and x.dtype != bias.dtype):
        if not x.is_floating_point():
            raise TypeError(
                f"linear: x has dtype {x.dtype}, expected a float one, as weight's {weight.dtype}"
            )
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return dispatch.resolve("linear", backend, x)(x, weight, bias)


dispatch.register("linear", reference=F.linear, fused=linear_fused, native=linear_native)
