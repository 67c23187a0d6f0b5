"""How all ops deal with being differentiated twice, and with torch.autocast."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import function


def _autocast() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


def plainly(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation of an op, called with autocast off.

    The dtypes of an op's arguments decide what it computes in. Under autocast, PyTorch would return bfloat16 from one
    step of it, and the next would take that for float32.
    """
    if not _autocast():
        return implementation

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return implementation(*args, **kwargs)

    return call


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Makes it an error to differentiate through `backward`, the backward pass of a torch.autograd.Function.

    PyTorch's decorator of this name does so only if the incoming gradient itself requires a gradient. The gradient of
    a sum does not, so that a gradient penalty on the output of an op would silently be left out. `backward` gets
    gradients with their signs resolved: that of an imaginary part may come in lazily negated.
    """

    refusing = function.once_differentiable(backward)

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> Any:
        grads = tuple(grad if grad is None else grad.resolve_neg() for grad in grads)
        if not torch.is_grad_enabled():
            return plainly(backward)(ctx, *grads)
        if any(ctx.needs_input_grad):
            grads = tuple(
                grad.detach().requires_grad_() if grad is not None and grad.is_floating_point() else grad
                for grad in grads
            )
        return plainly(refusing)(ctx, *grads)

    return wrapper
