"""image_input on the CPU (csrc/ops/image_input.cpp): one pass over the pixels."""

import torch
from torch import Tensor

from . import native


def image_input_native(image: Tensor, dtype: torch.dtype) -> Tensor:
    """image / 255 - 1/2 in `dtype`; see `image_input`."""
    image = image.contiguous()
    out = torch.empty(image.shape, dtype=dtype, device="cpu")
    native.module().image_input_forward(
        native.ptr(image), native.ptr(out), image.numel(), native.is_bf16(out), native.threads()
    )
    return out
