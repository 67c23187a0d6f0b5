"""sample_onehot on the CPU (csrc/ops/sample_onehot.cpp): backward computes the softmax anew."""

import torch
from torch import Tensor

from . import native
from .autograd import once_differentiable


class _SampleOnehot(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, uniform: Tensor, unimix: float) -> tuple[Tensor, Tensor, Tensor]:
        logits, uniform = logits.contiguous(), native.as_float(uniform)
        stoch, logp = torch.empty_like(logits), native.empty(*logits.shape)
        index = torch.empty(uniform.shape, dtype=torch.int64, device="cpu")
        native.module().sample_onehot_forward(
            native.ptr(logits), native.ptr(uniform), native.ptr(stoch), native.ptr(index), native.ptr(logp),
            index.numel(), logits.shape[-1], unimix, native.is_bf16(logits), native.threads(),
        )  # fmt: skip
        ctx.save_for_backward(logits)
        ctx.unimix = unimix
        ctx.mark_non_differentiable(index)
        return stoch, index, logp

    @staticmethod
    @once_differentiable("sample_onehot")
    def backward(ctx, grad_stoch: Tensor, _, grad_logp: Tensor) -> tuple[Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        grad_stoch, grad_logp = grad_stoch.contiguous(), native.as_float(grad_logp)
        grad_logits, classes = torch.empty_like(logits), logits.shape[-1]
        native.module().sample_onehot_backward(
            native.ptr(grad_stoch), native.ptr(grad_logp), native.ptr(logits), native.ptr(grad_logits),
            logits.shape[:-1].numel(), classes, ctx.unimix, native.is_bf16(logits), native.threads(),
        )  # fmt: skip
        return grad_logits, None, None


sample_onehot_native = _SampleOnehot.apply


def sample_index_native(logits: Tensor, uniform: Tensor, unimix: float, out: Tensor | None = None) -> Tensor:
    """The classes alone, without the distribution; see `sample_index`."""
    logits, uniform = logits.detach().contiguous(), native.as_float(uniform)
    index = torch.empty(uniform.shape, dtype=torch.int64, device="cpu") if out is None else out
    native.module().sample_index_forward(
        native.ptr(logits), native.ptr(uniform), native.ptr(index), index.numel(), logits.shape[-1], unimix,
        native.is_bf16(logits), native.threads(),
    )  # fmt: skip
    return index
