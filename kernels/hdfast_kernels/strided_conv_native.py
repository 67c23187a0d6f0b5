"""strided_conv on the CPU: ours where that is faster, else PyTorch's.

float32 activations are halved and doubled, forward and as the gradient of the other, with 9 multiplications in place
of 16 (csrc/ops/strided_conv_winograd.cpp); the gradient of the kernel is csrc/ops/strided_conv.cpp in both dtypes.
"""

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
        x, low = x.contiguous(), weight.to(x.dtype)
        out = _convolve(x, low, transposed)
        if out is None:
            low = low.contiguous(memory_format=torch.channels_last)
            out = torch.ops.aten.convolution(x.permute(0, 3, 1, 2), low, None, *_constants(transposed))
            out = out.permute(0, 2, 3, 1)
        ctx.save_for_backward(x, low)
        ctx.transposed, ctx.weight_dtype = transposed, weight.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, low), grad, grad_x, grad_weight = ctx.saved_tensors, grad.contiguous(), None, None
        wanted = list(ctx.needs_input_grad)
        if wanted[0] and (grad_x := _grad_x(x, grad, low, ctx.transposed)) is not None:
            wanted[0] = False
        if wanted[1] and (grad_weight := _weight_grad(x, grad, ctx.transposed)) is not None:
            wanted[1] = False
        if any(wanted):
            maps = (tensor.permute(0, 3, 1, 2) for tensor in (grad, x))
            low = low.contiguous(memory_format=torch.channels_last)
            constants = _constants(ctx.transposed)
            of_x, of_weight, _ = torch.ops.aten.convolution_backward(*maps, low, None, *constants, wanted)
            grad_x = of_x.permute(0, 2, 3, 1) if wanted[0] else grad_x
            grad_weight = of_weight if wanted[1] else grad_weight
        return grad_x, grad_weight if grad_weight is None else grad_weight.to(ctx.weight_dtype), None


def _convolve(x: Tensor, weight: Tensor, doubling: bool) -> Tensor | None:
    """Of float32 x, halved or doubled; None where it is for PyTorch to compute."""
    images, height, width, channels = x.shape
    small, large = weight.shape[:2]
    if x.dtype != torch.float32 or (not doubling and (height % 2 or width % 2)):
        return None
    if not doubling:
        height, width = height // 2, width // 2
    out = (
        native.empty(images, 2 * height, 2 * width, large)
        if doubling
        else native.empty(images, height, width, small)
    )
    done = native.module().strided_conv_winograd(
        native.ptr(x), native.ptr(weight.contiguous()), native.ptr(out), images, height, width, channels,
        out.shape[-1], doubling, native.threads(),
    )  # fmt: skip
    return out if done else None


def _grad_x(x: Tensor, grad: Tensor, weight: Tensor, transposed: bool) -> Tensor | None:
    """Halved where x was doubled, doubled where it was halved; None where it is for PyTorch to compute."""
    sides = [2 * side for side in grad.shape[1:3]]
    return _convolve(grad, weight, not transposed) if transposed or list(x.shape[1:3]) == sides else None


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
