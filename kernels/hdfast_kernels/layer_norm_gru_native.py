"""layer_norm_gru on the CPU (csrc/ops/layer_norm_gru.cpp). Forward keeps each row's mean and rstd."""

import torch
from torch import Tensor

from . import native
from .autograd import once_differentiable


class _LayerNormGRU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gates: Tensor, deter: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        gates, deter = gates.contiguous(), deter.contiguous()
        weight, bias = native.as_float(weight), native.as_float(bias)
        rows, width = deter.shape[:-1].numel(), deter.shape[-1]
        after, mean, rstd = torch.empty_like(deter), native.empty(rows), native.empty(rows)
        native.module().layer_norm_gru_forward(
            native.ptr(gates), native.ptr(deter), native.ptr(weight), native.ptr(bias), native.ptr(after),
            native.ptr(mean), native.ptr(rstd), rows, width, eps, native.is_bf16(gates),
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


layer_norm_gru_native = _LayerNormGRU.apply
