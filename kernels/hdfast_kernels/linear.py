"""A linear layer: y = x W^T + b. The matrix products are a library's; which one, is for the backend to know."""

import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .linear_native import linear_native
from .numerics import check_shape


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """x W^T + b over the last axis.

    Args:
        x: (..., K) float32 or bfloat16.
        weight: (N, K), bias: (N,) or None, of x's dtype.
        backend: "reference" or "native"; None lets `dispatch` choose.

    Returns (..., N) in x's dtype. Differentiable in all three, once.

    Raises ValueError on shapes that do not fit; `dispatch.BackendError` if the backend cannot run here.
    """
    check_shape("linear", "weight", weight, (*weight.shape[:1], *x.shape[-1:]))
    if bias is not None:
        check_shape("linear", "bias", bias, weight.shape[:1])
    return dispatch.resolve("linear", backend, x)(x, weight, bias)


dispatch.register("linear", reference=F.linear, native=linear_native)
