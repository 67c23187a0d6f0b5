"""two_hot_loss and two_hot_mean on the CPU (csrc/ops/two_hot.cpp).

Forward keeps a few numbers of each row (the target's place among the bins, the largest logit, the inverse sum
of exponentials); backward reads the logits again, which is cheaper than to write and read their gradient twice.
"""

import torch
from torch import Tensor

from . import native
from .autograd import once_differentiable


class _TwoHotLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, low: float, high: float) -> Tensor:
        logits, target = logits.contiguous(), native.as_float(target)
        rows, bins = target.numel(), logits.shape[-1]
        loss, (position, top, scale) = native.empty(*target.shape), (native.empty(rows) for _ in range(3))
        native.module().two_hot_loss_forward(
            native.ptr(logits), native.ptr(target), native.ptr(loss), native.ptr(position), native.ptr(top),
            native.ptr(scale), rows, bins, low, high, native.is_bf16(logits), native.threads(),
        )  # fmt: skip
        ctx.save_for_backward(logits, position, top, scale)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, position, top, scale = ctx.saved_tensors
        grad, grad_logits = grad.contiguous(), torch.empty_like(logits)
        native.module().two_hot_loss_backward(
            native.ptr(grad), native.ptr(logits), native.ptr(position), native.ptr(top), native.ptr(scale),
            native.ptr(grad_logits), grad.numel(), logits.shape[-1], native.is_bf16(logits), native.threads(),
        )  # fmt: skip
        return grad_logits, None, None, None


class _TwoHotMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, low: float, high: float) -> Tensor:
        logits = logits.contiguous()
        shape, bins = logits.shape[:-1], logits.shape[-1]
        mean, centre, top, scale = (native.empty(*shape) for _ in range(4))
        native.module().two_hot_mean_forward(
            native.ptr(logits), native.ptr(mean), native.ptr(centre), native.ptr(top), native.ptr(scale),
            shape.numel(), bins, low, high, native.is_bf16(logits), native.threads(),
        )  # fmt: skip
        ctx.save_for_backward(logits, centre, top, scale)
        ctx.low, ctx.high = low, high
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, centre, top, scale = ctx.saved_tensors
        grad, grad_logits = grad.contiguous(), torch.empty_like(logits)
        native.module().two_hot_mean_backward(
            native.ptr(grad), native.ptr(logits), native.ptr(centre), native.ptr(top), native.ptr(scale),
            native.ptr(grad_logits), centre.numel(), logits.shape[-1], ctx.low, ctx.high,
            native.is_bf16(logits), native.threads(),
        )  # fmt: skip
        return grad_logits, None, None


two_hot_loss_native = _TwoHotLoss.apply
two_hot_mean_native = _TwoHotMean.apply
