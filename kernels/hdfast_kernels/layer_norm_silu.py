"""SiLU(LayerNorm(x)) over the last axis: the activation of every hidden layer of the model.

    y = silu((x - mean(x)) / sqrt(var(x) + eps) * weight + bias)

Axes: N rows (all leading axes), C channels. A convolution's output is passed channels-last:
`x.permute(0, 2, 3, 1)` of an image in torch.channels_last is contiguous and costs nothing.

Source: DreamerV3 (arXiv 2301.04104), "LayerNorm + SiLU"; variance without Bessel's correction.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from ._triton import tl, triton
from .autograd import once_differentiable
from .layer_norm_silu_native import layer_norm_silu_native
from .numerics import as_contiguous, check_axes, check_device, check_eps, check_shape, compute_dtype
from .tiles import as_rows, normalise, row_tile, sigmoid, sum_of_partials

# Backward: numbers in a tile, and for each thread: one 16-byte load of bfloat16 for each operand, with the next tile's
# under way meanwhile. It takes up to 80 registers a thread, or 96 for rows of WIDE numbers or more, so that 6 or 5
# programs run at once on each of an H100's 132 multiprocessors. Each program has a row of partial sums.
TILE, THREAD, WIDE, PARTIALS, WIDE_PARTIALS = 1024, 8, 512, 792, 660


def layer_norm_silu_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-3) -> Tensor:
    """The definition, in plain PyTorch; see `layer_norm_silu`."""
    dtype = compute_dtype(x)
    normed = F.layer_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), bias.to(dtype), eps)
    return F.silu(normed).to(x.dtype)


@triton.jit
def layer_norm_silu_forward(
    x_ptr, weight_ptr, bias_ptr, y_ptr, rows, eps, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    column = tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    inside = (row < rows) & (column < C)
    weight = tl.load(weight_ptr + column, mask=column < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=column < C, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * C + column, mask=inside, other=0.0).to(tl.float32)
    normed, _ = normalise(x, column < C, C, eps)
    z = normed * weight + bias
    tl.store(y_ptr + row * C + column, (z * sigmoid(z)).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def layer_norm_silu_backward(
    x_ptr,
    weight_ptr,
    bias_ptr,
    dy_ptr,
    dx_ptr,
    partial_ptr,  # (2, programs, C) float32: each program's share of dweight and dbias
    rows,
    eps,
    ITERATIONS: tl.constexpr,  # tiles a program works through, `programs` apart
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    column = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=column < C, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    row = program * ROWS + tl.arange(0, ROWS)[:, None]
    inside = (row < rows) & (column < C)
    next_x = tl.load(x_ptr + row * C + column, mask=inside, other=0.0)
    next_dy = tl.load(dy_ptr + row * C + column, mask=inside, other=0.0)
    for iteration in range(ITERATIONS):
        x, dy, at, known = next_x.to(tl.float32), next_dy.to(tl.float32), row * C + column, inside
        # the next tile is on its way while this one is worked on; after the last one there is none
        row += programs * ROWS
        inside = (row < rows) & (column < C) & (iteration + 1 < ITERATIONS)
        next_x = tl.load(x_ptr + row * C + column, mask=inside, other=0.0)
        next_dy = tl.load(dy_ptr + row * C + column, mask=inside, other=0.0)
        # mean and rstd again rather than from memory: the row is in registers, and with few channels they are
        # 1/8 of it
        normed, rstd = normalise(x, column < C, C, eps)
        z = normed * weight + bias
        gate = sigmoid(z)
        dz = dy * gate * (1.0 + z * (1.0 - gate))
        dweight += dz * normed
        dbias += dz
        dnormed = dz * weight
        mean = (tl.sum(dnormed, axis=1) * (1.0 / C))[:, None]
        along = (tl.sum(dnormed * normed, axis=1) * (1.0 / C))[:, None]
        dx = rstd * (dnormed - mean - normed * along)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=known)
    slot = tl.arange(0, BLOCK)
    tl.store(partial_ptr + program * C + slot, tl.sum(dweight, axis=0), mask=slot < C)
    tl.store(partial_ptr + (programs + program) * C + slot, tl.sum(dbias, axis=0), mask=slot < C)


class _LayerNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        channels = x.shape[-1]
        flat, (weight, bias) = as_rows(x, channels), as_contiguous((weight, bias))
        y, tile = torch.empty_like(flat), row_tile(channels)
        layer_norm_silu_forward[(tile.programs(len(flat)),)](
            flat, weight, bias, y, len(flat), eps, channels, tile.rows, tile.block, num_warps=tile.warps
        )
        ctx.save_for_backward(flat, weight, bias)
        ctx.eps = eps
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, bias = ctx.saved_tensors
        (rows, channels), tile = x.shape, row_tile(x.shape[1], TILE, THREAD)
        iterations = -(-tile.programs(rows) // (PARTIALS if tile.block < WIDE else WIDE_PARTIALS))
        programs = -(-tile.programs(rows) // iterations)  # no more than it takes to be done at the same time
        dx, partial = torch.empty_like(x), x.new_empty((2, programs, channels), dtype=torch.float32)
        layer_norm_silu_backward[(programs,)](
            x, weight, bias, as_rows(dy, channels), dx, partial, rows, ctx.eps,
            iterations, channels, tile.rows, tile.block, num_warps=tile.warps,
        )  # fmt: skip
        dweight, dbias = sum_of_partials(partial).to(weight.dtype)
        return dx.view(dy.shape), dweight, dbias, None


def layer_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-3, *, backend: str | None = None
) -> Tensor:
    """SiLU of the layer norm of `x` over its last axis.

    Args:
        x: (..., C), float32 or bfloat16 (reference: also float64).
        weight, bias: (C,), float32; the affine part of the norm.
        eps: added to the variance; positive.
        backend: "reference", "triton" or "native"; None lets `dispatch` choose.

    Returns (..., C) in x's dtype, computed in float32. Differentiable in x, weight and bias.

    Raises ValueError if weight or bias is not (C,) or on another device, or eps is not positive;
    `dispatch.BackendError` if the backend cannot run here.
    """
    check_axes("layer_norm_silu", "x", x, "...", "C")
    check_shape("layer_norm_silu", "weight", weight, x.shape[-1:])
    check_shape("layer_norm_silu", "bias", bias, x.shape[-1:])
    check_eps("layer_norm_silu", eps)
    check_device("layer_norm_silu", x=x, weight=weight, bias=bias)
    return dispatch.resolve("layer_norm_silu", backend, x)(x, weight, bias, eps)


dispatch.register(
    "layer_norm_silu",
    reference=layer_norm_silu_reference,
    triton=_LayerNormSiLU.apply,
    native=layer_norm_silu_native,
)
