"""The backward pass of layer_norm_gru for rows too wide for registers, and what it shares with that for others.

Axes: D deter; a row of gates has 3D numbers, reset, candidate and update one after another.
"""

from ._triton import tl, triton
from .tiles import tanh_and_slope


@triton.jit
def load_affine(ptr, column, D: tl.constexpr):
    """The numbers of the three gates at a column, in float32: of weight or bias, or of a row of gates."""
    r = tl.load(ptr + column, mask=column < D, other=0.0).to(tl.float32)
    c = tl.load(ptr + D + column, mask=column < D, other=0.0).to(tl.float32)
    u = tl.load(ptr + 2 * D + column, mask=column < D, other=0.0).to(tl.float32)
    return r, c, u


@triton.jit
def slopes(r, c, u, deter, dnext):
    """The gradients of the gates after the norm and its affine part, and of the state before."""
    reset = tl.sigmoid(r)
    cand, slope = tanh_and_slope(reset * c)
    update = tl.sigmoid(u - 1.0)
    dinner = dnext * update * slope
    dr = dinner * c * reset * (1.0 - reset)
    du = dnext * (cand - deter) * update * (1.0 - update)
    return dr, dinner * reset, du, dnext * (1.0 - update)


@triton.jit
def _chunk_slopes(
    gates_ptr, deter_ptr, weight_ptr, bias_ptr, dnext_ptr, row, column, mean, rstd, D: tl.constexpr
):
    """A chunk's normed gates, the gradients after the affine part, that of the state before, and the weight."""
    inside = column < D
    deter = tl.load(deter_ptr + row * D + column, mask=inside, other=0.0).to(tl.float32)
    dnext = tl.load(dnext_ptr + row * D + column, mask=inside, other=0.0).to(tl.float32)
    r, c, u = load_affine(gates_ptr + row * (3 * D), column, D)
    r, c, u = (r - mean) * rstd, (c - mean) * rstd, (u - mean) * rstd
    wr, wc, wu = load_affine(weight_ptr, column, D)
    br, bc, bu = load_affine(bias_ptr, column, D)
    dr, dc, du, ddeter = slopes(r * wr + br, c * wc + bc, u * wu + bu, deter, dnext)
    return r, c, u, dr, dc, du, ddeter, wr, wc, wu


@triton.jit
def _add_affine(ptr, column, r, c, u, D: tl.constexpr):
    """Adds to memory that no other program touches; the sums over a row keep this program's threads in step."""
    inside = column < D
    tl.store(ptr + column, tl.load(ptr + column, mask=inside, other=0.0) + r, mask=inside)
    tl.store(ptr + D + column, tl.load(ptr + D + column, mask=inside, other=0.0) + c, mask=inside)
    tl.store(ptr + 2 * D + column, tl.load(ptr + 2 * D + column, mask=inside, other=0.0) + u, mask=inside)


@triton.jit
def layer_norm_gru_wide_backward(
    gates_ptr,
    deter_ptr,
    weight_ptr,
    bias_ptr,
    dnext_ptr,
    dgates_ptr,
    ddeter_ptr,
    partial_ptr,  # (2, programs, 3D) float32 zeros: each program's share of dweight and dbias
    rows,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,  # columns of a chunk
):
    """A row at a time, in four passes over its chunks, which after the first come from the L1 cache."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    slot = tl.arange(0, BLOCK)
    dweight_ptr = partial_ptr + program.to(tl.int64) * (3 * D)
    dbias_ptr = dweight_ptr + programs.to(tl.int64) * (3 * D)
    element = dgates_ptr.dtype.element_ty
    for at in range(program, rows, programs):
        row = tl.cast(at, tl.int64)
        total = 0.0
        for start in range(0, D, BLOCK):
            r, c, u = load_affine(gates_ptr + row * (3 * D), start + slot, D)
            total += tl.sum(r + c + u, axis=0)
        mean = total * (1.0 / (3 * D))
        missed, squares = 0.0, 0.0
        for start in range(0, D, BLOCK):
            column = start + slot
            r, c, u = load_affine(gates_ptr + row * (3 * D), column, D)
            r, c, u = r - mean, c - mean, u - mean
            missed += tl.sum(tl.where(column < D, r + c + u, 0.0), axis=0)
            squares += tl.sum(tl.where(column < D, r * r + c * c + u * u, 0.0), axis=0)
        missed *= 1.0 / (3 * D)  # by the mean, in rounding; see `tiles.normalise`
        rstd = tl.rsqrt(tl.maximum(squares * (1.0 / (3 * D)) - missed * missed, 0.0) + eps)
        mean += missed
        plain, along = 0.0, 0.0
        for start in range(0, D, BLOCK):
            column = start + slot
            r, c, u, dr, dc, du, ddeter, wr, wc, wu = _chunk_slopes(
                gates_ptr, deter_ptr, weight_ptr, bias_ptr, dnext_ptr, row, column, mean, rstd, D
            )
            out = ddeter.to(ddeter_ptr.dtype.element_ty)
            tl.store(ddeter_ptr + row * D + column, out, mask=column < D)
            _add_affine(dweight_ptr, column, dr * r, dc * c, du * u, D)
            _add_affine(dbias_ptr, column, dr, dc, du, D)
            plain += tl.sum(dr * wr + dc * wc + du * wu, axis=0)
            along += tl.sum(dr * wr * r + dc * wc * c + du * wu * u, axis=0)
        plain *= 1.0 / (3 * D)
        along *= 1.0 / (3 * D)
        for start in range(0, D, BLOCK):
            column = start + slot
            r, c, u, dr, dc, du, ddeter, wr, wc, wu = _chunk_slopes(
                gates_ptr, deter_ptr, weight_ptr, bias_ptr, dnext_ptr, row, column, mean, rstd, D
            )
            place = dgates_ptr + row * (3 * D) + column
            inside = column < D
            tl.store(place, (rstd * (dr * wr - plain - r * along)).to(element), mask=inside)
            tl.store(place + D, (rstd * (dc * wc - plain - c * along)).to(element), mask=inside)
            tl.store(place + 2 * D, (rstd * (du * wu - plain - u * along)).to(element), mask=inside)
