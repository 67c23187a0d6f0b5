"""lambda_return on the CPU (csrc/ops/lambda_return.cpp): one pass over time in each direction, in float32."""

import torch
from torch import Tensor

from . import native
from .autograd import once_differentiable


class _LambdaReturn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, reward: Tensor, cont: Tensor, value: Tensor, discount: float, lam: float
    ) -> tuple[Tensor, Tensor]:
        horizon, columns = reward.shape
        reward, cont, dtype = native.as_float(reward), native.as_float(cont), value.dtype
        value = native.as_float(value)
        returns, weight = torch.empty_like(reward), torch.empty_like(cont)
        native.module().lambda_return_forward(
            native.ptr(reward), native.ptr(cont), native.ptr(value), native.ptr(returns), native.ptr(weight),
            horizon, columns, discount, lam, native.threads(),
        )  # fmt: skip
        ctx.save_for_backward(cont)
        ctx.discount, ctx.lam = discount, lam
        weight = weight.to(dtype)
        ctx.mark_non_differentiable(weight)
        return returns.to(dtype), weight

    @staticmethod
    @once_differentiable("lambda_return")
    def backward(ctx, grad: Tensor, _) -> tuple[Tensor | None, ...]:
        (cont,) = ctx.saved_tensors
        grad = native.as_float(grad)
        grad_reward, grad_value = torch.empty_like(grad), torch.empty_like(cont)
        native.module().lambda_return_backward(
            native.ptr(grad), native.ptr(cont), native.ptr(grad_reward), native.ptr(grad_value), *grad.shape,
            ctx.discount, ctx.lam, native.threads(),
        )  # fmt: skip
        return grad_reward, None, grad_value, None, None


lambda_return_native = _LambdaReturn.apply
