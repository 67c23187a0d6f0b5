"""linear with matrices whose rows begin at multiples of 16 bytes, for which cuBLAS has its fast kernels.

A layer of 255 outputs writes rows of 510 bytes in bfloat16, and its backward pass reads such rows: cuBLAS then loads
and stores number by number, which takes four times as long as 256 outputs do. So where the product is large, the
weight is made wider, and a view leaves out the columns that nobody asked for.

Axes: M rows (all leading axes), K inputs, N outputs; K' and N' are those rounded up to whole units of 16 bytes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import once_differentiable

# Rows are padded to a multiple of UNIT bytes, in products of at least ENOUGH multiplications: in smaller ones, padded
# copies of weight and bias, a launch each, cost more than they save.
UNIT, ENOUGH = 16, 1 << 26


def _round_up(count: int, like: Tensor) -> int:
    """So many numbers of a dtype, rounded up to whole units."""
    unit = UNIT // like.element_size()
    return -(-count // unit) * unit


def _more_columns(x: Tensor) -> Tensor:
    """(M, K) -> (M, K'): columns of zeros."""
    missing = _round_up(x.shape[1], x) - x.shape[1]
    return F.pad(x, (0, missing)) if missing else x


def _more_rows(x: Tensor) -> Tensor:
    """(N, ...) -> (N', ...): rows of x again, which takes one launch where zeros would take two.

    The outputs of these rows are cut off, and the backward pass multiplies them by zeros.
    """
    rows = _round_up(len(x), x)
    return x if rows == len(x) else torch.cat([x] * (rows // len(x)) + [x[: rows % len(x)]])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.shape, N = x.shape, len(weight)
        x, weight = _more_columns(x.flatten(0, -2)), _more_rows(_more_columns(weight))  # (M, K'), (N', K')
        ctx.save_for_backward(x, weight)
        y = F.linear(x, weight, None if bias is None else _more_rows(bias))
        return y.view(*ctx.shape[:-1], len(weight))[..., :N]

    @staticmethod
    @once_differentiable("linear")
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        K, N = ctx.shape[-1], grad.shape[-1]
        grad, grad_x, grad_weight, grad_bias = _more_columns(grad.flatten(0, -2)), None, None, None  # (M, N')
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).view(*ctx.shape[:-1], weight.shape[1])[..., :K]
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.mT @ x)[:N, :K].contiguous()  # a copy only where K' is not K
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)[:N]
        return grad_x, grad_weight, grad_bias


def linear_fused(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `hdfast_kernels.linear`; the rows of the result may lie further apart than they are long."""
    whole = all(_round_up(width, x) == width for width in weight.shape)
    if whole or x.ndim < 2 or x.shape[:-1].numel() * weight.numel() < ENOUGH:
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)
