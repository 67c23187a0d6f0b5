"""What a step of rssm_observe does with a sequence that one program holds whole: device functions in Triton.

Layer norms, activations, and the gather of the rows that one-hot latents name, forward and backward; see
rssm_observe_kernels for when. `at` is a row of (T * B, ..), `column` all its columns, padded to WIDTH, a power of two;
L, D, U are the true numbers of columns. Loads with ".cg" come from the second-level cache, since other
programs wrote them.

Axes: T time, B batch, D deter, U units, S groups, K classes.
"""

from ._triton import tl, triton
from .tiles import tanh, tanh_and_slope

# One argument a line would make the argument lists the bulk of this file.
# fmt: off


@triton.jit
def vector(array, column, L: tl.constexpr):
    """A vector (L,) at `column`."""
    return tl.load(array + column, mask=column < L, other=0.0)


@triton.jit
def line(array, at, column, L: tl.constexpr):
    """Row `at` of an array (.., L) that other programs wrote."""
    return tl.load(array + at * L + column, mask=column < L, other=0.0, cache_modifier=".cg")


@triton.jit
def norm_silu(x, column, at, weight, bias, moments, eps, L: tl.constexpr):
    """SiLU(LN(x)) of a row, whose mean and 1 / sqrt(variance + eps) are kept."""
    mean = tl.sum(x, 0) * (1.0 / L)
    x = tl.where(column < L, x - mean, 0.0)
    variance = tl.sum(x * x, 0) * (1.0 / L)
    if variance < 1e-6 * mean * mean:  # the mean's rounding error may be all that is left; see tiles.normalise
        missed = tl.sum(x, 0) * (1.0 / L)
        mean += missed
        x = tl.where(column < L, x - missed, 0.0)
        variance = tl.sum(x * x, 0) * (1.0 / L)
    rstd = tl.rsqrt(variance + eps)
    tl.store(moments + at * 2, mean)
    tl.store(moments + at * 2 + 1, rstd)
    z = x * rstd * vector(weight, column, L) + vector(bias, column, L)
    return z * tl.sigmoid(z)


@triton.jit
def line_of_norm_silu_gradient(x, grad_y, grad_x, weight, bias, moments, at, L: tl.constexpr, WIDTH: tl.constexpr):
    """Row `at` of the gradient of x, from that of SiLU(LN(x))."""
    column = tl.arange(0, WIDTH)
    mean, rstd = tl.load(moments + at * 2), tl.load(moments + at * 2 + 1)
    scale, grad = vector(weight, column, L), line(grad_y, at, column, L)
    normed = tl.where(column < L, (line(x, at, column, L) - mean) * rstd, 0.0)
    z = normed * scale + vector(bias, column, L)
    gate = tl.sigmoid(z)
    slope = grad * gate * (1.0 + z * (1.0 - gate)) * scale
    plain, along = tl.sum(slope, 0) * (1.0 / L), tl.sum(slope * normed, 0) * (1.0 / L)
    grad = rstd * (slope - plain - normed * along)
    tl.store(grad_x + at * L + column, grad.to(grad_x.dtype.element_ty), mask=column < L)


@triton.jit
def activate(nr, nc, nu, weight, bias, column, D: tl.constexpr):
    """reset, the candidate before reset and tanh, update."""
    r = tl.sigmoid(nr * vector(weight, column, D) + vector(bias, column, D))
    z = nc * vector(weight + D, column, D) + vector(bias + D, column, D)
    u = tl.sigmoid(nu * vector(weight + 2 * D, column, D) + vector(bias + 2 * D, column, D) - 1.0)
    return r, z, u


@triton.jit
def gates_of(gates_sum, at, column, D: tl.constexpr):
    """The three gates of a row of gates_sum (.., 3D)."""
    place, real = gates_sum + at * (3 * D) + column, column < D
    r = tl.load(place, mask=real, other=0.0, cache_modifier=".cg")
    c = tl.load(place + D, mask=real, other=0.0, cache_modifier=".cg")
    u = tl.load(place + 2 * D, mask=real, other=0.0, cache_modifier=".cg")
    return r, c, u


@triton.jit
def gates_normed(gates_sum, at, column, eps, D: tl.constexpr):
    """LN of a row of gates: each of the three, and 1 / sqrt(variance + eps)."""
    r, c, u = gates_of(gates_sum, at, column, D)
    mean = tl.sum(r + c + u, 0) * (1.0 / (3 * D))
    r, c = tl.where(column < D, r - mean, 0.0), tl.where(column < D, c - mean, 0.0)
    u = tl.where(column < D, u - mean, 0.0)
    variance = tl.sum(r * r + c * c + u * u, 0) * (1.0 / (3 * D))
    if variance < 1e-6 * mean * mean:  # as in norm_silu
        missed = tl.sum(r + c + u, 0) * (1.0 / (3 * D))
        r, c = tl.where(column < D, r - missed, 0.0), tl.where(column < D, c - missed, 0.0)
        u = tl.where(column < D, u - missed, 0.0)
        variance = tl.sum(r * r + c * c + u * u, 0) * (1.0 / (3 * D))
    rstd = tl.rsqrt(variance + eps)
    return r * rstd, c * rstd, u * rstd, rstd


