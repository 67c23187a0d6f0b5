"""PyTorch's convolutions of kernel 4, stride 2, padding 1 on the CPU, for activations whose channels come last.

Used where no kernel of ours is faster. Axes: N images, H x W pixels, channels; weights (channels of the smaller map,
of the larger one, 4, 4), in the dtype of the activations.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# From so many output channels per output pixel (of all images together) on, the weights are most of the traffic.
FEW = 2


def convolve(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """x halved, or doubled where `transposed`."""
    images, height, width, _ = x.shape
    pixels = images * (height // 2) * (width // 2)
    if not transposed and x.dtype == torch.float32 and FEW * pixels <= len(weight):
        return _as_product(x, weight)
    width = x.shape[2] if transposed else x.shape[2] // 2
    maps = _laid(x.permute(0, 3, 1, 2), width), _laid(weight, width)
    out = torch.ops.aten.convolution(*maps, None, *_constants(transposed))
    return out.permute(0, 2, 3, 1).to(x.dtype)


def _as_product(x: Tensor, weight: Tensor) -> Tensor:
    """x halved by a product of matrices, which reads the weights in place and copies of the pixels."""
    (images, height, width, channels), depth = x.shape, 16 * x.shape[3]
    map_size = (images, height // 2, width // 2)
    x = F.pad(x, (0, 0, 1, 1, 1, 1))
    of_image, down, across, _ = x.stride()
    windows = x.as_strided((*map_size, channels, 4, 4), (of_image, 2 * down, 2 * across, 1, down, across))
    out = windows.reshape(math.prod(map_size), depth) @ weight.reshape(len(weight), depth).mT
    return out.view(*map_size, len(weight))


def gradients(
    x: Tensor, grad: Tensor, weight: Tensor, transposed: bool, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients wanted, of x and of the weight, from that of `convolve`."""
    width = min(x.shape[2], grad.shape[2])
    maps = (_laid(tensor, width) for tensor in (grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight))
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(
        *maps, None, *_constants(transposed), [*wanted, False]
    )
    return of_x.permute(0, 2, 3, 1).to(x.dtype) if wanted[0] else None, of_weight if wanted[1] else None


def _laid(tensor: Tensor, width: int) -> Tensor:
    """The tensor with channels last in memory and in a safe type, itself if it is so; `width`: of the smaller map."""
    return in_safe_type(tensor, width).contiguous(memory_format=torch.channels_last)


def in_safe_type(tensor: Tensor, width: int) -> Tensor:
    """The tensor, widened to float32 if it is bfloat16 on the CPU and the convolution's smaller map one pixel wide.

    With AMX, oneDNN 3.12 reads some numbers of such maps from outside their memory.
    """
    return tensor.float() if width <= 1 and tensor.is_cpu and tensor.dtype == torch.bfloat16 else tensor


def _constants(transposed: bool) -> tuple:
    """Stride, padding, dilation, transposed, output padding, groups."""
    return [2, 2], [1, 1], [1, 1], transposed, [0, 0], 1
