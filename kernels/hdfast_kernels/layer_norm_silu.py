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
from .numerics import (
    as_contiguous,
    check_axes,
    check_device,
    check_eps,
    check_out,
    check_shape,
    compute_dtype,
    rows_of,
)
from .tiles import (
    Tile,
    as_rows,
    normalise,
    row_sums,
    row_tile,
    sigmoid,
    sum_of_partials,
    tile_of_warps,
)

# Backward: numbers in a tile, and for each thread: one 16-byte load of bfloat16 for each operand, with the next tile's
# under way meanwhile.
TILE, THREAD = 1024, 8
# An H100's multiprocessors, and the registers of each.
MULTIPROCESSORS, REGISTERS = 132, 65536
# Registers that a thread of backward is given for rows of more than 512 columns, and of a warp's row of bfloat16. Left
# to itself Triton 3.8 takes 168 for the latter. On sm_100 it takes 8 more than these, and would spill.
WIDE, WARP_ROW = 80, 128
# From so many channels on, backward reads the moments that forward kept: 16 bytes a row, of at least 640 in all.
KEPT_FROM = 64


def backward_tile(channels: int, itemsize: int) -> tuple[Tile, int]:
    """The tile of backward for rows of so many channels, of so many bytes each, and how many programs run at once.

    Each of those has a row of partial sums. By the registers of a thread: up to 80 are taken by bfloat16 and by rows
    without kept moments, up to 96 by float32; a warp's row of 512 columns, 16 numbers a thread, takes 128 and 168.
    """
    tile, low = tile_of_warps(channels, itemsize) or row_tile(channels, TILE, THREAD), itemsize == 2
    if tile.block > 512:
        registers = WIDE
    elif _is_row_of_a_warp(tile):
        registers = WARP_ROW if low else 168
    else:
        registers = 80 if low or channels < KEPT_FROM else 96
    return tile, MULTIPROCESSORS * (REGISTERS // (registers * 32 * tile.warps))


def _is_row_of_a_warp(tile: Tile) -> bool:
    """Whether a thread has 16 numbers."""
    return tile.rows * tile.block == 16 * 32 * tile.warps


def _most_registers(tile: Tile, itemsize: int) -> int | None:
    """What a thread of backward may take; None for what it needs."""
    if tile.block > 512:
        return WIDE
    if itemsize != 2 or not _is_row_of_a_warp(tile) or dispatch.triton_interpreted():
        return None
    return WARP_ROW if triton.runtime.driver.active.get_current_target().arch < 100 else None


def layer_norm_silu_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-3, out: Tensor | None = None
) -> Tensor:
    """The definition, in plain PyTorch; see `layer_norm_silu`."""
    dtype = compute_dtype(x)
    normed = F.layer_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), bias.to(dtype), eps)
    y = F.silu(normed).to(x.dtype)
    return y if out is None else out.copy_(y)


@triton.jit
def _tile(ROWS: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr):
    """Rows (PARTS * ROWS, 1) and columns of a tile; part p of row r is its row p * ROWS + r."""
    lane = tl.arange(0, LANES)[None, :]
    if PARTS == 1:
        return tl.arange(0, ROWS)[:, None], lane
    else:
        row = tl.arange(0, PARTS * ROWS)[:, None]
        return row % ROWS, row // ROWS * LANES + lane


@triton.jit
def layer_norm_silu_forward(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    moments_ptr,  # (2, rows) float32: mean and rstd of each row
    rows,
    eps,
    KEEP: tl.constexpr,  # whether to write the moments
    STRIDE: tl.constexpr,  # from a row of y to the next
    C: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
):
    row, column = _tile(ROWS, PARTS, LANES)
    row += tl.program_id(0).to(tl.int64) * ROWS
    inside = (row < rows) & (column < C)
    weight = tl.load(weight_ptr + column, mask=column < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=column < C, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * C + column, mask=inside, other=0.0).to(tl.float32)
    normed, mean, rstd = normalise(x, column < C, C, eps, PARTS)
    z = normed * weight + bias
    tl.store(y_ptr + row * STRIDE + column, (z * sigmoid(z)).to(y_ptr.dtype.element_ty), mask=inside)
    if KEEP:
        tl.store(moments_ptr + row, mean, mask=row < rows)
        tl.store(moments_ptr + rows + row, rstd, mask=row < rows)


