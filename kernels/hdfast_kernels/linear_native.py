"""linear and matrix products on the CPU: float32 goes to oneDNN where PyTorch's own choice, MKL, is slow.

MKL keeps its AVX-512 code for Intel's processors: on others it reaches half of what oneDNN does. oneDNN in turn copies
transposed operands, as both are in a weight's gradient: that product is ours (csrc/ops/linear_weight_grad.cpp).
bfloat16 products are oneDNN's anyway.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .autograd import once_differentiable

# The fewest multiplications for which oneDNN, whose call takes 10 microseconds longer, is faster.
ENOUGH = 1 << 20


@functools.cache
def mkl_is_slow() -> bool:
    """Whether float32 products are faster here without PyTorch's choice of library."""
    backends = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return backends and hasattr(torch.ops.mkldnn, "_linear_pointwise") and not native.module().is_intel()


def _leave_mkl(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and rows * inputs * outputs >= ENOUGH and mkl_is_slow()


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of matrices (M, K) and (K, N) of one dtype, without a gradient. `a` is best contiguous, `b` need not be."""
    return _onednn(a, b.mT) if _leave_mkl(a.shape[0], a.shape[1], b.shape[1], a.dtype) else a @ b


def weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """gradᵀ @ x of matrices (K, M) and (K, N) of one dtype, without a gradient."""
    (depth, rows), columns = grad.shape, x.shape[1]
    if not _leave_mkl(rows, depth, columns, x.dtype):
        return grad.mT @ x
    grad, x, out = grad.contiguous(), x.contiguous(), native.empty(rows, columns)
    native.module().linear_weight_grad(
        native.ptr(grad), native.ptr(x), native.ptr(out), depth, rows, columns, native.threads()
    )
    return out


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    bias = None if bias is None else bias.contiguous()  # oneDNN does not look at its strides
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable("linear")
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad, grad_x, grad_weight, grad_bias = grad.flatten(0, -2), None, None, None
        if ctx.needs_input_grad[0]:
            grad_x = product(grad, weight).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = weight_grad(grad, x.flatten(0, -2))
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_x, grad_weight, grad_bias


def linear_native(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.ndim < 2 or not _leave_mkl(x.shape[:-1].numel(), weight.shape[0], weight.shape[1], x.dtype):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)
