"""The harmonious reduction of per-row losses to the one scalar that the world model descends.

    total = sum_l weight_l * mean(L_l) * exp(-s_g(l)) + sum_g regularizer_g * log(1 + exp(s_g))

Axes: L losses, G groups; g(l) is the group of loss l, and a loss without a group has no exp(-s) factor.

Its gradient to s_g is -exp(-s_g) * (the group's weighted mean loss) + regularizer_g * sigmoid(s_g), so that a
group settles where exp(-s) = (sqrt(1 + 4/L) - 1) / 2: a large loss is damped, a small one lifted, neither
without bound.

Source: HarmonyDream (arXiv 2310.00344), equation 6, rectified; thuml/HarmonyDream `dreamerv3-jax` for the KL
terms, which share one s with weights 5/6 and 1/6 and carry the regulariser with weight 5/6.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from ._triton import tl, triton
from .autograd import once_differentiable
from .harmony_loss_native import harmony_loss_native
from .numerics import as_contiguous, check_device, check_shape, check_tensor, compute_dtype

# Forward is one program, so that one launch gives the whole sum: 1,024 rows are one block of 4 numbers a
# thread, all losses' loads in flight together. Tens of thousands of rows would want a program for each loss
# and a second launch.
BLOCK, WARPS = 1024, 8


def harmony_loss_reference(
    losses: Sequence[Tensor],
    log_sigma: Tensor,
    group: tuple[int, ...],
    weight: tuple[float, ...],
    regularizer: tuple[float, ...],
) -> tuple[Tensor, Tensor]:
    """The definition, in plain PyTorch; see `harmony_loss`."""
    dtype = compute_dtype(losses[0])
    means = [loss.to(dtype).mean() for loss in losses]
    scales, bounds = torch.exp(-log_sigma).unbind(), F.softplus(log_sigma).unbind()
    terms = [
        w * mean * scales[g] if g >= 0 else w * mean for mean, g, w in zip(means, group, weight, strict=True)
    ]
    terms += [c * bound for c, bound in zip(regularizer, bounds, strict=True)]
    return torch.stack(terms).sum(), torch.stack(means).detach()


@triton.jit
def harmony_loss_forward(
    loss_ptrs,  # tuple of L pointers
    log_sigma_ptr,
    total_ptr,
    means_ptr,
    rows,
    GROUP: tl.constexpr,
    WEIGHT: tl.constexpr,
    REGULARIZER: tl.constexpr,
    L: tl.constexpr,
    G: tl.constexpr,
    ITERATIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    total = 0.0
    for loss in tl.static_range(L):
        partial, beyond = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for iteration in range(ITERATIONS):
            row = tl.cast(iteration, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            term = tl.load(loss_ptrs[loss] + row, mask=row < rows, other=0.0).to(tl.float32) - beyond
            grown = partial + term
            beyond = (grown - partial) - term  # what rounding added: Kahan's sum, for millions of rows
            partial = grown
        mean = tl.div_rn(tl.sum(partial, axis=0), tl.cast(rows, tl.float32))
        tl.store(means_ptr + loss, mean)
        if GROUP[loss] >= 0:
            total += WEIGHT[loss] * mean * tl.exp(-tl.load(log_sigma_ptr + GROUP[loss]))
        else:
            total += WEIGHT[loss] * mean
    for group in tl.static_range(G):
        s = tl.load(log_sigma_ptr + group)
        total += REGULARIZER[group] * (tl.maximum(s, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(s))))
    tl.store(total_ptr, total)


@triton.jit
def harmony_loss_backward(
    dloss_ptrs,  # tuple of L pointers
    log_sigma_ptr,
    dtotal_ptr,
    means_ptr,
    dlog_sigma_ptr,
    rows,
    GROUP: tl.constexpr,
    WEIGHT: tl.constexpr,
    REGULARIZER: tl.constexpr,
    L: tl.constexpr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtotal = tl.load(dtotal_ptr)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for loss in tl.static_range(L):
        slope = tl.div_rn(dtotal * WEIGHT[loss], tl.cast(rows, tl.float32))
        if GROUP[loss] >= 0:
            slope *= tl.exp(-tl.load(log_sigma_ptr + GROUP[loss]))
        element = dloss_ptrs[loss].dtype.element_ty
        tl.store(dloss_ptrs[loss] + row, tl.full((BLOCK,), slope, tl.float32).to(element), mask=row < rows)
    if tl.program_id(0) == 0:
        for group in tl.static_range(G):
            s = tl.load(log_sigma_ptr + group)
            pull = 0.0
            for loss in tl.static_range(L):
                if GROUP[loss] == group:
                    pull += WEIGHT[loss] * tl.load(means_ptr + loss)
            slope = REGULARIZER[group] * tl.sigmoid(s) - tl.exp(-s) * pull
            tl.store(dlog_sigma_ptr + group, dtotal * slope)


class _HarmonyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        log_sigma: Tensor,
        group: tuple[int, ...],
        weight: tuple[float, ...],
        regularizer: tuple[float, ...],
        *losses: Tensor,
    ) -> tuple[Tensor, Tensor]:
        (log_sigma, *held), rows = as_contiguous((log_sigma, *losses)), losses[0].numel()
        total, means = log_sigma.new_empty(()), log_sigma.new_empty(len(losses))
        block = min(BLOCK, triton.next_power_of_2(rows))
        harmony_loss_forward[(1,)](
            tuple(held), log_sigma, total, means, rows,
            group, weight, regularizer, len(losses), len(regularizer), triton.cdiv(rows, block), block,
            num_warps=WARPS,
        )  # fmt: skip
        ctx.save_for_backward(log_sigma, means)
        ctx.constants = group, weight, regularizer
        ctx.like = [(loss.shape, loss.dtype) for loss in losses]
        ctx.mark_non_differentiable(means)
        return total, means

    @staticmethod
    @once_differentiable("harmony_loss")
    def backward(ctx, dtotal: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        log_sigma, means = ctx.saved_tensors
        dlosses = tuple(torch.empty(shape, dtype=dtype, device=means.device) for shape, dtype in ctx.like)
        dlog_sigma, rows = torch.empty_like(log_sigma), dlosses[0].numel()
        block = min(BLOCK, triton.next_power_of_2(rows))
        harmony_loss_backward[(triton.cdiv(rows, block),)](
            dlosses, log_sigma, dtotal, means, dlog_sigma, rows,
            *ctx.constants, len(dlosses), len(log_sigma), block, num_warps=WARPS,
        )  # fmt: skip
        return dlog_sigma, None, None, None, *dlosses


def _harmony_loss_triton(
    losses: Sequence[Tensor],
    log_sigma: Tensor,
    group: tuple[int, ...],
    weight: tuple[float, ...],
    regularizer: tuple[float, ...],
) -> tuple[Tensor, Tensor]:
    return _HarmonyLoss.apply(log_sigma, tuple(group), tuple(weight), tuple(regularizer), *losses)


def harmony_loss(
    losses: Sequence[Tensor],
    log_sigma: Tensor,
    group: tuple[int, ...],
    weight: tuple[float, ...],
    regularizer: tuple[float, ...],
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Weigh, average and add up losses, with learned harmony weights.

    `Harmonizer` holds log_sigma and does the bookkeeping of the tuples.

    Args:
        losses: L >= 1 tensors of one shape (...), not empty, float32 or bfloat16; one loss value per row.
        log_sigma: (G,) float32, the s of each group; G may be 0.
        group: for each loss its group in [0, G), or -1 for a loss that is not harmonised.
        weight: for each loss its constant factor.
        regularizer: for each group the factor of log(1 + exp(s)).
        backend: "reference", "triton" or "native"; None lets `dispatch` choose (by the first loss).

    Returns:
        total: scalar float32, differentiable in the losses and in log_sigma.
        means: (L,) float32, the raw mean of each loss, detached.

    Raises ValueError on lengths, groups, shapes or devices that do not fit; `dispatch.BackendError` if the backend
    cannot run here.
    """
    if not losses or not len(losses) == len(group) == len(weight):
        raise ValueError(
            f"harmony_loss: {len(losses)} losses, {len(group)} groups, {len(weight)} weights; expected "
            "as many of each, and at least 1"
        )
    check_shape("harmony_loss", "log_sigma", log_sigma, (len(regularizer),))
    check_tensor("harmony_loss", "losses[0]", losses[0])
    if not losses[0].numel():
        raise ValueError("harmony_loss: the losses are empty and have no mean")
    device = log_sigma.device
    for position, (loss, number) in enumerate(zip(losses, group, strict=True)):
        check_shape("harmony_loss", f"losses[{position}]", loss, losses[0].shape)
        if loss.device != device:
            check_device("harmony_loss", log_sigma=log_sigma, **{f"losses[{position}]": loss})
        if not -1 <= number < len(regularizer):
            raise ValueError(
                f"harmony_loss: group[{position}] is {number}, expected -1 to {len(regularizer) - 1}"
            )
    return dispatch.resolve("harmony_loss", backend, losses[0])(losses, log_sigma, group, weight, regularizer)


dispatch.register(
    "harmony_loss",
    reference=harmony_loss_reference,
    triton=_harmony_loss_triton,
    native=harmony_loss_native,
)
