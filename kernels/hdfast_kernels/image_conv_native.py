"""The convolution between images of few channels and a map of half their size, on the CPU (csrc/ops/image_conv*.cpp).

It is the first layer of an encoder, and the backward pass of a decoder's last. Axes: N images, H x W pixels of the map,
C channels of the images, S of the map.
"""

from torch import Tensor

from . import native

# Channels of the map come in whole vectors. Images of 16 channels or more are for libraries and strided_conv.
VECTOR, MANY = 16, 16
# The same in bfloat16 if the processor has tiles (AMX): libraries use them too, for channels that do not fill ours.
TILE, MANY_FOR_TILES = 32, 5


def takes(images: Tensor, small: int) -> bool:
    """Whether this is faster than PyTorch, for images and `small` channels of a map of half their size."""
    _, height, width, channels = images.shape
    tiles = native.is_bf16(images) and native.isa() == "amx"
    many, vector = (MANY_FOR_TILES, TILE) if tiles else (MANY, VECTOR)
    return 0 < channels < many and small % vector == 0 and height % 2 == 0 and width % 2 == 0


def halve(images: Tensor, weight: Tensor) -> Tensor:
    """(N, 2H, 2W, C) and a weight (S, C, 4, 4), rounded to their dtype -> (N, H, W, S)."""
    images, low = images.contiguous(), native.as_float(weight.to(images.dtype))
    count, height, width, channels = images.shape
    out = images.new_empty((count, height // 2, width // 2, len(low)))
    native.module().image_conv_forward(
        native.ptr(images), native.ptr(low), native.ptr(out), count, height // 2, width // 2, channels, len(low),
        native.is_bf16(images), native.threads(),
    )  # fmt: skip
    return out


def weight_grad(images: Tensor, small: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 2H, 2W, C) and (N, H, W, S) -> the gradient (S, C, 4, 4) float32, and the images' sum (C,) float32."""
    images, small = images.contiguous(), small.contiguous()
    (count, height, width, outputs), channels = small.shape, images.shape[-1]
    grad, sums = native.empty(outputs, channels, 4, 4), native.empty(channels)
    native.module().image_conv_weight_grad(
        native.ptr(images), native.ptr(small), native.ptr(grad), native.ptr(sums), count, height, width, channels,
        outputs, native.is_bf16(images), native.threads(),
    )  # fmt: skip
    return grad, sums
