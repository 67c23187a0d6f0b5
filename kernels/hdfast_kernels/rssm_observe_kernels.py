"""The Triton kernels of rssm_observe: each step is five stages forward and five backward.

A stage is what can be done between two exchanges of the whole state: a program owns columns of deter, units of
the hidden layers and groups of the latent, and needs all columns of what the stage before computed. A kernel runs
either one stage of one step, or all stages of STEPS steps, its programs meeting at a barrier (STAGE = -1); the
arithmetic is the same.

Only what is recurrent is in here. Forward leaves the inputs of the layer norms, backward the gradients of the
activations and the gates; rssm_observe_triton derives the rest from them.

Axes: T time, B batch, D deter, U units, S groups, K classes. A tile of an operand is ROWS sequences by SPLIT * DEPTH
columns: SPLIT parts of a sum go to different warps. A tile of results is ROWS by BLOCK. Matrices are read along
their rows. Loads with ".cg" come from the second-level cache, since other programs wrote what they read.
"""

from ._triton import tl, triton
from .tiles import reciprocal, tanh, tanh_and_slope

# One argument a line would make the argument lists the bulk of this file.
# fmt: off


@triton.jit
def grid_barrier(counter, target):
    """Wait until every program has come here `target / programs` times; what they wrote, ".cg" loads then see.

    The release makes it visible in the second-level cache. There is no acquire, which would drop the matrices from the
    first-level cache: loads behind the last debug_barrier are issued after the count was seen, and ".cg" ones pass by
    the first level. One thread a program asks, by a compare-and-swap that never swaps: a load would be 256 at once, and
    an atomic_add of zero becomes a load that Triton 3.6 takes for one without effects, and drops.
    """
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")
    while tl.atomic_cas(counter, -1, -1, sem="relaxed", scope="gpu") < target:
        pass
    tl.debug_barrier()


@triton.jit
def columns_of(chunk, SPLIT: tl.constexpr, DEPTH: tl.constexpr):
    """The columns of one chunk of an operand, (SPLIT, DEPTH)."""
    return (chunk * SPLIT + tl.arange(0, SPLIT)[:, None]) * DEPTH + tl.arange(0, DEPTH)[None, :]


@triton.jit
def operand(array, row, inside, chunk, L: tl.constexpr, SPLIT: tl.constexpr, DEPTH: tl.constexpr):
    """Columns of rows (ROWS,) of array (.., L), as (SPLIT, ROWS, DEPTH)."""
    column = columns_of(chunk, SPLIT, DEPTH)[:, None, :]
    mask = inside[None, :, None] & (column < L)
    tile = tl.load(array + row[None, :, None] * L + column, mask=mask, other=0.0, cache_modifier=".cg")
    return tile.to(tl.float32)


@triton.jit
def affine(vector, chunk, L: tl.constexpr, SPLIT: tl.constexpr, DEPTH: tl.constexpr):
    """A vector (L,) as (SPLIT, 1, DEPTH)."""
    column = columns_of(chunk, SPLIT, DEPTH)[:, None, :]
    return tl.load(vector + column, mask=column < L, other=0.0)


@triton.jit
def multiply(a, matrix, out, chunk, L: tl.constexpr, STRIDE: tl.constexpr, N, total, SPLIT: tl.constexpr,
             DEPTH: tl.constexpr):
    """total + a @ matrix[out].T for one chunk: a (SPLIT, ROWS, DEPTH), matrix (N, STRIDE), out (BLOCK,)."""
    column = columns_of(chunk, SPLIT, DEPTH)[:, :, None]
    mask = (out[None, None, :] < N) & (column < L)
    weight = tl.load(matrix + out[None, None, :] * STRIDE + column, mask=mask, other=0.0)
    return tl.dot(a.to(matrix.dtype.element_ty), weight, total, input_precision="ieee")


