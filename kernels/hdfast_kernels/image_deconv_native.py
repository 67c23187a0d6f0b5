"""image_deconv on the CPU (csrc/ops/image_deconv.cpp); its gradient is a convolution of images (image_conv.cpp)."""

import torch
from torch import Tensor

from . import image_conv_native, library_conv, native
from .autograd import once_differentiable

CHANNELS = 4  # at most: a row of the kernel is then one or a few vectors


class _ImageDeconv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        (images, height, width, inputs), channels = x.shape, weight.shape[1]
        x = x.contiguous()
        out = x.new_empty((images, 2 * height, 2 * width, channels))
        weights, biases = native.as_float(weight), native.as_float(bias)
        native.module().image_deconv_forward(
            native.ptr(x), native.ptr(weights), native.ptr(biases), native.ptr(out), images, height, width,
            inputs, channels, native.is_bf16(x), native.threads(),
        )  # fmt: skip
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = bias.dtype
        return out

    @staticmethod
    @once_differentiable("image_deconv")
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), grad_x, grad_weight, grad_bias = ctx.saved_tensors, None, None, None
        if image_conv_native.takes(grad, x.shape[-1]):
            if ctx.needs_input_grad[0]:
                grad_x = image_conv_native.halve(grad, weight)
            if any(ctx.needs_input_grad[1:]):
                grad_weight, grad_bias = image_conv_native.weight_grad(grad, x)
        else:
            low, wanted = weight.to(x.dtype), ctx.needs_input_grad[:2]
            grad_x, grad_weight = library_conv.gradients(x, grad, low, True, wanted)
            grad_bias = grad.sum((0, 1, 2), dtype=torch.float32)
        of_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_x, of_weight, None if grad_bias is None else grad_bias.to(ctx.bias_dtype)


image_deconv_native = _ImageDeconv.apply
