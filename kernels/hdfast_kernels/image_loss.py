"""Squared error of a predicted image against uint8 pixels, summed over each image.

    loss = sum over H, W, C of (pred - image / 255)^2        no factor 1/2

Axes: N images (all leading axes), H height, W width, C channels.

The pixels are normalised where they are read, so that no float copy of the batch's images exists.

Source: DreamerV3's `image` head with `dist: mse`, reduced by a sum over pixels.
"""

import math

import torch
from torch import Tensor

from . import dispatch
from ._triton import tl, triton
from .autograd import once_differentiable
from .image_loss_native import image_loss_native
from .numerics import check_axes, check_device, check_shape, compute_dtype
from .tiles import as_rows

# Pixels and warps of a block. With 4 pixels a thread, the threads of a warp read side by side: with 16, which are one
# 16-byte load of the image, a float32 prediction is read in pieces 64 bytes apart. Forward then takes 32 registers a
# thread, so that 8 programs, of an image each, run at once on a multiprocessor. Backward in bfloat16 has 16.
FORWARD, BACKWARD = (1024, 8), {4: (1024, 8), 2: (2048, 4)}  # those by the bytes of a number


def image_loss_reference(pred: Tensor, image: Tensor) -> Tensor:
    """The definition, in plain PyTorch; see `image_loss`."""
    dtype = compute_dtype(pred)
    return (pred.to(dtype) - image.to(dtype) / 255).square().sum(dim=(-3, -2, -1))


@triton.jit
def image_loss_forward(pred_ptr, image_ptr, loss_ptr, PIXELS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, PIXELS, BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        pred = tl.load(pred_ptr + row * PIXELS + pixel, mask=pixel < PIXELS, other=0.0).to(tl.float32)
        image = tl.load(image_ptr + row * PIXELS + pixel, mask=pixel < PIXELS, other=0).to(tl.float32)
        error = pred - image * (1.0 / 255)
        total += error * error
    tl.store(loss_ptr + row, tl.sum(total, axis=0))


@triton.jit
def image_loss_backward(pred_ptr, image_ptr, dloss_ptr, dpred_ptr, PIXELS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slope = 2.0 * tl.load(dloss_ptr + row)
    pred = tl.load(pred_ptr + row * PIXELS + pixel, mask=pixel < PIXELS, other=0.0).to(tl.float32)
    image = tl.load(image_ptr + row * PIXELS + pixel, mask=pixel < PIXELS, other=0).to(tl.float32)
    dpred = slope * (pred - image * (1.0 / 255))
    tl.store(dpred_ptr + row * PIXELS + pixel, dpred.to(dpred_ptr.dtype.element_ty), mask=pixel < PIXELS)


class _ImageLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pred: Tensor, image: Tensor) -> Tensor:
        pixels = math.prod(pred.shape[-3:])
        flat, image = as_rows(pred, pixels), as_rows(image, pixels)
        loss = torch.empty(pred.shape[:-3], dtype=torch.float32, device=pred.device)
        if len(flat):
            block = min(FORWARD[0], triton.next_power_of_2(pixels))
            image_loss_forward[(len(flat),)](flat, image, loss, pixels, block, num_warps=FORWARD[1])
        ctx.save_for_backward(flat, image)
        ctx.shape = pred.shape
        return loss

    @staticmethod
    @once_differentiable("image_loss")
    def backward(ctx, dloss: Tensor) -> tuple[Tensor, None]:
        pred, image = ctx.saved_tensors
        rows, pixels = pred.shape
        dpred = torch.empty_like(pred)
        if rows:
            most, warps = BACKWARD[pred.element_size()]
            block = min(most, triton.next_power_of_2(pixels))
            image_loss_backward[(rows, triton.cdiv(pixels, block))](
                pred, image, dloss.contiguous(), dpred, pixels, block, num_warps=warps
            )
        return dpred.view(ctx.shape), None


def image_loss(pred: Tensor, image: Tensor, *, backend: str | None = None) -> Tensor:
    """Squared error per image, summed over pixels and channels.

    Args:
        pred: (..., H, W, C) float32 or bfloat16, in the unit of image / 255.
        image: (..., H, W, C) uint8.
        backend: "reference", "triton" or "native"; None lets `dispatch` choose.

    Returns (...) float32 (float64 for float64 pred). Differentiable in pred.

    Raises ValueError on shapes or devices that do not fit, TypeError if image is not uint8;
    `dispatch.BackendError` if the backend cannot run here.
    """
    check_axes("image_loss", "pred", pred, "...", "H", "W", "C")
    check_shape("image_loss", "image", image, pred.shape)
    check_device("image_loss", pred=pred, image=image)
    if image.dtype != torch.uint8:
        raise TypeError(f"image_loss: image has dtype {image.dtype}, expected uint8")
    return dispatch.resolve("image_loss", backend, pred)(pred, image)


dispatch.register(
    "image_loss",
    reference=image_loss_reference,
    triton=_ImageLoss.apply,
    native=image_loss_native,
)