@triton.jit
def row_moments(array, row, inside, eps, L: tl.constexpr, CHUNKS: tl.constexpr, SPLIT: tl.constexpr,
                DEPTH: tl.constexpr):
    """mean and 1 / sqrt(variance + eps) of rows of array (.., L), chunks merged as Chan et al. do."""
    mean = row * 0.0
    squares = row * 0.0
    for chunk in range(CHUNKS):
        x = operand(array, row, inside, chunk, L, SPLIT, DEPTH)
        column = columns_of(chunk, SPLIT, DEPTH)[:, None, :]
        before = chunk * SPLIT * DEPTH
        count = tl.minimum(L - before, SPLIT * DEPTH)
        here = tl.sum(tl.sum(x, 2), 0) / count
        x = tl.where(column < L, x - here[None, :, None], 0.0)
        step = here - mean
        mean += step * (count / (before + count))
        squares += tl.sum(tl.sum(x * x, 2), 0) + step * step * (before * count / (before + count))
    return mean, tl.rsqrt(squares * (1.0 / L) + eps)


@triton.jit
def norm_silu(x, mean, rstd, weight, bias):
    z = (x - mean[None, :, None]) * rstd[None, :, None] * weight + bias
    return z * tl.sigmoid(z)


@triton.jit
def norm_silu_slope(x, grad, mean, rstd, weight, bias):
    """The gradient of the normalised x, and the normalised x."""
    normed = (x - mean[None, :, None]) * rstd[None, :, None]
    z = normed * weight + bias
    gate = tl.sigmoid(z)
    return grad * gate * (1.0 + z * (1.0 - gate)) * weight, normed


@triton.jit
def merge(partial, t, row, inside, B, eps, D: tl.constexpr, PROGRAMS: tl.constexpr, SLOTS: tl.constexpr,
          BLOCK: tl.constexpr):
    """mean and 1 / sqrt(variance + eps) over 3D gates from every program's share (Chan et al.)."""
    other = tl.arange(0, SLOTS)
    count = 3.0 * tl.maximum(tl.minimum(D - other * BLOCK, BLOCK), 0)[:, None]
    slot = ((t * PROGRAMS + other[:, None]) * B + row[None, :]) * 2
    mask = (other < PROGRAMS)[:, None] & inside[None, :]
    means = tl.load(partial + slot, mask=mask, other=0.0, cache_modifier=".cg")
    squares = tl.load(partial + slot + 1, mask=mask, other=0.0, cache_modifier=".cg")
    mean = tl.sum(means * count, 0) * (1.0 / (3 * D))
    away = means - mean[None, :]
    return mean, tl.rsqrt(tl.sum(squares + count * away * away, 0) * (1.0 / (3 * D)) + eps)


@triton.jit
def own_gates(gates_sum, at, mask, own, mean, rstd, D: tl.constexpr):
    """A program's columns of the normalised gates, each (ROWS, BLOCK)."""
    place = gates_sum + at[:, None] * (3 * D) + own[None, :]
    r = tl.load(place, mask=mask, other=0.0, cache_modifier=".cg")
    c = tl.load(place + D, mask=mask, other=0.0, cache_modifier=".cg")
    u = tl.load(place + 2 * D, mask=mask, other=0.0, cache_modifier=".cg")
    mean, rstd = mean[:, None], rstd[:, None]
    return (r - mean) * rstd, (c - mean) * rstd, (u - mean) * rstd


@triton.jit
def scale_of(vector, own, D: tl.constexpr):
    return tl.load(vector + own, mask=own < D, other=0.0)[None, :]


@triton.jit
def activate(nr, nc, nu, weight, bias, own, D: tl.constexpr):
    """reset, the candidate before reset and tanh, update."""
    r = tl.sigmoid(nr * scale_of(weight, own, D) + scale_of(bias, own, D))
    z = nc * scale_of(weight + D, own, D) + scale_of(bias + D, own, D)
    u = tl.sigmoid(nu * scale_of(weight + 2 * D, own, D) + scale_of(bias + 2 * D, own, D) - 1.0)
    return r, z, u


