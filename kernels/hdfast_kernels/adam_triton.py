"""adam_step in two launches after the norm: one program turns scalars into factors, then every number is visited once.

A single tensor, such as all parameters of a model in one, is read where it is; the gradients of several are first
copied together for the norm. The norm reads 4 bytes a parameter, the step reads and writes 28.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._triton import tl, triton
from .numerics import as_contiguous, copy_back

BLOCK, WARPS = 1024, 4  # 8 numbers a thread: two 16-byte loads of each of four tensors, all under way at once
FACTORS = 4  # whether anything changes, the clip, and the corrections of the two moments


@triton.jit
def remaining(BETA: tl.constexpr, count):
    """1 - beta^count as float32, from a float64 power: for a beta near one, float32 would leave four digits."""
    power, base, bits = tl.full((), 1.0, tl.float64), tl.full((), BETA, tl.float64), count.to(tl.int32)
    for _ in range(25):  # float32 counts to 2^24
        power = tl.where(bits % 2 == 1, power * base, power)
        base *= base
        bits //= 2
    return (1.0 - power).to(tl.float32)


@triton.jit
def adam_step_prepare(
    norm_ptr,
    apply_ptr,
    lr_ptr,
    step_ptr,
    applied_ptr,
    factors_ptr,
    lr,
    max_norm,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    ASKED: tl.constexpr,
    RATED: tl.constexpr,
    CLIPPED: tl.constexpr,
):
    """One program: counts the step, and writes the factors that all numbers share.

    ASKED, RATED, CLIPPED: whether there is an `apply`, a learning-rate tensor, and a bound on the norm.
    """
    norm = tl.load(norm_ptr)
    applied = norm < float("inf")  # false for NaN too
    if ASKED:
        applied = applied & (tl.load(apply_ptr) != 0)
    if RATED:
        lr = tl.load(lr_ptr).to(tl.float32)
    clip = 1.0
    if CLIPPED:
        clip = tl.where(norm > max_norm, max_norm / norm, 1.0)
    step = tl.load(step_ptr) + tl.where(applied, 1.0, 0.0)
    count = tl.maximum(step, 1.0)
    tl.store(step_ptr, step)
    tl.store(applied_ptr, applied.to(tl.uint8))
    tl.store(factors_ptr, tl.where(applied, 1.0, 0.0))
    tl.store(factors_ptr + 1, clip)
    tl.store(factors_ptr + 2, lr / remaining(BETA1, count))
    tl.store(factors_ptr + 3, 1.0 / tl.sqrt(remaining(BETA2, count)))


@triton.jit
def adam_step_forward(
    param_ptr,
    grad_ptr,
    mean_ptr,
    square_ptr,
    factors_ptr,
    beta1,
    beta2,
    rest1,
    rest2,
    eps,
    weight_decay,
    numbers,
    BLOCK: tl.constexpr,
):
    """BLOCK numbers of one tensor; rest1 and rest2 are 1 - beta1 and 1 - beta2."""
    if tl.load(factors_ptr) > 0:
        clip, rate, root = tl.load(factors_ptr + 1), tl.load(factors_ptr + 2), tl.load(factors_ptr + 3)
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < numbers
        param = tl.load(param_ptr + at, mask=inside, other=0.0)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + at, mask=inside, other=0.0)
        square = tl.load(square_ptr + at, mask=inside, other=0.0)
        grad = grad * clip + weight_decay * param
        mean = beta1 * mean + rest1 * grad
        square = beta2 * square + rest2 * (grad * grad)
        param -= rate * mean / (tl.sqrt(square) * root + eps)
        tl.store(param_ptr + at, param, mask=inside)
        tl.store(mean_ptr + at, mean, mask=inside)
        tl.store(square_ptr + at, square, mask=inside)


def adam_step_triton(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    step: Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    max_norm: float,
    apply: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `hdfast_kernels.adam_step`; tensors changed in place that are not contiguous are changed in a copy first."""
    changed, count = [*params, *exp_avg, *exp_avg_sq], len(params)
    for tensor in changed:
        if tensor.dtype != torch.float32:
            raise TypeError(f"adam_step: a tensor is {tensor.dtype}, expected float32")
    laid = as_contiguous(changed)
    flat = grads[0].reshape(-1) if count == 1 else torch.cat([grad.reshape(-1) for grad in grads])
    norm = torch.linalg.vector_norm(flat, dtype=torch.float32)
    applied = torch.empty((), dtype=torch.bool, device=step.device)
    factors = torch.empty(FACTORS, dtype=torch.float32, device=step.device)
    rated = isinstance(lr, Tensor)
    adam_step_prepare[(1,)](
        norm, norm if apply is None else apply.view(torch.uint8), lr if rated else norm, step,
        applied.view(torch.uint8), factors, 0.0 if rated else float(lr), float(max_norm),
        float(betas[0]), float(betas[1]), apply is not None, rated, math.isfinite(max_norm), num_warps=1,
    )  # fmt: skip
    parts = flat.split([param.numel() for param in params])
    # Numbers as float: for an integer Triton would compile another kernel, and for a one bake it in as a constant.
    numbers = [float(x) for x in (*betas, 1 - betas[0], 1 - betas[1], eps, weight_decay)]
    for param, grad, mean, square in zip(
        laid[:count], parts, laid[count : 2 * count], laid[2 * count :], strict=True
    ):
        programs = max(1, triton.cdiv(param.numel(), BLOCK))
        adam_step_forward[(programs,)](
            param, grad, mean, square, factors, *numbers, param.numel(), BLOCK, num_warps=WARPS
        )
    copy_back(changed, laid)
    # As in-place operations do, so that backward through earlier results is refused.
    torch.autograd.graph.increment_version([*changed, step])
    return norm, applied
