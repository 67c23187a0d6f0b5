"""The Triton kernels of rssm_observe: each step is six stages forward and seven backward.

A stage is what can be done between two exchanges of the whole state. There are two kinds. In one a program owns
whole sequences: layer norms, activations and the gather of one-hot inputs, which need all of a row. In the other it
owns columns of a product of matrices for all sequences, whose operand the stage before has left in the type of the
matrix work. A kernel runs either one stage of one step, or all stages of STEPS steps, its programs meeting at a
barrier (STAGE = -1); the arithmetic is the same.

Work on whole rows is in rssm_observe_rows; products and the order of all stages are here. Only the recurrent part is
computed: rssm_observe_triton derives the gradients of matrices and norms from what the scan stores.

Axes: T time, B batch, D deter, U units, S groups, K classes. A tile of an operand is ROWS sequences by SPLIT * DEPTH
columns: SPLIT parts of a sum go to different warps. A tile of results is ROWS by BLOCK. A whole row is D_WIDTH or
U_WIDTH numbers. Matrices are read along their rows. Loads with ".cg" come from the second-level cache, since other
programs wrote what they read.
"""

from ._triton import tl, triton
from .rssm_observe_rows import (
    activate_posterior,
    enter,
    line_of_gate_gradients,
    line_of_norm_silu_gradient,
    update_deter,
    vector,
)
from .tiles import reciprocal

# One argument a line would make the argument lists the bulk of this file.
# fmt: off


@triton.jit
def grid_barrier(counter, target):
    """Wait until every program has come here `target / programs` times; ".cg" loads then see what they wrote.

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
    return tl.load(array + row[None, :, None] * L + column, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def multiply(a, matrix, out, chunk, L: tl.constexpr, STRIDE: tl.constexpr, N, total, SPLIT: tl.constexpr,
             DEPTH: tl.constexpr):
    """total + a @ matrix[out].T for one chunk: a (SPLIT, ROWS, DEPTH), matrix (N, STRIDE), out (BLOCK,)."""
    column = columns_of(chunk, SPLIT, DEPTH)[:, :, None]
    mask = (out[None, None, :] < N) & (column < L)
    weight = tl.load(matrix + out[None, None, :] * STRIDE + column, mask=mask, other=0.0)
    return tl.dot(a, weight, total, input_precision="ieee")


@triton.jit
def product(array, row, inside, matrix, out, L: tl.constexpr, N, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
            BLOCK: tl.constexpr, SPLIT: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr):
    """Rows of array (.., L) times matrix[out].T, (ROWS, BLOCK)."""
    total = tl.zeros((SPLIT, ROWS, BLOCK), tl.float32)
    for chunk in tl.range(CHUNKS, loop_unroll_factor=CHUNKS if CHUNKS <= WHOLE else 1):
        total = multiply(operand(array, row, inside, chunk, L, SPLIT, DEPTH), matrix, out, chunk, L, L, N, total,
                         SPLIT, DEPTH)
    return tl.sum(total, 0)


@triton.jit
def draw(
    y, logit_weight, logit_bias, uniform, stoch, index, logp, at, inside, program, unimix: tl.constexpr,
    U: tl.constexpr, S: tl.constexpr, K: tl.constexpr, PROGRAMS: tl.constexpr, ROWS: tl.constexpr,
    SPLIT: tl.constexpr, DEPTH: tl.constexpr, U_CHUNKS: tl.constexpr, CLASSES: tl.constexpr, WHOLE: tl.constexpr,
):
    """The latent of one step: a program's groups."""
    classes = tl.arange(0, CLASSES)
    for s in range(program, S, PROGRAMS):
        u = tl.load(uniform + at * S + s, mask=inside, other=0.0)
        logits = product(y, at, inside, logit_weight + s * K * U, classes, U, K, U_CHUNKS, ROWS, CLASSES, SPLIT, DEPTH,
                         WHOLE)
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
        below = tl.sum(((tl.cumsum(p, 1) <= u[:, None]) & real).to(tl.int32), 1)
        drawn = tl.minimum(below, K - 1)
        tl.store(index + at * S + s, drawn.to(tl.int64), mask=inside)
        one_hot = (classes[None, :] == drawn[:, None]).to(tl.float32)
        tl.store(stoch + cell, one_hot, mask=inside[:, None] & real)


