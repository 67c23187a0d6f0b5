"""uint8 pixels as the encoder takes them, in the type of the matrix work.

    x = image / 255 - 1/2

In one pass: the float32 copies that plain PyTorch makes on the way are eight times as large as the images.

Source: DreamerV3's image encoder (thuml/HarmonyDream, dreamerv3-jax/dreamerv3/nets.py, `MultiEncoder`).
"""

import torch
from torch import Tensor

from . import dispatch
from ._triton import tl, triton
from .image_input_native import image_input_native
from .numerics import check_tensor

BLOCK, WARPS = 4096, 4  # 16 pixels a thread are one 16-byte load; two of them


def image_input_reference(image: Tensor, dtype: torch.dtype) -> Tensor:
    """The definition, in plain PyTorch; see `image_input`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (image.to(wide) / 255 - 0.5).to(dtype)


@triton.jit
def image_input_forward(image_ptr, out_ptr, pixels, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    image = tl.load(image_ptr + at, mask=at < pixels, other=0).to(tl.float32)
    # from the middle, where the difference is exact
    out = (image - 127.5) * (1.0 / 255)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=at < pixels)


def _image_input_triton(image: Tensor, dtype: torch.dtype) -> Tensor:
    image = image.contiguous()
    out = torch.empty(image.shape, dtype=dtype, device=image.device)
    programs = max(1, triton.cdiv(image.numel(), BLOCK))
    image_input_forward[(programs,)](image, out, image.numel(), BLOCK, num_warps=WARPS)
    return out


def image_input(image: Tensor, dtype: torch.dtype, *, backend: str | None = None) -> Tensor:
    """Pixels from 0 to 255 as numbers from -1/2 to 1/2.

    Args:
        image: (...) uint8.
        dtype: float32 or bfloat16 (the reference also float64).
        backend: "reference", "triton" or "native"; None lets `dispatch` choose.

    Returns (...) of that dtype. Not differentiable.

    Raises TypeError if image is not uint8; `dispatch.BackendError` if the backend cannot run here.
    """
    check_tensor("image_input", "image", image)
    if image.dtype != torch.uint8:
        raise TypeError(f"image_input: image has dtype {image.dtype}, expected uint8")
    like = torch.empty(0, dtype=dtype, device=image.device)
    return dispatch.resolve("image_input", backend, like)(image, dtype)


dispatch.register(
    "image_input",
    reference=image_input_reference,
    triton=_image_input_triton,
    native=image_input_native,
)
