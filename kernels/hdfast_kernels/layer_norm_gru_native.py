"""layer_norm_gru on the CPU (csrc/ops/layer_norm_gru.cpp). Forward keeps each row's mean and rstd."""

import torch
from torch import Tensor

from . import native
from .autograd import once_differentiable
from .numerics import rows_of


class _LayerNormGRU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gates: Tensor, deter: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        gates, deter = gates.contiguous(), deter.contiguous()
        weight, bias = native.as_float(weight), native.as_float(bias)
        rows, width = deter.shape[:-1].numel(), deter.shape[-1]
        after, mean, rstd = torch.empty_like(deter), native.empty(rows), native.empty(rows)
        native.module().layer_norm_gru_forward(
            native.ptr(gates), native.ptr(deter), native.ptr(weight), native.ptr(bias), native.ptr(after),
            width, 0, 0, native.ptr(mean), native.ptr(rstd), rows, width, eps, native.is_bf16(gates),
            native.is_bf16(deter), native.threads(),
        )  # fmt: skip
        ctx.save_for_backward(gates, deter, weight, bias, mean, rstd)
        return after

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        gates, deter, weight, bias, mean, rstd = ctx.saved_tensors
        grad, rows, width = grad.contiguous(), deter.shape[:-1].numel(), deter.shape[-1]
        grad_gates, grad_deter = torch.empty_like(gates), torch.empty_like(deter)
        grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
        native.module().layer_norm_gru_backward(
            native.ptr(grad), native.ptr(gates), native.ptr(deter), native.ptr(weight), native.ptr(bias),
            native.ptr(mean), native.ptr(rstd), native.ptr(grad_gates), native.ptr(grad_deter),
            native.ptr(grad_weight), native.ptr(grad_bias), rows, width, native.is_bf16(gates),
            native.is_bf16(deter), native.threads(),
        )  # fmt: skip
        return grad_gates, grad_deter, grad_weight, grad_bias, None


def layer_norm_gru_native(
    gates: Tensor,
    deter: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out: Tensor | None = None,
    rounded: Tensor | None = None,
) -> Tensor:
    """See `layer_norm_gru`."""
    if out is None and rounded is None:
        return _LayerNormGRU.apply(gates, deter, weight, bias, eps)
    gates, deter = gates.detach().contiguous(), deter.detach().contiguous()
    weight, bias = native.as_float(weight.detach()), native.as_float(bias.detach())
    out = torch.empty_like(deter) if out is None else out
    after, second = rows_of(out), None if rounded is None else rows_of(rounded)
    (rows, width), moments = after.shape, native.empty(2, len(after))
    native.module().layer_norm_gru_forward(
        native.ptr(gates), native.ptr(deter), native.ptr(weight), native.ptr(bias), native.ptr_of_rows(after),
        after.stride(0), 0 if second is None else native.ptr_of_rows(second),
        0 if second is None else second.stride(0), native.ptr(moments[0]), native.ptr(moments[1]), rows, width,
        eps, native.is_bf16(gates), native.is_bf16(deter), native.threads(),
    )  # fmt: skip
    return out