@triton.jit(do_not_specialize=["start"])  # else three variants, compiled while a graph is captured
def observe_forward(
    embed, action, is_first, uniform, initial_deter, initial_index, in_stoch, in_weight, in_bias, gru,
    gru_weight, gru_bias, post_deter, post_weight, post_bias, logit_weight, logit_bias,
    deter, stoch, index, logp, in_sum, gates_sum, post_sum,
    x, low_deter, y,  # operands of products: SiLU(LN(in_sum)), deter, SiLU(LN(post_sum))
    moments,  # (2, T, B, 2): mean and rstd of the rows of in_sum and post_sum
    counter, start, B, eps,
    unimix: tl.constexpr,
    STAGE: tl.constexpr,  # one stage of step `start`, or -1: all stages of STEPS steps, with barriers
    STEPS: tl.constexpr, T: tl.constexpr, D: tl.constexpr, U: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    PROGRAMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, DEPTH: tl.constexpr,
    D_CHUNKS: tl.constexpr, U_CHUNKS: tl.constexpr, D_WIDTH: tl.constexpr, U_WIDTH: tl.constexpr,
    CLASSES: tl.constexpr, UNROLL: tl.constexpr,
    WHOLE: tl.constexpr,  # products of up to so many chunks are one block of code
):
    program = tl.program_id(0)
    own = program * BLOCK + tl.arange(0, BLOCK)  # columns of deter, units
    first_row = tl.program_id(1) * ROWS
    row = first_row.to(tl.int64) + tl.arange(0, ROWS)  # sequences
    inside = row < B
    low: tl.constexpr = x.dtype.element_ty
    arrived = 0
    programs = tl.num_programs(0) * tl.num_programs(1)
    for step in range(STEPS):
        t = start + step
        at = t * B + row  # (ROWS,) rows of (T * B, ..)
        if STAGE == 0 or STAGE == -1:  # x from in_sum = action + the rows of in_stoch that the latent names
            for i in range(program, ROWS, PROGRAMS):
                if first_row + i < B:
                    enter(in_stoch, index, initial_index, is_first, action, in_weight, in_bias, in_sum, x, moments,
                          t.to(tl.int64) * B + first_row + i, B, eps, U, S, K, U_WIDTH, UNROLL)
        if STAGE == -1:
            arrived += programs
            grid_barrier(counter, arrived)
        if STAGE == 1 or STAGE == -1:  # gates_sum = gru @ [deter, x]
            earlier = inside & (at >= B)
            follows = earlier & (tl.load(is_first + at, mask=inside, other=1) == 0)
            r = tl.zeros((SPLIT, ROWS, BLOCK), tl.float32)
            c = tl.zeros((SPLIT, ROWS, BLOCK), tl.float32)
            u = tl.zeros((SPLIT, ROWS, BLOCK), tl.float32)
            for chunk in tl.range(D_CHUNKS, loop_unroll_factor=D_CHUNKS if D_CHUNKS <= WHOLE else 1):
                tile = operand(low_deter, at - B, earlier, chunk, D, SPLIT, DEPTH)
                initial = vector(initial_deter, columns_of(chunk, SPLIT, DEPTH), D).to(low)
                tile = tl.where(follows[None, :, None], tile, initial[:, None, :])
                r = multiply(tile, gru, own, chunk, D, D + U, D, r, SPLIT, DEPTH)
                c = multiply(tile, gru + D * (D + U), own, chunk, D, D + U, D, c, SPLIT, DEPTH)
                u = multiply(tile, gru + 2 * D * (D + U), own, chunk, D, D + U, D, u, SPLIT, DEPTH)
            for chunk in tl.range(U_CHUNKS, loop_unroll_factor=U_CHUNKS if U_CHUNKS <= WHOLE else 1):
                tile = operand(x, at, inside, chunk, U, SPLIT, DEPTH)
                r = multiply(tile, gru + D, own, chunk, U, D + U, D, r, SPLIT, DEPTH)
                c = multiply(tile, gru + D * (D + U) + D, own, chunk, U, D + U, D, c, SPLIT, DEPTH)
                u = multiply(tile, gru + 2 * D * (D + U) + D, own, chunk, U, D + U, D, u, SPLIT, DEPTH)
            mask = inside[:, None] & (own < D)[None, :]
            cell = gates_sum + at[:, None] * (3 * D) + own[None, :]
            tl.store(cell, tl.sum(r, 0), mask=mask)
            tl.store(cell + D, tl.sum(c, 0), mask=mask)
            tl.store(cell + 2 * D, tl.sum(u, 0), mask=mask)
        if STAGE == -1:
            arrived += programs
            grid_barrier(counter, arrived)
        if STAGE == 2 or STAGE == -1:  # the gates: deter
            for i in range(program, ROWS, PROGRAMS):
                if first_row + i < B:
                    update_deter(gates_sum, deter, low_deter, initial_deter, is_first, gru_weight, gru_bias,
                                 t.to(tl.int64) * B + first_row + i, B, eps, D, D_WIDTH)
        if STAGE == -1:
            arrived += programs
            grid_barrier(counter, arrived)
        if STAGE == 3 or STAGE == -1:  # post_sum = embed + post_deter @ deter
            cell = at[:, None] * U + own[None, :]
            mask = inside[:, None] & (own < U)[None, :]
            seen = tl.load(embed + cell, mask=mask, other=0.0).to(tl.float32)
            total = product(low_deter, at, inside, post_deter, own, D, U, D_CHUNKS, ROWS, BLOCK, SPLIT, DEPTH, WHOLE)
            tl.store(post_sum + cell, total + seen, mask=mask)
        if STAGE == -1:
            arrived += programs
            grid_barrier(counter, arrived)
        if STAGE == 4 or STAGE == -1:  # y
            for i in range(program, ROWS, PROGRAMS):
                if first_row + i < B:
                    activate_posterior(post_sum, y, post_weight, post_bias, moments + 2 * T * B,
                                       t.to(tl.int64) * B + first_row + i, eps, U, U_WIDTH)
        if STAGE == -1:
            arrived += programs
            grid_barrier(counter, arrived)
        if STAGE == 5 or STAGE == -1:  # noqa: SIM102 - the latent: this program's groups
            if program < S:
                draw(y, logit_weight, logit_bias, uniform, stoch, index, logp, at, inside, program, unimix, U, S, K,
                     PROGRAMS, ROWS, SPLIT, DEPTH, U_CHUNKS, CLASSES, WHOLE)
        if STAGE == -1:
            arrived += programs
            grid_barrier(counter, arrived)


