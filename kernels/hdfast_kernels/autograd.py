"""How all ops deal with being differentiated twice, and with torch.autocast."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _autocast() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


def without_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
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


def once_differentiable(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes it an error to ask for a gradient of `op` that can be differentiated again (`create_graph=True`).

    It decorates the backward pass of a torch.autograd.Function of kernels. PyTorch's decorator of this name waits until
    the second differentiation, and finds it only on some of its ways: a gradient of chosen inputs silently leaves out a
    penalty on the first gradient. The backward pass gets gradients with their signs resolved: that of an imaginary part
    may come in lazily negated.
    """
    # PyTorch itself has no second derivative of the bags of embeddings in the reference of onehot_linear.
    remedy = "a product with one-hot latents" if op == "onehot_linear" else 'backend="reference"'

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *grads: Tensor | None) -> Any:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    f"{op}: its kernels cannot be differentiated twice, which create_graph=True asks for; {remedy} can"
                )
            grads = tuple(grad if grad is None else grad.resolve_neg() for grad in grads)
            return without_autocast(backward)(ctx, *grads)

        return wrapper

    return decorate