@triton.jit
def layer_norm_silu_backward(
    x_ptr,
    weight_ptr,
    bias_ptr,
    dy_ptr,
    moments_ptr,  # of the forward pass
    dx_ptr,
    partial_ptr,  # (2, programs, C) float32: each program's share of dweight and dbias
    rows,
    eps,
    ITERATIONS: tl.constexpr,  # tiles a program works through, `programs` apart
    KEPT: tl.constexpr,  # whether there are moments to read
    C: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
):
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    row, column = _tile(ROWS, PARTS, LANES)
    weight = tl.load(weight_ptr + column, mask=column < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=column < C, other=0.0).to(tl.float32)
    dweight = tl.zeros((PARTS * ROWS, LANES), tl.float32)
    dbias = tl.zeros((PARTS * ROWS, LANES), tl.float32)
    row += program * ROWS
    known = row < rows
    next_x = tl.load(x_ptr + row * C + column, mask=known & (column < C), other=0.0)
    next_dy = tl.load(dy_ptr + row * C + column, mask=known & (column < C), other=0.0)
    if KEPT:
        next_mean = tl.load(moments_ptr + row, mask=known, other=0.0)
        next_rstd = tl.load(moments_ptr + rows + row, mask=known, other=0.0)
    for iteration in range(ITERATIONS):
        x, dy, at, inside = (
            next_x.to(tl.float32),
            next_dy.to(tl.float32),
            row * C + column,
            known & (column < C),
        )
        if KEPT:
            mean, rstd = next_mean, next_rstd
            normed = (x - mean) * rstd
        else:
            normed, mean, rstd = normalise(x, column < C, C, eps, PARTS)
        # the next tile is on its way while this one is worked on; after the last one there is none
        row += programs * ROWS
        known = (row < rows) & (iteration + 1 < ITERATIONS)
        next_x = tl.load(x_ptr + row * C + column, mask=known & (column < C), other=0.0)
        next_dy = tl.load(dy_ptr + row * C + column, mask=known & (column < C), other=0.0)
        if KEPT:
            next_mean = tl.load(moments_ptr + row, mask=known, other=0.0)
            next_rstd = tl.load(moments_ptr + rows + row, mask=known, other=0.0)
        z = normed * weight + bias
        gate = sigmoid(z)
        dz = dy * gate * (1.0 + z * (1.0 - gate))
        dweight += dz * normed
        dbias += dz
        dnormed = dz * weight
        along = row_sums(dnormed * normed, PARTS) * (1.0 / C)
        dx = rstd * (dnormed - row_sums(dnormed, PARTS) * (1.0 / C) - normed * along)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    slot = tl.arange(0, PARTS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    dweight = tl.sum(tl.reshape(dweight, (PARTS, ROWS, LANES)), axis=1)
    dbias = tl.sum(tl.reshape(dbias, (PARTS, ROWS, LANES)), axis=1)
    tl.store(partial_ptr + program * C + slot, dweight, mask=slot < C)
    tl.store(partial_ptr + (programs + program) * C + slot, dbias, mask=slot < C)


def _forward(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, kept: Tensor, eps: float) -> None:
    """x (N, C), contiguous, into y; kept (2, N) for the moments, or (2, 0)."""
    rows, channels = x.shape
    tile = tile_of_warps(channels, x.element_size()) or row_tile(channels)
    layer_norm_silu_forward[(tile.programs(rows),)](
        x, weight, bias, y, kept, rows, eps, bool(kept.numel()), y.stride(0),
        channels, tile.rows, tile.parts, tile.lanes, num_warps=tile.warps,
    )  # fmt: skip


class _LayerNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        channels = x.shape[-1]
        flat, (weight, bias) = as_rows(x, channels), as_contiguous((weight, bias))
        keep, y = channels >= KEPT_FROM and any(ctx.needs_input_grad), torch.empty_like(flat)
        kept = flat.new_empty((2, len(flat) if keep else 0), dtype=torch.float32)
        _forward(flat, weight, bias, y, kept, eps)
        ctx.save_for_backward(flat, weight, bias, kept)
        ctx.eps = eps
        return y.view(x.shape)

    @staticmethod
    @once_differentiable("layer_norm_silu")
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, bias, kept = ctx.saved_tensors
        rows, channels = x.shape
        tile, at_once = backward_tile(channels, x.element_size())
        iterations = -(-tile.programs(rows) // at_once)
        programs = -(-tile.programs(rows) // iterations)  # no more than it takes to be done at the same time
        dx, partial = torch.empty_like(x), x.new_empty((2, programs, channels), dtype=torch.float32)
        layer_norm_silu_backward[(programs,)](
            x, weight, bias, as_rows(dy, channels), kept, dx, partial, rows, ctx.eps,
            iterations, channels >= KEPT_FROM, channels, tile.rows, tile.parts, tile.lanes,
            num_warps=tile.warps, maxnreg=_most_registers(tile, x.element_size()),
        )  # fmt: skip
        dweight, dbias = sum_of_partials(partial).to(weight.dtype)
        return dx.view(dy.shape), dweight, dbias, None


def _layer_norm_silu_triton(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor | None = None
) -> Tensor:
    if out is None:
        return _LayerNormSiLU.apply(x, weight, bias, eps)
    flat, (weight, bias) = as_rows(x.detach(), x.shape[-1]), as_contiguous((weight, bias))
    _forward(flat, weight, bias, rows_of(out), flat.new_empty((2, 0), dtype=torch.float32), eps)
    return out


def layer_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-3,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """SiLU of the layer norm of `x` over its last axis.

    Args:
        x: (..., C), float32 or bfloat16 (reference: also float64).
        weight, bias: (C,), float32; the affine part of the norm.
        eps: added to the variance; positive.
        out: optional tensor of x's shape and dtype for the result, its rows any distance apart, such as some of the
            columns of a matrix; only where no gradient is wanted.
        backend: "reference", "triton" or "native"; None lets `dispatch` choose.

    Returns (..., C) in x's dtype, computed in float32. Differentiable in x, weight and bias.

    Raises ValueError if weight or bias is not (C,) or on another device, or eps is not positive; as
    `numerics.check_out`; `dispatch.BackendError` if the backend cannot run here.
    """
    check_axes("layer_norm_silu", "x", x, "...", "C")
    check_shape("layer_norm_silu", "weight", weight, x.shape[-1:])
    check_shape("layer_norm_silu", "bias", bias, x.shape[-1:])
    check_eps("layer_norm_silu", eps)
    check_out("layer_norm_silu", "out", out, x.shape, x.dtype, x, weight, bias)
    check_device("layer_norm_silu", x=x, weight=weight, bias=bias, out=out)
    return dispatch.resolve("layer_norm_silu", backend, x)(x, weight, bias, eps, out)


dispatch.register(
    "layer_norm_silu",
    reference=layer_norm_silu_reference,
    triton=_layer_norm_silu_triton,
    native=layer_norm_silu_native,
)
