"""What all ops do about PyTorch's ways to run them: differentiated twice, and under torch.autocast."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import function


def without_autocast(on_cuda: bool) -> contextlib.AbstractContextManager[Any]:
    """Inside, PyTorch computes in the dtypes that tensors have.

    An op says by the dtypes of its arguments what it computes in. Under autocast PyTorch would return bfloat16 from
    one step of it, and the next would take that for float32.
    """
    device = "cuda" if on_cuda else "cpu"
    return (
        torch.autocast(device, enabled=False)
        if torch.is_autocast_enabled(device)
        else contextlib.nullcontext()
    )


def plainly(tensor: Tensor, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation of an op, called without autocast, where autocast is on for the device of `tensor`."""
    if not torch.is_autocast_enabled("cuda" if tensor.is_cuda else "cpu"):
        return implementation

    def call(*args: Any, **kwargs: Any) -> Any:
        with without_autocast(tensor.is_cuda):
            return implementation(*args, **kwargs)

    return call


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Makes it an error to differentiate through `backward`, the backward pass of a torch.autograd.Function.

    PyTorch's decorator of this name does so only where the incoming gradient has one itself. That of a sum has none,
    so that a gradient penalty on what an op gives would be left out without a word.
    """

    @functools.wraps(backward)
    def plain(ctx: Any, *grads: Tensor | None) -> Any:
        with without_autocast(any(grad is not None and grad.is_cuda for grad in grads)):
            return backward(ctx, *grads)

    refusing = function.once_differentiable(plain)

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> Any:
        if not torch.is_grad_enabled():
            return plain(ctx, *grads)
        if any(ctx.needs_input_grad):
            grads = tuple(
                grad.detach().requires_grad_() if grad is not None and grad.is_floating_point() else grad
                for grad in grads
            )
        return refusing(ctx, *grads)

    return wrapper
