"""The recurrent cell after its GEMM: one LayerNorm over all three gates, then the next deterministic state.

    reset, cand, update = split(LN(gates))
    cand   = tanh(sigmoid(reset) * cand)
    update = sigmoid(update - 1)
    next   = update * cand + (1 - update) * deter

Axes: N rows (all leading axes), D deter.

Source: DreamerV3 `nets.py` GRU with norm; the reset gate multiplies the candidate after the GEMM, and the
update gate is biased by -1, so that a fresh cell keeps 73% of its state.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from ._triton import tl, triton
from .autograd import once_differentiable
from .layer_norm_gru_native import layer_norm_gru_native
from .layer_norm_gru_wide import layer_norm_gru_wide_backward, load_affine, slopes
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
from .tiles import PARTIALS, as_rows, row_tile, sum_of_partials, tanh

# Numbers of one gate in a tile and for each thread. Backward holds 6 accumulators and some 15 operands: 8 a
# thread take 255 registers (2 programs a multiprocessor at D = 512), 4 a thread 128 (4 programs).
TILE, THREAD = 512, 4
# A wider row would take 8 a thread and spill: its backward pass goes over it in chunks. What 132 programs (one a
# multiprocessor of an H100) add up, 13 MB at D = 4,096, stays in the L2 cache.
WIDEST, CHUNK, WIDE_PARTIALS = 2048, 2048, 132


def layer_norm_gru_reference(
    gates: Tensor,
    deter: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-3,
    out: Tensor | None = None,
    rounded: Tensor | None = None,
) -> Tensor:
    """The definition, in plain PyTorch; see `layer_norm_gru`."""
    dtype = compute_dtype(gates)
    normed = F.layer_norm(gates.to(dtype), gates.shape[-1:], weight.to(dtype), bias.to(dtype), eps)
    reset, cand, update = normed.chunk(3, dim=-1)  # (..., 3D) -> 3 x (..., D)
    cand = torch.tanh(torch.sigmoid(reset) * cand)
    update = torch.sigmoid(update - 1)
    after = torch.lerp(deter.to(dtype), cand, update).to(deter.dtype)
    if rounded is not None:
        rounded.copy_(after)
    return after if out is None else out.copy_(after)


@triton.jit
def _load_gates(gates_ptr, row, column, inside, D: tl.constexpr, eps):
    """The three gates of a tile, layer-normed over all 3D without the affine part, and rstd (ROWS, 1)."""
    at = row * (3 * D) + column
    r = tl.load(gates_ptr + at, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(gates_ptr + at + D, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(gates_ptr + at + 2 * D, mask=inside, other=0.0).to(tl.float32)
    mean = (tl.sum(r + c + u, axis=1) * (1.0 / (3 * D)))[:, None]
    r = tl.where(column < D, r - mean, 0.0)
    c = tl.where(column < D, c - mean, 0.0)
    u = tl.where(column < D, u - mean, 0.0)
    missed = tl.sum(r + c + u, axis=1) * (1.0 / (3 * D))  # by the mean, in rounding; see `tiles.normalise`
    variance = tl.sum(r * r + c * c + u * u, axis=1) * (1.0 / (3 * D)) - missed * missed
    rstd, missed = tl.rsqrt(tl.maximum(variance, 0.0) + eps)[:, None], missed[:, None]
    return (r - missed) * rstd, (c - missed) * rstd, (u - missed) * rstd, rstd


@triton.jit
def layer_norm_gru_forward(
    gates_ptr,
    deter_ptr,
    weight_ptr,
    bias_ptr,
    next_ptr,
    rounded_ptr,
    rows,
    eps,
    ROUND: tl.constexpr,  # whether to write the result a second time, rounded
    STRIDE: tl.constexpr,  # from a row of the result to the next
    ROUNDED_STRIDE: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    column = tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    inside = (row < rows) & (column < D)
    wr, wc, wu = load_affine(weight_ptr, column, D)
    br, bc, bu = load_affine(bias_ptr, column, D)
    deter = tl.load(deter_ptr + row * D + column, mask=inside, other=0.0).to(tl.float32)
    r, c, u, _ = _load_gates(gates_ptr, row, column, inside, D, eps)
    cand = tanh(tl.sigmoid(r * wr + br) * (c * wc + bc))
    update = tl.sigmoid(u * wu + bu - 1.0)
    out = (deter + update * (cand - deter)).to(next_ptr.dtype.element_ty)
    tl.store(next_ptr + row * STRIDE + column, out, mask=inside)
    if ROUND:
        place = rounded_ptr + row * ROUNDED_STRIDE + column
        tl.store(place, out.to(rounded_ptr.dtype.element_ty), mask=inside)


@triton.jit
def layer_norm_gru_backward(
    gates_ptr,
    deter_ptr,
    weight_ptr,
    bias_ptr,
    dnext_ptr,
    dgates_ptr,
    ddeter_ptr,
    partial_ptr,  # (2, programs, 3D) float32: each program's share of dweight and dbias
    rows,
    eps,
    ITERATIONS: tl.constexpr,  # tiles a program works through, `programs` apart
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    column = tl.arange(0, BLOCK)[None, :]
    dwr = tl.zeros((ROWS, BLOCK), tl.float32)
    dwc = tl.zeros((ROWS, BLOCK), tl.float32)
    dwu = tl.zeros((ROWS, BLOCK), tl.float32)
    dbr = tl.zeros((ROWS, BLOCK), tl.float32)
    dbc = tl.zeros((ROWS, BLOCK), tl.float32)
    dbu = tl.zeros((ROWS, BLOCK), tl.float32)
    for iteration in range(ITERATIONS):
        row = (iteration * programs + program) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < D)
        deter = tl.load(deter_ptr + row * D + column, mask=inside, other=0.0).to(tl.float32)
        dnext = tl.load(dnext_ptr + row * D + column, mask=inside, other=0.0).to(tl.float32)
        r, c, u, rstd = _load_gates(gates_ptr, row, column, inside, D, eps)
        # loaded for each tile (from the L1 cache): held in registers, they would make a wide row spill
        wr, wc, wu = load_affine(weight_ptr, column, D)
        br, bc, bu = load_affine(bias_ptr, column, D)
        # through the nonlinearities to the normed gates ...
        dr, dc, du, ddeter = slopes(r * wr + br, c * wc + bc, u * wu + bu, deter, dnext)
        tl.store(ddeter_ptr + row * D + column, ddeter.to(ddeter_ptr.dtype.element_ty), mask=inside)
        dwr += dr * r
        dwc += dc * c
        dwu += du * u
        dbr += dr
        dbc += dc
        dbu += du
        # ... and through the norm, whose two means run over all three gates
        dr *= wr
        dc *= wc
        du *= wu
        mean = (tl.sum(dr + dc + du, axis=1) * (1.0 / (3 * D)))[:, None]
        along = (tl.sum(dr * r + dc * c + du * u, axis=1) * (1.0 / (3 * D)))[:, None]
        at = row * (3 * D) + column
        element = dgates_ptr.dtype.element_ty
        tl.store(dgates_ptr + at, (rstd * (dr - mean - r * along)).to(element), mask=inside)
        tl.store(dgates_ptr + at + D, (rstd * (dc - mean - c * along)).to(element), mask=inside)
        tl.store(dgates_ptr + at + 2 * D, (rstd * (du - mean - u * along)).to(element), mask=inside)
    slot = tl.arange(0, BLOCK)
    dweight_ptr = partial_ptr + program * (3 * D) + slot
    dbias_ptr = dweight_ptr + programs * (3 * D)
    tl.store(dweight_ptr, tl.sum(dwr, axis=0), mask=slot < D)
    tl.store(dweight_ptr + D, tl.sum(dwc, axis=0), mask=slot < D)
    tl.store(dweight_ptr + 2 * D, tl.sum(dwu, axis=0), mask=slot < D)
    tl.store(dbias_ptr, tl.sum(dbr, axis=0), mask=slot < D)
    tl.store(dbias_ptr + D, tl.sum(dbc, axis=0), mask=slot < D)
    tl.store(dbias_ptr + 2 * D, tl.sum(dbu, axis=0), mask=slot < D)


def _forward(
    gates: Tensor,
    deter: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    rounded: Tensor | None,
    eps: float,
) -> None:
    """gates (N, 3D) and deter (N, D), contiguous, into out and rounded."""
    (rows, D), tile = deter.shape, row_tile(deter.shape[1], TILE, THREAD)
    second = out if rounded is None else rounded
    layer_norm_gru_forward[(tile.programs(rows),)](
        gates, deter, weight, bias, out, second, rows, eps, rounded is not None, out.stride(0), second.stride(0),
        D, tile.rows, tile.block, num_warps=tile.warps,
    )  # fmt: skip


class _LayerNormGRU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gates: Tensor, deter: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        D = deter.shape[-1]
        gates, state = as_rows(gates, 3 * D), as_rows(deter, D)
        weight, bias = as_contiguous((weight, bias))
        out = torch.empty_like(state)
        _forward(gates, state, weight, bias, out, None, eps)
        ctx.save_for_backward(gates, state, weight, bias)
        ctx.eps = eps
        return out.view(deter.shape)

    @staticmethod
    @once_differentiable("layer_norm_gru")
    def backward(ctx, dnext: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        gates, deter, weight, bias = ctx.saved_tensors
        (rows, D), tile = deter.shape, row_tile(deter.shape[1], TILE, THREAD)
        wide = tile.block > WIDEST
        programs = min(WIDE_PARTIALS if wide else PARTIALS, tile.programs(rows))
        dgates, ddeter = torch.empty_like(gates), torch.empty_like(deter)
        tensors = gates, deter, weight, bias, as_rows(dnext, D), dgates, ddeter
        if wide:
            partial = gates.new_zeros((2, programs, 3 * D), dtype=torch.float32)
            layer_norm_gru_wide_backward[(programs,)](
                *tensors, partial, rows, ctx.eps, D, CHUNK, num_warps=max(1, CHUNK // (32 * THREAD))
            )
        else:
            partial = gates.new_empty((2, programs, 3 * D), dtype=torch.float32)
            iterations = -(-tile.programs(rows) // programs)
            layer_norm_gru_backward[(programs,)](
                *tensors, partial, rows, ctx.eps, iterations, D, tile.rows, tile.block, num_warps=tile.warps
            )
        dweight, dbias = sum_of_partials(partial).to(weight.dtype)
        return dgates.view(*dnext.shape[:-1], 3 * D), ddeter.view(dnext.shape), dweight, dbias, None


def _layer_norm_gru_triton(
    gates: Tensor,
    deter: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out: Tensor | None = None,
    rounded: Tensor | None = None,
) -> Tensor:
    if out is None and rounded is None:
        return _LayerNormGRU.apply(gates, deter, weight, bias, eps)
    D = deter.shape[-1]
    out = torch.empty_like(deter, memory_format=torch.contiguous_format) if out is None else out
    second = None if rounded is None else rows_of(rounded)
    flat, state, (weight, bias) = (
        as_rows(gates.detach(), 3 * D),
        as_rows(deter.detach(), D),
        as_contiguous((weight, bias)),
    )
    _forward(flat, state, weight, bias, rows_of(out), second, eps)
    return out


def layer_norm_gru(
    gates: Tensor,
    deter: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-3,
    *,
    out: Tensor | None = None,
    rounded: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The next deterministic state from the GRU's raw gates and the state before.

    Args:
        gates: (..., 3D) `W_gru [deter, x]` in the order reset, candidate, update; float32 or bfloat16.
        deter: (..., D) the state before; float32 or bfloat16, also where gates has another dtype.
        weight, bias: (3D,) float32, of the one LayerNorm over all gates.
        eps: added to the variance; positive.
        out: optional tensor of deter's shape and dtype for the result, its rows any distance apart; only where no
            gradient is wanted.
        rounded: optional bfloat16 tensor of deter's shape that receives the result as well, under the same conditions:
            what the next matrix product reads.
        backend: "reference", "triton" or "native"; None lets `dispatch` choose.

    Returns (..., D) in deter's dtype, computed in float32. Differentiable in gates, deter, weight and bias.

    Raises ValueError on shapes or devices that do not fit or an eps that is not positive; as `numerics.check_out`;
    `dispatch.BackendError` if the backend cannot run here.
    """
    check_axes("layer_norm_gru", "deter", deter, "...", "D")
    check_shape("layer_norm_gru", "gates", gates, (*deter.shape[:-1], 3 * deter.shape[-1]))
    check_shape("layer_norm_gru", "weight", weight, gates.shape[-1:])
    check_shape("layer_norm_gru", "bias", bias, gates.shape[-1:])
    check_eps("layer_norm_gru", eps)
    inputs = gates, deter, weight, bias
    check_out("layer_norm_gru", "out", out, deter.shape, deter.dtype, *inputs)
    check_out("layer_norm_gru", "rounded", rounded, deter.shape, torch.bfloat16, *inputs)
    check_device(
        "layer_norm_gru", gates=gates, deter=deter, weight=weight, bias=bias, out=out, rounded=rounded
    )
    deciding = gates if deter.dtype in dispatch.FUSED_DTYPES else deter
    return dispatch.resolve("layer_norm_gru", backend, deciding)(*inputs, eps, out, rounded)


dispatch.register(
    "layer_norm_gru",
    reference=layer_norm_gru_reference,
    triton=_layer_norm_gru_triton,
    native=layer_norm_gru_native,
)
