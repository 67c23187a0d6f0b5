"""Both KL terms of the world model, each with its own stop-gradient, and free bits.

    kl  = sum over S, K of exp(post) * (post - prior)
    dyn = max(KL(sg(post) || prior), free)        trains the prior
    rep = max(KL(post || sg(prior)), free)        trains the posterior

Axes: N rows (all leading axes), S groups, K classes.

Source: DreamerV3 (arXiv 2301.04104), equation 4: free bits clip the sum over all groups of one row.
"""

import math

import torch
from torch import Tensor

from . import dispatch
from ._triton import tl, triton
from .autograd import once_differentiable
from .kl_balance_native import kl_balance_native
from .numerics import check_axes, check_device, check_shape, compute_dtype
from .tiles import as_rows


def kl_balance_reference(
    post_logp: Tensor, prior_logp: Tensor, free: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, in plain PyTorch; see `kl_balance`."""
    dtype = compute_dtype(post_logp)
    post, prior = post_logp.to(dtype), prior_logp.to(dtype)
    dyn, rep = _kl(post.detach(), prior), _kl(post, prior.detach())
    # not clamp, whose gradient at free itself depends on PyTorch's version: 1 until 2.13, then 0
    clipped = [torch.where(kl < free, free, kl).to(post_logp.dtype) for kl in (dyn, rep)]
    return clipped[0], clipped[1], rep.detach()


def _kl(post: Tensor, prior: Tensor) -> Tensor:
    return (post.exp() * (post - prior)).sum(dim=(-2, -1))  # (..., S, K) -> (...)


@triton.jit
def kl_balance_forward(
    post_ptr, prior_ptr, kl_ptr, dyn_ptr, rep_ptr, free, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    """One row: its KL, float32, and the same clipped."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, COLUMNS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        post = tl.load(post_ptr + row * COLUMNS + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
        prior = tl.load(prior_ptr + row * COLUMNS + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
        total += tl.exp(post) * (post - prior)
    kl = tl.sum(total, axis=0)
    clipped = tl.where(kl < free, free, kl).to(dyn_ptr.dtype.element_ty)  # a NaN stays one
    tl.store(kl_ptr + row, kl)
    tl.store(dyn_ptr + row, clipped)
    tl.store(rep_ptr + row, clipped)


@triton.jit
def kl_balance_backward(
    post_ptr,
    prior_ptr,
    kl_ptr,
    ddyn_ptr,
    drep_ptr,
    dpost_ptr,
    dprior_ptr,
    free,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    open_ = tl.where(tl.load(kl_ptr + row) < free, 0.0, 1.0)
    ddyn = tl.load(ddyn_ptr + row).to(tl.float32) * open_
    drep = tl.load(drep_ptr + row).to(tl.float32) * open_
    for start in range(0, COLUMNS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        at = row * COLUMNS + column
        post = tl.load(post_ptr + at, mask=column < COLUMNS, other=0.0).to(tl.float32)
        prior = tl.load(prior_ptr + at, mask=column < COLUMNS, other=0.0).to(tl.float32)
        prob = tl.exp(post)
        dpost = drep * prob * (post - prior + 1.0)
        tl.store(dpost_ptr + at, dpost.to(dpost_ptr.dtype.element_ty), mask=column < COLUMNS)
        tl.store(dprior_ptr + at, (-ddyn * prob).to(dprior_ptr.dtype.element_ty), mask=column < COLUMNS)


class _KLBalance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, post_logp: Tensor, prior_logp: Tensor, free: float) -> tuple[Tensor, Tensor, Tensor]:
        leading, columns = post_logp.shape[:-2], post_logp.shape[-2] * post_logp.shape[-1]
        post, prior = as_rows(post_logp, columns), as_rows(prior_logp, columns)
        kl = torch.empty(len(post), dtype=torch.float32, device=post.device)
        dyn, rep = torch.empty_like(kl, dtype=post.dtype), torch.empty_like(kl, dtype=post.dtype)
        if len(post):
            block, warps = _launch(columns)
            kl_balance_forward[(len(post),)](post, prior, kl, dyn, rep, free, columns, block, num_warps=warps)
        ctx.save_for_backward(post, prior, kl)
        ctx.free, ctx.shape = free, post_logp.shape
        shown = kl.view(leading)
        ctx.mark_non_differentiable(shown)
        ctx.set_materialize_grads(False)
        return dyn.view(leading), rep.view(leading), shown

    @staticmethod
    @once_differentiable("kl_balance")
    def backward(
        ctx, ddyn: Tensor | None, drep: Tensor | None, _: None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        post, prior, kl = ctx.saved_tensors
        trains_post, trains_prior = drep is not None, ddyn is not None
        ddyn, drep = (torch.zeros_like(kl) if grad is None else grad for grad in (ddyn, drep))
        dpost, dprior = torch.empty_like(post), torch.empty_like(prior)
        if len(post):
            block, warps = _launch(post.shape[1])
            kl_balance_backward[(len(post),)](
                post, prior, kl, ddyn.contiguous(), drep.contiguous(), dpost, dprior, ctx.free, post.shape[1],
                block, num_warps=warps,
            )  # fmt: skip
        dpost, dprior = dpost.view(ctx.shape), dprior.view(ctx.shape)
        return dpost if trains_post else None, dprior if trains_prior else None, None


def _launch(columns: int) -> tuple[int, int]:
    """Block and warps: 8 numbers a thread are two 16-byte loads of float32; a 32 x 32 row is one block."""
    block = min(1024, triton.next_power_of_2(columns))
    return block, max(1, block // 256)


def kl_balance(
    post_logp: Tensor, prior_logp: Tensor, free: float = 1.0, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The dynamics and the representation loss from posterior and prior log-probabilities, and the KL itself.

    Args:
        post_logp, prior_logp: (..., S, K) normalised log-probabilities, finite (see `sample_onehot`).
        free: nats below which a row's KL is clipped.
        backend: "reference", "triton" or "native"; None lets `dispatch` choose.

    Returns dyn, rep and kl, each (...). dyn and rep, in the dtype of post_logp, have the same value; dyn has a gradient
    to prior_logp only, rep to post_logp only, and a row whose KL is below `free` has none. kl, in nats and float32
    (float64 for float64), is not clipped and has no gradient.

    Raises ValueError on shapes or devices that do not fit or a free that is no number; `dispatch.BackendError` if the
    backend cannot run here.
    """
    check_axes("kl_balance", "post_logp", post_logp, "...", "S", "K")
    check_shape("kl_balance", "prior_logp", prior_logp, post_logp.shape)
    check_device("kl_balance", post_logp=post_logp, prior_logp=prior_logp)
    if math.isnan(free):
        raise ValueError("kl_balance: free is NaN, expected a number of nats")
    return dispatch.resolve("kl_balance", backend, post_logp)(post_logp, prior_logp, free)


dispatch.register(
    "kl_balance",
    reference=kl_balance_reference,
    triton=_KLBalance.apply,
    native=kl_balance_native,
)