@triton.jit(do_not_specialize=["start"])  # else three variants, compiled while a graph is captured
def observe_backward(
    is_first, initial_deter, in_stoch, in_weight, in_bias, gru_columns, gru_weight, gru_bias, post_columns,
    post_weight, post_bias, logit_columns,  # *_columns: the matrices transposed
    deter, logp, in_sum, gates_sum, post_sum, moments, grad_deter, grad_stoch, grad_logp,
    grad_logits,  # (T, B, S*K) of the logits
    grad_y,  # (T, B, U) of SiLU(LN(post_sum))
    grad_post,  # (T, B, U) of post_sum
    grad_total,  # (T, B, D) of deter, from everywhere
    grad_gates,  # (T, B, 3D) of gates_sum
    grad_kept,  # (T, B, D) of the deter before, through the part that the update gate keeps
    grad_before,  # (T, B, D) of the deter before, through the gates
    grad_x,  # (T, B, U) of SiLU(LN(in_sum))
    grad_in,  # (T, B, U) of in_sum
    counter, start, B, eps, unimix: tl.constexpr,
    STAGE: tl.constexpr, STEPS: tl.constexpr, T: tl.constexpr, D: tl.constexpr, U: tl.constexpr,
    S: tl.constexpr, K: tl.constexpr, PROGRAMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SPLIT: tl.constexpr, DEPTH: tl.constexpr, U_CHUNKS: tl.constexpr, GATE_CHUNKS: tl.constexpr,
    LATENT_CHUNKS: tl.constexpr, D_WIDTH: tl.constexpr, U_WIDTH: tl.constexpr, CLASSES: tl.constexpr,
    WHOLE: tl.constexpr,
):
    program = tl.program_id(0)
    own = program * BLOCK + tl.arange(0, BLOCK)
    first_row = tl.program_id(1) * ROWS
    row = first_row.to(tl.int64) + tl.arange(0, ROWS)
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
        later = inside & (after < T * B)
        followed = later & (tl.load(is_first + after, mask=later, other=1) == 0)
        if STAGE == 0 or STAGE == -1:  # noqa: SIM102 - the latent: this program's groups
            if program < S:
                for s in range(program, S, PROGRAMS):
                    cell = (at * S + s)[:, None] * K + classes[None, :]
                    mask = inside[:, None] & (classes < K)[None, :]
                    given = tl.load(grad_stoch + cell, mask=mask, other=0.0)
                    mixed = tl.exp(tl.load(logp + cell, mask=mask, other=0.0))
                    of_logp = tl.load(grad_logp + cell, mask=mask, other=0.0)
                    latent = product(grad_in, after, later, in_stoch + s * K * U, classes, U, K, U_CHUNKS, ROWS,
                                     CLASSES, SPLIT, DEPTH, WHOLE)
                    of_p = tl.where(followed[:, None], latent, 0.0) + given
                    part = tl.where(mask, tl.maximum(mixed - unimix / K, 0.0), 0.0)  # (1 - unimix) * softmax
                    of_p = part * of_p + (of_logp * (part / mixed) if unimix > 0 else of_logp)
                    grad = of_p - part * (1.0 / (1.0 - unimix)) * tl.sum(of_p, 1)[:, None]
                    tl.store(grad_logits + cell, grad.to(grad_logits.dtype.element_ty), mask=mask)
        if STAGE == -1:
            arrived += programs
            grid_barrier(counter, arrived)
        if STAGE == 1 or STAGE == -1:  # through the logits
            total = product(grad_logits, at, inside, logit_columns, own, S * K, U, LATENT_CHUNKS, ROWS, BLOCK, SPLIT,
                            DEPTH, WHOLE)
            tl.store(grad_y + at[:, None] * U + own[None, :], total, mask=in_units)
        if STAGE == -1:
            arrived += programs
            grid_barrier(counter, arrived)
        if STAGE == 2 or STAGE == -1:  # through y
            for i in range(program, ROWS, PROGRAMS):
                if first_row + i < B:
                    line_of_norm_silu_gradient(post_sum, grad_y, grad_post, post_weight, post_bias, moments + 2 * T * B,
                                       t.to(tl.int64) * B + first_row + i, U, U_WIDTH)
        if STAGE == -1:
            arrived += programs
            grid_barrier(counter, arrived)
        if STAGE == 3 or STAGE == -1:  # deter: what the step, its posterior and the next step hand it
            place = at[:, None] * D + own[None, :]
            carried = later[:, None] & (own < D)[None, :]
            next_step = tl.load(grad_kept + place + B * D, mask=carried, other=0.0, cache_modifier=".cg")
            next_step += tl.load(grad_before + place + B * D, mask=carried, other=0.0, cache_modifier=".cg")
            given = tl.load(grad_deter + place, mask=in_deter, other=0.0)
            total = product(grad_post, at, inside, post_columns, own, U, D, U_CHUNKS, ROWS, BLOCK, SPLIT, DEPTH, WHOLE)
            total += given + tl.where(followed[:, None], next_step, 0.0)
            tl.store(grad_total + place, total, mask=in_deter)
        if STAGE == -1:
            arrived += programs
            grid_barrier(counter, arrived)
        if STAGE == 4 or STAGE == -1:  # the gates
            for i in range(program, ROWS, PROGRAMS):
                if first_row + i < B:
                    line_of_gate_gradients(gates_sum, deter, initial_deter, is_first, gru_weight, gru_bias, grad_total,
                                   grad_gates, grad_kept, t.to(tl.int64) * B + first_row + i, B, eps, D, D_WIDTH)
        if STAGE == -1:
            arrived += programs
            grid_barrier(counter, arrived)
        if STAGE == 5 or STAGE == -1:  # through the GRU's matrix, to the deter before and to x
            to_deter = tl.zeros((SPLIT, ROWS, BLOCK), tl.float32)
            to_x = tl.zeros((SPLIT, ROWS, BLOCK), tl.float32)
            for chunk in tl.range(GATE_CHUNKS, loop_unroll_factor=GATE_CHUNKS if GATE_CHUNKS <= WHOLE else 1):
                tile = operand(grad_gates, at, inside, chunk, 3 * D, SPLIT, DEPTH)
                to_deter = multiply(tile, gru_columns, own, chunk, 3 * D, 3 * D, D, to_deter, SPLIT, DEPTH)
                to_x = multiply(tile, gru_columns + 3 * D * D, own, chunk, 3 * D, 3 * D, U, to_x, SPLIT, DEPTH)
            tl.store(grad_before + at[:, None] * D + own[None, :], tl.sum(to_deter, 0), mask=in_deter)
            tl.store(grad_x + at[:, None] * U + own[None, :], tl.sum(to_x, 0), mask=in_units)
        if STAGE == -1:
            arrived += programs
            grid_barrier(counter, arrived)
        if STAGE == 6 or STAGE == -1:  # through x
            for i in range(program, ROWS, PROGRAMS):
                if first_row + i < B:
                    line_of_norm_silu_gradient(in_sum, grad_x, grad_in, in_weight, in_bias, moments,
                                       t.to(tl.int64) * B + first_row + i, U, U_WIDTH)
        if STAGE == -1:
            arrived += programs
            grid_barrier(counter, arrived)
