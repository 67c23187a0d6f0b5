"""onehot_linear on the CPU (csrc/ops/onehot_linear.cpp): sums of rows, in registers, in both directions.

Forward adds one row of the weight per group; backward sorts the rows by class, group by group, and adds the
rows of the gradient that share a class. The latents' gradient is a GEMM.
"""

import torch
from torch import Tensor

from . import native
from .autograd import once_differentiable
from .linear_native import product


class _OnehotLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, index: Tensor, weight: Tensor, straight_through: Tensor | None, onto: Tensor | None
    ) -> Tensor:
        index, weight = index.to(torch.int64).contiguous(), weight.contiguous()
        onto = None if onto is None else onto.contiguous()
        rows, groups, units = index.shape[:-1].numel(), index.shape[-1], weight.shape[1]
        out, classes = weight.new_empty(*index.shape[:-1], units), weight.shape[0] // groups
        wrong = native.module().onehot_linear_forward(
            native.ptr(index), native.ptr(weight), 0 if onto is None else native.ptr(onto), native.ptr(out), rows,
            groups, classes, units, native.is_bf16(weight), native.threads(),
        )  # fmt: skip
        if wrong >= 0:
            found, group = index.view(-1)[wrong].item(), wrong % groups
            raise IndexError(f"onehot_linear: index {found} of group {group} is not in [0, {classes})")
        ctx.save_for_backward(index, weight)
        ctx.latent_dtype = None if straight_through is None else straight_through.dtype
        return out

    @staticmethod
    @once_differentiable("onehot_linear")
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, weight = ctx.saved_tensors
        grad, grad_weight, grad_latent = grad.contiguous(), None, None
        rows, groups, units = index.shape[:-1].numel(), index.shape[-1], weight.shape[1]
        classes = weight.shape[0] // groups
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight)
            native.module().onehot_linear_backward(
                native.ptr(grad), native.ptr(index), native.ptr(grad_weight), rows, groups, classes, units,
                native.is_bf16(weight), native.threads(),
            )  # fmt: skip
        if ctx.needs_input_grad[2]:
            grad_latent = product(grad.view(rows, units), weight.mT)
            grad_latent = grad_latent.view(*index.shape, classes).to(ctx.latent_dtype)
        return None, grad_weight, grad_latent, grad if ctx.needs_input_grad[3] else None


onehot_linear_native = _OnehotLinear.apply
