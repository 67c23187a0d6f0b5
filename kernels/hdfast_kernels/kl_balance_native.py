"""kl_balance on the CPU (csrc/ops/kl_balance.cpp): one pass forward, one backward for both gradients."""

import torch
from torch import Tensor

from . import native
from .autograd import once_differentiable


class _KLBalance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, post_logp: Tensor, prior_logp: Tensor, free: float) -> tuple[Tensor, Tensor, Tensor]:
        post, prior = post_logp.contiguous(), prior_logp.contiguous()
        if post.dtype != prior.dtype:  # C++ takes one dtype: the wider one
            post, prior = native.as_float(post), native.as_float(prior)
        kl, width = native.empty(*post.shape[:-2]), post.shape[-2:].numel()
        native.module().kl_balance_forward(
            native.ptr(post), native.ptr(prior), native.ptr(kl), kl.numel(), width, native.is_bf16(post),
            native.threads(),
        )  # fmt: skip
        ctx.save_for_backward(post, prior, kl)
        ctx.free, ctx.dtypes = free, (post_logp.dtype, prior_logp.dtype)
        loss = kl.clamp(min=free).to(post_logp.dtype)
        ctx.mark_non_differentiable(kl)
        ctx.set_materialize_grads(False)
        return loss, loss.clone(), kl

    @staticmethod
    @once_differentiable("kl_balance")
    def backward(
        ctx, grad_dyn: Tensor | None, grad_rep: Tensor | None, _: None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        post, prior, kl = ctx.saved_tensors
        trains_post, trains_prior = grad_rep is not None, grad_dyn is not None
        grad_dyn, grad_rep = (
            torch.zeros_like(kl) if grad is None else native.as_float(grad) for grad in (grad_dyn, grad_rep)
        )
        grad_post, grad_prior = torch.empty_like(post), torch.empty_like(prior)
        native.module().kl_balance_backward(
            native.ptr(grad_dyn), native.ptr(grad_rep), native.ptr(post), native.ptr(prior), native.ptr(kl),
            native.ptr(grad_post), native.ptr(grad_prior), kl.numel(), post.shape[-2:].numel(), ctx.free,
            native.is_bf16(post), native.threads(),
        )  # fmt: skip
        of_post, of_prior = grad_post.to(ctx.dtypes[0]), grad_prior.to(ctx.dtypes[1])
        return of_post if trains_post else None, of_prior if trains_prior else None, None


kl_balance_native = _KLBalance.apply
