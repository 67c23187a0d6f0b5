"""strided_conv on the CPU: ours where that is faster, else PyTorch's.

Each direction is the gradient of the other. In float32, maps are halved and doubled with 9 multiplications in place of
16 (csrc/ops/strided_conv_winograd.cpp), and so is the gradient of the kernel (strided_conv_winograd_grad.cpp, for few
pixels strided_conv.cpp). In bfloat16, maps are doubled by strided_conv_double.cpp; the gradient is strided_conv.cpp;
where the processor has tiles (AMX), both are theirs (strided_conv_tiles_double.cpp, strided_conv_tiles_grad.cpp).
Images of few channels are a case of their own in both (image_conv_native.py).
"""

import torch
from torch import Tensor

from . import image_conv_native, library_conv, native
from .autograd import once_differentiable


class _StridedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        x, low = x.contiguous(), weight
        if x.dtype != weight.dtype:
            low = weight.to(x.dtype, memory_format=torch.channels_last)
        out = _convolve(x, low, transposed)
        if out is None:
            out = library_conv.convolve(x, low, transposed)
        ctx.save_for_backward(x, low)
        ctx.transposed, ctx.weight_dtype = transposed, weight.dtype
        return out

    @staticmethod
    @once_differentiable("strided_conv")
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, low), grad, grad_x, grad_weight = ctx.saved_tensors, grad.contiguous(), None, None
        wanted = list(ctx.needs_input_grad[:2])
        if wanted[0] and (grad_x := _grad_x(x, grad, low, ctx.transposed)) is not None:
            wanted[0] = False
        if wanted[1] and (grad_weight := _weight_grad(x, grad, ctx.transposed)) is not None:
            wanted[1] = False
        if any(wanted):
            of_x, of_weight = library_conv.gradients(x, grad, low, ctx.transposed, wanted)
            grad_x = of_x if wanted[0] else grad_x
            grad_weight = of_weight if wanted[1] else grad_weight
        return grad_x, grad_weight if grad_weight is None else grad_weight.to(ctx.weight_dtype), None


def _convolve(x: Tensor, weight: Tensor, doubling: bool) -> Tensor | None:
    """x halved, or doubled; None where PyTorch should compute it."""
    (images, height, width, channels), (small, large) = x.shape, weight.shape[:2]
    if not doubling and image_conv_native.takes(x, small):
        return image_conv_native.halve(x, weight)
    if not doubling and (height % 2 or width % 2 or native.is_bf16(x)):
        return None
    height, width = (height, width) if doubling else (height // 2, width // 2)
    out = x.new_empty((images, 2 * height, 2 * width, large) if doubling else (images, height, width, small))
    if native.is_bf16(x):
        weight = weight.permute(0, 2, 3, 1).contiguous()
        done = native.module().strided_conv_double(
            native.ptr(x), native.ptr(weight), native.ptr(out), images, height, width, channels, large,
            native.threads(),
        )  # fmt: skip
    else:
        weight = weight.contiguous()
        done = native.module().strided_conv_winograd(
            native.ptr(x), native.ptr(weight), native.ptr(out), images, height, width, channels, out.shape[-1],
            doubling, native.threads(),
        )  # fmt: skip
    return out if done else None


def _grad_x(x: Tensor, grad: Tensor, weight: Tensor, transposed: bool) -> Tensor | None:
    """Halved where x was doubled, doubled where it was halved; None where PyTorch should compute it."""
    sides = [2 * side for side in grad.shape[1:3]]
    return _convolve(grad, weight, not transposed) if transposed or list(x.shape[1:3]) == sides else None


def _weight_grad(x: Tensor, grad: Tensor, transposed: bool) -> Tensor | None:
    """Of shape (channels of the smaller map, of the larger one, 4, 4); None where PyTorch should compute it."""
    large, small = (grad, x) if transposed else (x, grad)
    images, height, width, channels = small.shape
    if large.shape[1:3] != (2 * height, 2 * width):
        return None
    if image_conv_native.takes(large, channels):
        return image_conv_native.weight_grad(large, small)[0]
    out = native.empty(channels, large.shape[-1], 4, 4)
    done = native.module().strided_conv_weight_grad(
        native.ptr(large), native.ptr(small), native.ptr(out), images, height, width, large.shape[-1], channels,
        native.is_bf16(x), native.threads(),
    )  # fmt: skip
    return out if done else None


strided_conv_native = _StridedConv.apply