@triton.jit
def before_of(deter, initial_deter, at, follows, column, B, D: tl.constexpr):
    """The deter that a row's step starts from."""
    h = tl.load(deter + (at - B) * D + column, mask=column < tl.where(at >= B, D, 0), other=0.0, cache_modifier=".cg")
    return tl.where(follows, h, vector(initial_deter, column, D))


@triton.jit
def enter(in_stoch, index, initial_index, is_first, action, weight, bias, in_sum, x, moments, at, B, eps,
          U: tl.constexpr, S: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, UNROLL: tl.constexpr):
    """Row `at` of in_sum = action + the rows of in_stoch that the latent before names, and of x = SiLU(LN(in_sum))."""
    column = tl.arange(0, WIDTH)
    follows = (at >= B) & (tl.load(is_first + at) == 0)
    total = tl.load(action + at * U + column, mask=column < U, other=0.0).to(tl.float32)
    for group in tl.range(0, S, loop_unroll_factor=UNROLL):  # each thread adds up its columns
        chosen = tl.load(initial_index + group)
        before = tl.load(index + (at - B) * S + group, mask=at >= B, other=0, cache_modifier=".cg")
        chosen = tl.where(follows, before, chosen)
        # An initial class out of range has no row to read.
        real = column < tl.where((chosen >= 0) & (chosen < K), U, 0)
        total += tl.load(in_stoch + (group * K + chosen) * U + column, mask=real, other=0.0).to(tl.float32)
    tl.store(in_sum + at * U + column, total, mask=column < U)
    value = norm_silu(total, column, at, weight, bias, moments, eps, U)
    tl.store(x + at * U + column, value.to(x.dtype.element_ty), mask=column < U)


@triton.jit
def update_deter(gates_sum, deter, low_deter, initial_deter, is_first, weight, bias, at, B, eps, D: tl.constexpr,
                 WIDTH: tl.constexpr):
    """Row `at` of deter, from its gates."""
    column = tl.arange(0, WIDTH)
    follows = (at >= B) & (tl.load(is_first + at) == 0)
    h = before_of(deter, initial_deter, at, follows, column, B, D)
    nr, nc, nu, _ = gates_normed(gates_sum, at, column, eps, D)
    r, z, u = activate(nr, nc, nu, weight, bias, column, D)
    value = u * tanh(r * z) + (1.0 - u) * h
    tl.store(deter + at * D + column, value, mask=column < D)
    tl.store(low_deter + at * D + column, value.to(low_deter.dtype.element_ty), mask=column < D)


@triton.jit
def activate_posterior(post_sum, y, weight, bias, moments, at, eps, U: tl.constexpr, WIDTH: tl.constexpr):
    """Row `at` of y = SiLU(LN(post_sum))."""
    column = tl.arange(0, WIDTH)
    value = norm_silu(line(post_sum, at, column, U), column, at, weight, bias, moments, eps, U)
    tl.store(y + at * U + column, value.to(y.dtype.element_ty), mask=column < U)


@triton.jit
def line_of_gate_gradients(gates_sum, deter, initial_deter, is_first, weight, bias, grad_total, grad_gates, grad_kept,
                           at, B, eps, D: tl.constexpr, WIDTH: tl.constexpr):
    """Row `at` of the gradient of gates_sum, and of the deter before, through the part that the update gate keeps."""
    column = tl.arange(0, WIDTH)
    follows = (at >= B) & (tl.load(is_first + at) == 0)
    h = before_of(deter, initial_deter, at, follows, column, B, D)
    grad = line(grad_total, at, column, D)
    nr, nc, nu, rstd = gates_normed(gates_sum, at, column, eps, D)
    r, z, u = activate(nr, nc, nu, weight, bias, column, D)
    candidate, slope = tanh_and_slope(r * z)
    tl.store(grad_kept + at * D + column, (1.0 - u) * grad, mask=column < D)
    slope *= grad * u
    dr = slope * z * r * (1.0 - r) * vector(weight, column, D)
    dc = slope * r * vector(weight + D, column, D)
    du = grad * (candidate - h) * u * (1.0 - u) * vector(weight + 2 * D, column, D)
    plain = tl.sum(dr + dc + du, 0) * (1.0 / (3 * D))
    along = tl.sum(dr * nr + dc * nc + du * nu, 0) * (1.0 / (3 * D))
    place = grad_gates + at * (3 * D) + column
    low: tl.constexpr = grad_gates.dtype.element_ty
    tl.store(place, (rstd * (dr - plain - nr * along)).to(low), mask=column < D)
    tl.store(place + D, (rstd * (dc - plain - nc * along)).to(low), mask=column < D)
    tl.store(place + 2 * D, (rstd * (du - plain - nu * along)).to(low), mask=column < D)
