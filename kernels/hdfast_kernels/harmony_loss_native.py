"""harmony_loss on the CPU (csrc/ops/harmony_loss.cpp): one call, which prepares the gradients on the way."""

from array import array
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from . import native
from .autograd import once_differentiable


@lru_cache(maxsize=64)
def _constants(
    group: tuple[int, ...], weight: tuple[float, ...], regularizer: tuple[float, ...]
) -> tuple[array, array, array]:
    """As C++ reads them. Not as tensors: one made while PyTorch traces has no memory, and would be cached here."""
    return array("q", group), array("f", weight), array("f", regularizer)


class _HarmonyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, log_sigma: Tensor, group, weight, regularizer, *losses: Tensor) -> tuple[Tensor, Tensor]:
        losses, log_sigma = tuple(native.as_float(loss) for loss in losses), native.as_float(log_sigma)
        constants = _constants(tuple(group), tuple(weight), tuple(regularizer))
        numbers, factors, bounds = (values.buffer_info()[0] for values in constants)
        count, groups = len(losses), log_sigma.numel()
        total, means, slopes = native.empty(), native.empty(count), native.empty(count + groups)
        native.module().harmony_loss_forward(
            [native.ptr(loss) for loss in losses], count, losses[0].numel(), native.ptr(log_sigma),
            numbers, factors, bounds, groups, native.ptr(total),
            native.ptr(means), native.ptr(slopes), native.ptr(slopes) + 4 * count,
        )  # fmt: skip
        ctx.save_for_backward(slopes)
        ctx.shape, ctx.count = losses[0].shape, count
        ctx.mark_non_differentiable(means)
        return total, means

    @staticmethod
    @once_differentiable("harmony_loss")
    def backward(ctx, grad: Tensor, _) -> tuple[Tensor | None, ...]:
        (slopes,), count = ctx.saved_tensors, ctx.count
        groups = slopes.numel() - count
        grad_losses, grad_log_sigma = native.empty(count, *ctx.shape), native.empty(groups)
        native.module().harmony_loss_backward(
            native.ptr(grad), native.ptr(slopes), native.ptr(slopes) + 4 * count, native.ptr(grad_log_sigma),
            native.ptr(grad_losses), count, ctx.shape.numel(), groups,
        )  # fmt: skip
        return grad_log_sigma, None, None, None, *grad_losses.unbind()


def harmony_loss_native(
    losses: Sequence[Tensor],
    log_sigma: Tensor,
    group: tuple[int, ...],
    weight: tuple[float, ...],
    regularizer: tuple[float, ...],
) -> tuple[Tensor, Tensor]:
    return _HarmonyLoss.apply(log_sigma, group, weight, regularizer, *losses)
