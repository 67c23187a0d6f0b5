"""The convolutions between two layers of an encoder or decoder: kernel 4, stride 2, padding 1, no bias.

Axes: N images, H x W pixels, C channels in, O channels out.

Source: HarmonyDream's encoder and decoder (ALGORITHM §3). On CUDA the convolutions are PyTorch's,
except those of images in bfloat16, which are in Triton (image_blocks.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, image_blocks
from .library_conv import in_safe_type
from .numerics import check_device, check_tensor
from .strided_conv_native import strided_conv_native


def strided_conv_reference(x: Tensor, weight: Tensor, transposed: bool = False) -> Tensor:
    """The definition, in plain PyTorch; see `strided_conv`."""
    kernel = weight.to(x.dtype, memory_format=torch.channels_last)
    convolution = F.conv_transpose2d if transposed else F.conv2d
    width = x.shape[2] if transposed else x.shape[2] // 2
    maps = in_safe_type(x.permute(0, 3, 1, 2), width), in_safe_type(kernel, width)
    return convolution(*maps, stride=2, padding=1).permute(0, 2, 3, 1).to(x.dtype)


def strided_conv_triton(x: Tensor, weight: Tensor, transposed: bool = False) -> Tensor:
    """Images in bfloat16 are halved as blocks of pixels; all else is left to the reference."""
    if transposed or x.shape[-1] > image_blocks.CHANNELS or not image_blocks.takes(x, halved=True):
        return strided_conv_reference(x, weight, transposed)
    return image_blocks.halve_image(x, weight)


def strided_conv(
    x: Tensor, weight: Tensor, *, transposed: bool = False, backend: str | None = None
) -> Tensor:
    """Halves the sides of channels-last activations, or doubles them.

    Args:
        x: (N, H, W, C) float32 or bfloat16, at least 2 x 2 pixels where they are halved.
        weight: (O, C, 4, 4), or (C, O, 4, 4) where `transposed`; float32, rounded to x's dtype.
        transposed: double the sides by a transposed convolution.
        backend: "reference", "triton" (which halves images of bfloat16, and leaves the rest to the reference) or
            "native"; None lets `dispatch` choose.

    Returns (N, H // 2, W // 2, O), or (N, 2H, 2W, O), in x's dtype. Differentiable in both.

    Raises ValueError on shapes or devices that do not fit; `dispatch.BackendError` if the backend cannot run here.
    """
    check_tensor("strided_conv", "x", x)
    check_tensor("strided_conv", "weight", weight)
    least = 1 if transposed else 2
    if x.ndim != 4 or min(x.shape[1:3]) < least:
        right = f"(N, H, W, C), H and W at least {least}"
        raise ValueError(f"strided_conv: x has shape {tuple(x.shape)}, expected {right}")
    if weight.ndim != 4 or weight.shape[2:] != (4, 4) or weight.shape[0 if transposed else 1] != x.shape[-1]:
        right = f"({x.shape[-1]}, O, 4, 4)" if transposed else f"(O, {x.shape[-1]}, 4, 4)"
        raise ValueError(f"strided_conv: weight has shape {tuple(weight.shape)}, expected {right}")
    if 0 in weight.shape:
        raise ValueError(
            f"strided_conv: weight has shape {tuple(weight.shape)}, expected at least one channel"
        )
    check_device("strided_conv", x=x, weight=weight)
    return dispatch.resolve("strided_conv", backend, x)(x, weight, transposed)


dispatch.register(
    "strided_conv",
    reference=strided_conv_reference,
    triton=strided_conv_triton,
    native=strided_conv_native,
)
