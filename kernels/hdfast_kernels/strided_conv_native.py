"""strided_conv on the CPU: PyTorch's, but for the gradient of the kernel (csrc/ops/strided_conv.cpp)."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import native


def _constants(transposed: bool) -> tuple:
    """Stride, padding, dilation, transposed, output padding, groups."""
    return [2, 2], [1, 1], [1, 1], transposed, [0, 0], 1


class _StridedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        x, low = x.contiguous(), weight.to(x.dtype, memory_format=torch.channels_last)
        out = torch.ops.aten.convolution(x.permute(0, 3, 1, 2), low, None, *_constants(transposed))
        ctx.save_for_backward(x, low)
        ctx.transposed, ctx.weight_dtype = transposed, weight.dtype
        return out.permute(0, 2, 3, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, low), grad, grad_weight = ctx.saved_tensors, grad.contiguous(), None
        left = ctx.needs_input_grad[1]
        if left and (grad_weight := _weight_grad(x, grad, ctx.transposed)) is not None:
            grad_weight, left = grad_weight.to(ctx.weight_dtype), False
        wanted = [ctx.needs_input_grad[0], left, False]
        grad_x, other, _ = torch.ops.aten.convolution_backward(
            grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), low, None, *_constants(ctx.transposed), wanted
        )
        if left:
            grad_weight = other.to(ctx.weight_dtype)
        return grad_x if grad_x is None else grad_x.permute(0, 2, 3, 1), grad_weight, None


def _weight_grad(x: Tensor, grad: Tensor, transposed: bool) -> Tensor | None:
    """Of shape (channels of the smaller map, of the larger one, 4, 4); None where it is for PyTorch to compute."""
    large, small = (grad, x) if transposed else (x, grad)
    images, height, width, channels = small.shape
    if large.shape[1:3] != (2 * height, 2 * width):
        return None
    out = native.empty(channels, large.shape[-1], 4, 4)
    done = native.module().strided_conv_weight_grad(
        native.ptr(large), native.ptr(small), native.ptr(out), images, height, width, large.shape[-1], channels,
        native.is_bf16(x), native.threads(),
    )  # fmt: skip
    return out if done else None


strided_conv_native = _StridedConv.apply