@triton.jit
def before_of(deter, initial_deter, at, follows, own, B, D: tl.constexpr):
    """A program's columns of the deter that a step starts from, (ROWS, BLOCK)."""
    mask = follows[:, None] & (own < D)[None, :]
    h = tl.load(deter + (at - B)[:, None] * D + own[None, :], mask=mask, other=0.0, cache_modifier=".cg")
    return tl.where(follows[:, None], h, scale_of(initial_deter, own, D))


@triton.jit
def gate_slopes(gates_sum, deter, initial_deter, weight, bias, moments, grad, at, inside, follows, own, TB, B,
                D: tl.constexpr):
    """Gradients of a program's normalised gates from that of deter, and the normalised gates themselves."""
    mask = inside[:, None] & (own < D)[None, :]
    mean = tl.load(moments + (TB + at) * 2, mask=inside, other=0.0)
    rstd = tl.load(moments + (TB + at) * 2 + 1, mask=inside, other=0.0)
    nr, nc, nu = own_gates(gates_sum, at, mask, own, mean, rstd, D)
    r, z, u = activate(nr, nc, nu, weight, bias, own, D)
    candidate, slope = tanh_and_slope(r * z)
    h = before_of(deter, initial_deter, at, follows, own, B, D)
    slope *= grad * u
    dr = slope * z * r * (1.0 - r) * scale_of(weight, own, D)
    dc = slope * r * scale_of(weight + D, own, D)
    du = grad * (candidate - h) * u * (1.0 - u) * scale_of(weight + 2 * D, own, D)
    return dr, dc, du, nr, nc, nu, rstd


@triton.jit
def draw(
    post_sum, weight, bias, logit_weight, logit_bias, uniform, stoch, index, logp, moments, at, inside,
    program, eps, unimix: tl.constexpr, U: tl.constexpr, S: tl.constexpr, K: tl.constexpr, PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr, DEPTH: tl.constexpr, U_CHUNKS: tl.constexpr, CLASSES: tl.constexpr,
):
    """The latent of one step: a program's groups."""
    classes = tl.arange(0, CLASSES)
    mean, rstd = row_moments(post_sum, at, inside, eps, U, U_CHUNKS, SPLIT, DEPTH)
    if program == 0:
        tl.store(moments + at * 2, mean, mask=inside)
        tl.store(moments + at * 2 + 1, rstd, mask=inside)
    for s in range(program, S, PROGRAMS):
        total = tl.zeros((SPLIT, ROWS, CLASSES), tl.float32)
        for chunk in range(U_CHUNKS):
            y = norm_silu(operand(post_sum, at, inside, chunk, U, SPLIT, DEPTH), mean, rstd,
                          affine(weight, chunk, U, SPLIT, DEPTH), affine(bias, chunk, U, SPLIT, DEPTH))
            total = multiply(y, logit_weight + s * K * U, classes, chunk, U, U, K, total, SPLIT, DEPTH)
        logits = tl.sum(total, 0)
        logits += tl.load(logit_bias + s * K + classes, mask=classes < K, other=0.0)[None, :]
        real = (classes < K)[None, :]
        shifted = logits - tl.max(tl.where(real, logits, float("-inf")), 1)[:, None]
        mass = tl.where(real, tl.exp(shifted), 0.0)
        whole = tl.sum(mass, 1)[:, None]
        p = tl.where(real, mass * ((1.0 - unimix) * reciprocal(whole)) + unimix / K, 0.0)
        if unimix > 0:  # noqa: SIM108
            spread = tl.log(tl.where(real, p, 1.0))
        else:  # stays finite where a probability underflows
            spread = shifted - tl.log(whole)
        cell = (at * S + s)[:, None] * K + classes[None, :]
        tl.store(logp + cell, spread, mask=inside[:, None] & real)
        u = tl.load(uniform + at * S + s, mask=inside, other=0.0)
        below = tl.sum(((tl.cumsum(p, 1) <= u[:, None]) & real).to(tl.int32), 1)
        drawn = tl.minimum(below, K - 1)
        tl.store(index + at * S + s, drawn.to(tl.int64), mask=inside)
        one_hot = (classes[None, :] == drawn[:, None]).to(tl.float32)
        tl.store(stoch + cell, one_hot, mask=inside[:, None] & real)


