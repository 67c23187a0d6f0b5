"""layer_norm_gru on the CPU (csrc/ops/layer_norm_gru.cpp). Forward keeps each row's mean and rstd."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import native
from .autograd import once_differentiable
from .numerics import rows_of


def _forward(
    inputs: Sequence[Tensor], eps: float, out: Tensor, rounded: Tensor | None, moments: tuple[Tensor, Tensor]
) -> None:
    """Fills out and rounded (N, columns), whose rows may be any distance apart, and the moments.

    inputs: gates, deter, weight, bias. moments: each row's mean and rstd (N,).
    """
    gates, deter, *_ = inputs
    mean, rstd = moments
    second, apart = (0, 0) if rounded is None else (native.ptr_of_rows(rounded), rounded.stride(0))
    native.module().layer_norm_gru_forward(
        *map(native.ptr, inputs), native.ptr_of_rows(out), out.stride(0), second, apart, native.ptr(mean),
        native.ptr(rstd), *out.shape, eps, native.is_bf16(gates), native.is_bf16(deter), native.threads(),
    )  # fmt: skip


class _LayerNormGRU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gates: Tensor, deter: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        gates, deter = gates.contiguous(), deter.contiguous()
        weight, bias = native.as_float(weight), native.as_float(bias)
        rows, after = deter.shape[:-1].numel(), torch.empty_like(deter)
        moments = native.empty(rows), native.empty(rows)
        _forward((gates, deter, weight, bias), eps, rows_of(after), None, moments)
        ctx.save_for_backward(gates, deter, weight, bias, *moments)
        return after

    @staticmethod
    @once_differentiable("layer_norm_gru")
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
    moments = native.empty(len(after)), native.empty(len(after))
    _forward((gates, deter, weight, bias), eps, after, second, moments)
    return out
