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

# Pixels and warps of a block, by the bytes of a number written. In float32 4 pixels a thread are a 16-byte store beside
# that of the next thread; in bfloat16 16 pixels are a 16-byte load and two stores, for which threads exchange numbers.
BLOCKS = {4: (1024, 8), 2: (4096, 4)}


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
    block, warps = BLOCKS[out.element_size()]
    programs = max(1, triton.cdiv(image.numel(), block))
    image_input_forward[(programs,)](image, out, image.numel(), block, num_warps=warps)
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