@triton.jit(do_not_specialize=["start"])  # else three variants, compiled while a graph is captured
def observe_forward(
    embed, action, is_first, uniform, initial_deter, initial_index, in_stoch, in_weight, in_bias, gru,
    gru_weight,
    gru_bias, post_deter, post_weight, post_bias, logit_weight, logit_bias,
    deter, stoch, index, logp, in_sum, gates_sum, post_sum,
    moments,  # (3, T, B, 2): mean and rstd of the rows of in_sum, gates_sum, post_sum
    partial,  # (T, programs, B, 2): mean and sum of squares of a program's gates
    counter, start, B, eps,
    unimix: tl.constexpr,
    STAGE: tl.constexpr,  # one stage of step `start`, or -1: all stages of STEPS steps, with barriers
    STEPS: tl.constexpr, T: tl.constexpr, D: tl.constexpr, U: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    PROGRAMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, DEPTH: tl.constexpr,
    D_CHUNKS: tl.constexpr, U_CHUNKS: tl.constexpr, GROUPS: tl.constexpr, CLASSES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    program = tl.program_id(0)
    own = program * BLOCK + tl.arange(0, BLOCK)  # columns of deter, units
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # sequences
    inside = row < B
    group = tl.arange(0, GROUPS)
    arrived = 0
    programs = tl.num_programs(0) * tl.num_programs(1)
    for step in range(STEPS):
        t = start + step
        at = t * B + row  # (ROWS,) rows of (T * B, ..)
        follows = inside & (at >= B) & (tl.load(is_first + at, mask=inside, other=1) == 0)
        if STAGE == 0 or STAGE == -1:  # in_sum = action + the rows of in_stoch that the latent names
            chosen = tl.load(index + (at - B)[:, None] * S + group[None, :],
                             mask=follows[:, None] & (group < S)[None, :], other=0, cache_modifier=".cg")
            fallback = tl.load(initial_index + group, mask=group < S, other=0)
            # An initial class out of range has no row to read.
            real = (group < S)[None, :] & (follows[:, None] | ((fallback >= 0) & (fallback < K))[None, :])
            chosen = group[None, :] * K + tl.where(follows[:, None], chosen, fallback[None, :])
            place = at[:, None] * U + own[None, :]
            mask = inside[:, None] & (own < U)[None, :]
            gathered = tl.load(in_stoch + chosen[:, :, None] * U + own[None, None, :],
                               mask=mask[:, None, :] & real[:, :, None], other=0.0)
            total = tl.load(action + place, mask=mask,
                            other=0.0).to(tl.float32) + tl.sum(gathered.to(tl.float32), 1)
            tl.store(in_sum + place, total, mask=mask)
        if STAGE == -1:
            arrived += programs
            grid_barrier(counter, arrived)
        if STAGE == 1 or STAGE == -1:  # gates_sum = gru @ [deter, x], and this program's moments
            mean, rstd = row_moments(in_sum, at, inside, eps, U, U_CHUNKS, SPLIT, DEPTH)
            if program == 0:
                tl.store(moments + at * 2, mean, mask=inside)
                tl.store(moments + at * 2 + 1, rstd, mask=inside)
            r = tl.zeros((SPLIT, ROWS, BLOCK), tl.float32)
            c = tl.zeros((SPLIT, ROWS, BLOCK), tl.float32)
            u = tl.zeros((SPLIT, ROWS, BLOCK), tl.float32)
            for chunk in range(D_CHUNKS):
                tile = operand(deter, at - B, follows, chunk, D, SPLIT, DEPTH)
                tile = tl.where(follows[None, :, None], tile, affine(initial_deter, chunk, D, SPLIT, DEPTH))
                r = multiply(tile, gru, own, chunk, D, D + U, D, r, SPLIT, DEPTH)
                c = multiply(tile, gru + D * (D + U), own, chunk, D, D + U, D, c, SPLIT, DEPTH)
                u = multiply(tile, gru + 2 * D * (D + U), own, chunk, D, D + U, D, u, SPLIT, DEPTH)
            for chunk in range(U_CHUNKS):
                tile = norm_silu(operand(in_sum, at, inside, chunk, U, SPLIT, DEPTH), mean, rstd,
                                 affine(in_weight, chunk, U, SPLIT, DEPTH),
                                 affine(in_bias, chunk, U, SPLIT, DEPTH))
                r = multiply(tile, gru + D, own, chunk, U, D + U, D, r, SPLIT, DEPTH)
                c = multiply(tile, gru + D * (D + U) + D, own, chunk, U, D + U, D, c, SPLIT, DEPTH)
                u = multiply(tile, gru + 2 * D * (D + U) + D, own, chunk, U, D + U, D, u, SPLIT, DEPTH)
            r, c, u = tl.sum(r, 0), tl.sum(c, 0), tl.sum(u, 0)
            mask = inside[:, None] & (own < D)[None, :]
            place = at[:, None] * (3 * D) + own[None, :]
            tl.store(gates_sum + place, r, mask=mask)
            tl.store(gates_sum + place + D, c, mask=mask)
            tl.store(gates_sum + place + 2 * D, u, mask=mask)
            count = 3 * tl.maximum(tl.minimum(D - program * BLOCK, BLOCK), 1)
            mean = (tl.sum(r, 1) + tl.sum(c, 1) + tl.sum(u, 1)) / count  # columns beyond D are zero
            r = tl.where((own < D)[None, :], r - mean[:, None], 0.0)
            c = tl.where((own < D)[None, :], c - mean[:, None], 0.0)
            u = tl.where((own < D)[None, :], u - mean[:, None], 0.0)
            slot = ((t * PROGRAMS + program) * B + row) * 2
            tl.store(partial + slot, mean, mask=inside)
            tl.store(partial + slot + 1, tl.sum(r * r + c * c + u * u, 1), mask=inside)
        if STAGE == -1:
            arrived += programs
            grid_barrier(counter, arrived)
        if STAGE == 2 or STAGE == -1:  # the gates: deter
            mean, rstd = merge(partial, t, row, inside, B, eps, D, PROGRAMS, SLOTS, BLOCK)
            if program == 0:
                tl.store(moments + ((T * B) + at) * 2, mean, mask=inside)
                tl.store(moments + ((T * B) + at) * 2 + 1, rstd, mask=inside)
            mask = inside[:, None] & (own < D)[None, :]
            nr, nc, nu = own_gates(gates_sum, at, mask, own, mean, rstd, D)
            r, z, u = activate(nr, nc, nu, gru_weight, gru_bias, own, D)
            h = before_of(deter, initial_deter, at, follows, own, B, D)
            tl.store(deter + at[:, None] * D + own[None, :], u * tanh(r * z) + (1.0 - u) * h, mask=mask)
        if STAGE == -1:
            arrived += programs
            grid_barrier(counter, arrived)
        if STAGE == 3 or STAGE == -1:  # post_sum = embed + post_deter @ deter
            sums = tl.zeros((SPLIT, ROWS, BLOCK), tl.float32)
            for chunk in range(D_CHUNKS):
                tile = operand(deter, at, inside, chunk, D, SPLIT, DEPTH)
                sums = multiply(tile, post_deter, own, chunk, D, D, U, sums, SPLIT, DEPTH)
            place = at[:, None] * U + own[None, :]
            mask = inside[:, None] & (own < U)[None, :]
            y = tl.sum(sums, 0) + tl.load(embed + place, mask=mask, other=0.0).to(tl.float32)
            tl.store(post_sum + place, y, mask=mask)
        if STAGE == -1:
            arrived += programs
            grid_barrier(counter, arrived)
        if STAGE == 4 or STAGE == -1:  # noqa: SIM102 - the latent: this program's groups
            if program < S:
                draw(post_sum, post_weight, post_bias, logit_weight, logit_bias, uniform, stoch, index, logp,
                     moments + 4 * T * B, at, inside, program, eps, unimix, U, S, K, PROGRAMS, ROWS, SPLIT,
                     DEPTH, U_CHUNKS, CLASSES)
        if STAGE == -1:
            arrived += programs
            grid_barrier(counter, arrived)


@triton.jit
def norm_silu_sums(x, grad, moments, weight, bias, at, inside, L: tl.constexpr, CHUNKS: tl.constexpr,
                   SPLIT: tl.constexpr, DEPTH: tl.constexpr):
    """mean, rstd of the rows of x, and the two means that the gradient of a layer norm subtracts."""
    mean = tl.load(moments + at * 2, mask=inside, other=0.0)
    rstd = tl.load(moments + at * 2 + 1, mask=inside, other=0.0)
    plain, along = mean * 0.0, mean * 0.0
    for chunk in range(CHUNKS):
        slope, normed = norm_silu_slope(
            operand(x, at, inside, chunk, L, SPLIT, DEPTH),
            operand(grad, at, inside, chunk, L, SPLIT, DEPTH), mean, rstd,
            affine(weight, chunk, L, SPLIT, DEPTH), affine(bias, chunk, L, SPLIT, DEPTH))
        plain += tl.sum(tl.sum(slope, 2), 0)
        along += tl.sum(tl.sum(slope * normed, 2), 0)
    return mean, rstd, plain * (1.0 / L), along * (1.0 / L)


@triton.jit
def norm_silu_operand(x, grad, weight, bias, at, inside, mean, rstd, plain, along, chunk, L: tl.constexpr,
                      SPLIT: tl.constexpr, DEPTH: tl.constexpr):
    """The gradient of x, of one chunk."""
    slope, normed = norm_silu_slope(
        operand(x, at, inside, chunk, L, SPLIT, DEPTH),
        operand(grad, at, inside, chunk, L, SPLIT, DEPTH), mean, rstd,
        affine(weight, chunk, L, SPLIT, DEPTH), affine(bias, chunk, L, SPLIT, DEPTH))
    return rstd[None, :, None] * (slope - plain[None, :, None] - normed * along[None, :, None])


@triton.jit(do_not_specialize=["start"])  # else three variants, compiled while a graph is captured
def observe_backward(
    is_first, initial_deter, in_stoch, in_weight, in_bias, gru_columns, gru_weight, gru_bias, post_columns,
    post_weight,
    post_bias, logit_columns,  # *_columns: the matrices transposed
    deter, logp, in_sum, gates_sum, post_sum, moments, grad_deter, grad_stoch, grad_logp,
    grad_logits,  # (T, B, S*K) of the logits
    grad_y,  # (T, B, U) of SiLU(LN(post_sum))
    grad_total,  # (T, B, D) of deter, from everywhere
    grad_gates,  # (T, B, 3D) of gates_sum
    grad_before,  # (T, B, D) of the deter before, by way of the gates
    grad_x,  # (T, B, U) of SiLU(LN(in_sum))
    partial,  # (T, programs, B, 2): the sums of a program's gates that the layer norm's gradient needs
    counter, start, B, unimix: tl.constexpr,
    STAGE: tl.constexpr, STEPS: tl.constexpr, T: tl.constexpr, D: tl.constexpr, U: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr, PROGRAMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
    DEPTH: tl.constexpr, D_CHUNKS: tl.constexpr, U_CHUNKS: tl.constexpr, GATE_CHUNKS: tl.constexpr,
    LATENT_CHUNKS: tl.constexpr, CLASSES: tl.constexpr, SLOTS: tl.constexpr,
):
    program = tl.program_id(0)
    own = program * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < B
    classes = tl.arange(0, CLASSES)
    arrived = 0
    programs = tl.num_programs(0) * tl.num_programs(1)
    in_deter = inside[:, None] & (own < D)[None, :]
    in_units = inside[:, None] & (own < U)[None, :]
    for step in range(STEPS):
        t = start - step
        at = t * B + row
        after = at + B
        follows = inside & (at >= B) & (tl.load(is_first + at, mask=inside, other=1) == 0)
        followed = inside & (after < T * B)
        followed = followed & (tl.load(is_first + after, mask=followed, other=1) == 0)
        if STAGE == 0 or STAGE == -1:  # noqa: SIM102 - the latent: this program's groups
            if program < S:
                mean, rstd, plain, along = norm_silu_sums(in_sum, grad_x, moments, in_weight, in_bias, after,
                                                          followed, U, U_CHUNKS, SPLIT, DEPTH)
                for s in range(program, S, PROGRAMS):
                    latent = tl.zeros((SPLIT, ROWS, CLASSES), tl.float32)
                    for chunk in range(U_CHUNKS):
                        tile = norm_silu_operand(in_sum, grad_x, in_weight, in_bias, after, followed, mean,
                                                 rstd, plain, along, chunk, U, SPLIT, DEPTH)
                        latent = multiply(tile, in_stoch + s * K * U, classes, chunk, U, U, K, latent,
                                          SPLIT, DEPTH)
                    cell = (at * S + s)[:, None] * K + classes[None, :]
                    mask = inside[:, None] & (classes < K)[None, :]
                    of_p = tl.sum(latent, 0) + tl.load(grad_stoch + cell, mask=mask, other=0.0)
                    mixed = tl.exp(tl.load(logp + cell, mask=mask, other=0.0))
                    part = tl.where(mask, tl.maximum(mixed - unimix / K, 0.0), 0.0)  # (1 - unimix) * softmax
                    of_logp = tl.load(grad_logp + cell, mask=mask, other=0.0)
                    of_p = part * of_p + (of_logp * (part / mixed) if unimix > 0 else of_logp)
                    grad = of_p - part * (1.0 / (1.0 - unimix)) * tl.sum(of_p, 1)[:, None]
                    tl.store(grad_logits + cell, grad.to(grad_logits.dtype.element_ty), mask=mask)
        if STAGE == -1:
            arrived += programs
            grid_barrier(counter, arrived)
        if STAGE == 1 or STAGE == -1:  # through the logits
            total = tl.zeros((SPLIT, ROWS, BLOCK), tl.float32)
            for chunk in range(LATENT_CHUNKS):
                tile = operand(grad_logits, at, inside, chunk, S * K, SPLIT, DEPTH)
                total = multiply(tile, logit_columns, own, chunk, S * K, S * K, U, total, SPLIT, DEPTH)
            tl.store(grad_y + at[:, None] * U + own[None, :], tl.sum(total, 0), mask=in_units)
        if STAGE == -1:
            arrived += programs
            grid_barrier(counter, arrived)
        if STAGE == 2 or STAGE == -1:  # deter: what the step, its posterior and the next step hand it
            mean, rstd, plain, along = norm_silu_sums(post_sum, grad_y, moments + 4 * T * B, post_weight,
                                                      post_bias, at, inside, U, U_CHUNKS, SPLIT, DEPTH)
            total = tl.zeros((SPLIT, ROWS, BLOCK), tl.float32)
            for chunk in range(U_CHUNKS):
                tile = norm_silu_operand(post_sum, grad_y, post_weight, post_bias, at, inside, mean, rstd,
                                         plain, along, chunk, U, SPLIT, DEPTH)
                total = multiply(tile, post_columns, own, chunk, U, U, D, total, SPLIT, DEPTH)
            place = at[:, None] * D + own[None, :]
            later = place + B * D
            carried = followed[:, None] & (own < D)[None, :]
            mean = tl.load(moments + (T * B + after) * 2, mask=followed, other=0.0)
            rstd = tl.load(moments + (T * B + after) * 2 + 1, mask=followed, other=0.0)
            nr, nc, nu = own_gates(gates_sum, after, carried, own, mean, rstd, D)
            _, _, u = activate(nr, nc, nu, gru_weight, gru_bias, own, D)
            grad = tl.sum(total, 0) + tl.load(grad_deter + place, mask=in_deter, other=0.0)
            grad += (1.0 - u) * tl.load(grad_total + later, mask=carried, other=0.0, cache_modifier=".cg")
            grad += tl.load(grad_before + later, mask=carried, other=0.0, cache_modifier=".cg")
            tl.store(grad_total + place, grad, mask=in_deter)
            dr, dc, du, nr, nc, nu, rstd = gate_slopes(gates_sum, deter, initial_deter, gru_weight, gru_bias,
                                                       moments, grad, at, inside, follows, own, T * B, B, D)
            slot = ((t * PROGRAMS + program) * B + row) * 2
            tl.store(partial + slot, tl.sum(dr + dc + du, 1), mask=inside)
            tl.store(partial + slot + 1, tl.sum(dr * nr + dc * nc + du * nu, 1), mask=inside)
        if STAGE == -1:
            arrived += programs
            grid_barrier(counter, arrived)
        if STAGE == 3 or STAGE == -1:  # the gates
            other = tl.arange(0, SLOTS)[:, None]
            slot = ((t * PROGRAMS + other) * B + row[None, :]) * 2
            mask = (other < PROGRAMS) & inside[None, :]
            plain = tl.sum(tl.load(partial + slot, mask=mask, other=0.0, cache_modifier=".cg"), 0) * (1.0 / (3 * D))
            along = tl.load(partial + slot + 1, mask=mask, other=0.0, cache_modifier=".cg")
            along = tl.sum(along, 0) * (1.0 / (3 * D))
            grad = tl.load(grad_total + at[:, None] * D + own[None, :], mask=in_deter, other=0.0,
                           cache_modifier=".cg")
            dr, dc, du, nr, nc, nu, rstd = gate_slopes(gates_sum, deter, initial_deter, gru_weight, gru_bias,
                                                       moments, grad, at, inside, follows, own, T * B, B, D)
            low: tl.constexpr = grad_gates.dtype.element_ty
            place = grad_gates + at[:, None] * (3 * D) + own[None, :]
            plain, along, rstd = plain[:, None], along[:, None], rstd[:, None]
            tl.store(place, (rstd * (dr - plain - nr * along)).to(low), mask=in_deter)
            tl.store(place + D, (rstd * (dc - plain - nc * along)).to(low), mask=in_deter)
            tl.store(place + 2 * D, (rstd * (du - plain - nu * along)).to(low), mask=in_deter)
        if STAGE == -1:
            arrived += programs
            grid_barrier(counter, arrived)
        if STAGE == 4 or STAGE == -1:  # through the GRU's matrix, to the deter before and to x
            to_deter = tl.zeros((SPLIT, ROWS, BLOCK), tl.float32)
            to_x = tl.zeros((SPLIT, ROWS, BLOCK), tl.float32)
            for chunk in range(GATE_CHUNKS):
                tile = operand(grad_gates, at, inside, chunk, 3 * D, SPLIT, DEPTH)
                to_deter = multiply(tile, gru_columns, own, chunk, 3 * D, 3 * D, D, to_deter, SPLIT, DEPTH)
                to_x = multiply(tile, gru_columns + 3 * D * D, own, chunk, 3 * D, 3 * D, U, to_x, SPLIT,
                                DEPTH)
            tl.store(grad_before + at[:, None] * D + own[None, :], tl.sum(to_deter, 0), mask=in_deter)
            tl.store(grad_x + at[:, None] * U + own[None, :], tl.sum(to_x, 0), mask=in_units)
        if STAGE == -1:
            arrived += programs
            grid_barrier(counter, arrived)
