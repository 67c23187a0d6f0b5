"""image_loss on the CPU (csrc/ops/image_loss.cpp): pixels are widened in registers, in both directions."""

import torch
from torch import Tensor

from . import native
from .autograd import once_differentiable


class _ImageLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pred: Tensor, image: Tensor) -> Tensor:
        pred, image = pred.contiguous(), image.contiguous()
        loss, width = native.empty(*pred.shape[:-3]), pred.shape[-3:].numel()
        native.module().image_loss_forward(
            native.ptr(pred), native.ptr(image), native.ptr(loss), loss.numel(), width,
            native.is_bf16(pred), native.threads(),
        )  # fmt: skip
        ctx.save_for_backward(pred, image)
        return loss

    @staticmethod
    @once_differentiable("image_loss")
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        pred, image = ctx.saved_tensors
        grad, grad_pred, width = grad.contiguous(), torch.empty_like(pred), pred.shape[-3:].numel()
        native.module().image_loss_backward(
            native.ptr(grad), native.ptr(pred), native.ptr(image), native.ptr(grad_pred), grad.numel(), width,
            native.is_bf16(pred), native.threads(),
        )  # fmt: skip
        return grad_pred, None


image_loss_native = _ImageLoss.apply
