"""two_hot_loss and two_hot_mean on the CPU (csrc/ops/two_hot.cpp).

Forward keeps a few numbers of each row (the target's place among the bins, the largest logit, the inverse sum
of exponentials); backward reads the logits again, which is cheaper than to write and read their gradient twice.
"""

import torch
from torch import Tensor

from . import native
from .autograd import once_differentiable


def _lines(kept: Tensor) -> tuple[int, int, int]:
    """The addresses of the three rows of float32 numbers that backward needs: one tensor is faster than three."""
    first, nbytes = native.ptr(kept), 4 * kept.shape[1]
    return first, first + nbytes, first + 2 * nbytes


class _TwoHotLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, low: float, high: float) -> Tensor:
        logits, target = logits.contiguous(), native.as_float(target)
        rows, bins = target.numel(), logits.shape[-1]
        loss, kept = native.empty(*target.shape), native.empty(3, rows)  # position, top, scale
        native.module().two_hot_loss_forward(
            native.ptr(logits), native.ptr(target), native.ptr(loss), *_lines(kept),
            rows, bins, low, high, native.is_bf16(logits), native.threads(),
        )  # fmt: skip
        ctx.save_for_backward(logits, kept)
        return loss

    @staticmethod
    @once_differentiable("two_hot_loss")
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, kept = ctx.saved_tensors
        grad, grad_logits = grad.contiguous(), torch.empty_like(logits)
        native.module().two_hot_loss_backward(
            native.ptr(grad), native.ptr(logits), *_lines(kept), native.ptr(grad_logits),
            grad.numel(), logits.shape[-1], native.is_bf16(logits), native.threads(),
        )  # fmt: skip
        return grad_logits, None, None, None


class _TwoHotMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, low: float, high: float) -> Tensor:
        logits = logits.contiguous()
        shape, bins = logits.shape[:-1], logits.shape[-1]
        mean, kept = native.empty(*shape), native.empty(3, shape.numel())  # centre, top, scale
        native.module().two_hot_mean_forward(
            native.ptr(logits), native.ptr(mean), *_lines(kept),
            shape.numel(), bins, low, high, native.is_bf16(logits), native.threads(),
        )  # fmt: skip
        ctx.save_for_backward(logits, kept)
        ctx.low, ctx.high = low, high
        return mean

    @staticmethod
    @once_differentiable("two_hot_mean")
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, kept = ctx.saved_tensors
        grad, grad_logits = grad.contiguous(), torch.empty_like(logits)
        native.module().two_hot_mean_backward(
            native.ptr(grad), native.ptr(logits), *_lines(kept), native.ptr(grad_logits),
            grad.numel(), logits.shape[-1], ctx.low, ctx.high, native.is_bf16(logits), native.threads(),
        )  # fmt: skip
        return grad_logits, None, None


two_hot_loss_native = _TwoHotLoss.apply
two_hot_mean_native = _TwoHotMean.apply
