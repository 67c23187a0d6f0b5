"""The decoder's last layer: a transposed convolution, kernel 4, stride 2, padding 1, from many channels to few.

    out[n, 2r - 1 + i, 2s - 1 + j, c] += x[n, r, s, k] * weight[k, c, i, j],  starting from bias[c]

Axes: N images, H x W pixels, K channels, C channels of an image.

Source: HarmonyDream's decoder (ALGORITHM §3). Convolution libraries work on blocks of 16 channels or more, of which
an image has 3: on CUDA, bfloat16 is in Triton (image_blocks.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, image_blocks
from .image_deconv_native import CHANNELS, image_deconv_native
from .library_conv import in_safe_type
from .numerics import check_device, check_shape, check_tensor


def image_deconv_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The definition, in plain PyTorch; see `image_deconv`."""
    kernel = weight.to(x.dtype, memory_format=torch.channels_last)
    given = x.permute(0, 3, 1, 2), kernel, bias.to(x.dtype)
    maps, kernel, shift = (in_safe_type(one, x.shape[2]) for one in given)
    out = F.conv_transpose2d(maps, kernel, shift, stride=2, padding=1)
    return out.permute(0, 2, 3, 1).to(x.dtype)


def image_deconv_triton(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Images in bfloat16 are put together from blocks of pixels; float32 is left to the reference."""
    if not image_blocks.takes(x, halved=False):
        return image_deconv_reference(x, weight, bias)
    return image_blocks.double_to_image(x, weight, bias)


def image_deconv(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str | None = None) -> Tensor:
    """Images of twice the size, from channels-last activations.

    Args:
        x: (N, H, W, K) float32 or bfloat16.
        weight: (K, C, 4, 4) float32.
        bias: (C,) float32.
        backend: "reference", "triton" (which leaves float32 to the reference) or "native" (both: C at most 4); None
            lets `dispatch` choose, and takes the reference for more channels.

    Returns (N, 2H, 2W, C) in x's dtype, sums in float32. Differentiable in all three.

    Raises ValueError on shapes or devices that do not fit; `dispatch.BackendError` if the backend cannot run here.
    """
    check_tensor("image_deconv", "x", x)
    check_tensor("image_deconv", "weight", weight)
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(
            f"image_deconv: x has shape {tuple(x.shape)}, expected (N, H, W, K), H, W and K at least 1"
        )
    check_shape("image_deconv", "weight", weight, (x.shape[-1], *weight.shape[1:2], 4, 4))
    check_shape("image_deconv", "bias", bias, weight.shape[1:2])
    check_device("image_deconv", x=x, weight=weight, bias=bias)
    if backend is None and weight.shape[1] > CHANNELS:
        backend = "reference"
    elif backend in ("triton", "native") and weight.shape[1] > CHANNELS:
        limit = f"{backend} makes images of at most {CHANNELS} channels, not {weight.shape[1]}"
        raise dispatch.BackendError(f'image_deconv: {limit}; use backend="reference"')
    return dispatch.resolve("image_deconv", backend, x)(x, weight, bias)


dispatch.register(
    "image_deconv",
    reference=image_deconv_reference,
    triton=image_deconv_triton,
    native=image_deconv_native,
)
