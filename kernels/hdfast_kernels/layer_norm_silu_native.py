"""layer_norm_silu on the CPU (csrc/ops/layer_norm_silu.cpp). Forward keeps each row's mean and rstd."""

import torch
from torch import Tensor

from . import native
from .autograd import once_differentiable
from .numerics import rows_of


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor, moments: tuple[Tensor, Tensor]
) -> None:
    """Fills out (N, columns), whose rows may be any distance apart, and the moments: each row's mean and rstd (N,)."""
    mean, rstd = moments
    native.module().layer_norm_silu_forward(
        native.ptr(x), native.ptr(weight), native.ptr(bias), native.ptr_of_rows(out), out.stride(0),
        native.ptr(mean), native.ptr(rstd), *out.shape, eps, native.is_bf16(x), native.threads(),
    )  # fmt: skip


class _LayerNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        x, weight, bias = x.contiguous(), native.as_float(weight), native.as_float(bias)
        rows, y = x.shape[:-1].numel(), torch.empty_like(x)
        moments = native.empty(rows), native.empty(rows)
        _forward(x, weight, bias, eps, rows_of(y), moments)
        ctx.save_for_backward(x, weight, bias, *moments)
        return y

    @staticmethod
    @once_differentiable("layer_norm_silu")
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        grad, rows, width = grad.contiguous(), x.shape[:-1].numel(), x.shape[-1]
        grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
        native.module().layer_norm_silu_backward(
            native.ptr(grad), native.ptr(x), native.ptr(weight), native.ptr(bias), native.ptr(mean),
            native.ptr(rstd), native.ptr(grad_x), native.ptr(grad_weight), native.ptr(grad_bias),
            rows, width, native.is_bf16(x), native.threads(),
        )  # fmt: skip
        return grad_x, grad_weight, grad_bias, None


def layer_norm_silu_native(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor | None = None
) -> Tensor:
    """See `layer_norm_silu`."""
    if out is None:
        return _LayerNormSiLU.apply(x, weight, bias, eps)
    x, y = x.detach().contiguous(), rows_of(out)
    weight, bias = native.as_float(weight.detach()), native.as_float(bias.detach())
    _forward(x, weight, bias, eps, y, (native.empty(len(y)), native.empty(len(y))))
    return out
