"""A model's weights in the type of its matrix work: all rounded in one launch, their gradients widened in one.

Where the parameters of an optimizer are one tensor, as on CUDA. A cast of each, and of the gradient of each, is a
hundred launches of an update, most of which take longer to begin than to run.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hdfast.agent.optimizer import Adam, copy_all

_rounded: ContextVar[Mapping[int, Tensor]] = ContextVar("rounded")  # by the parameter's id


def in_type(parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
    """A weight in `dtype`, through which its gradient flows: as `rounded` has made it, else by itself."""
    known = _rounded.get({}).get(id(parameter))
    return parameter.to(dtype) if known is None or known.dtype != dtype else known


@contextmanager
def rounded(optimizer: Adam, dtype: torch.dtype) -> Iterator[None]:
    """Inside, `in_type` knows the optimizer's parameters in `dtype`, if they are one tensor and of another.

    Their gradients are then in the memory of the optimizer: they last until its next step, or the next gradients.
    """
    if not optimizer.held.flat or dtype == torch.float32:
        yield
        return
    weights = _Round.apply(optimizer, dtype, *optimizer.parameters)
    token = _rounded.set(dict(zip(map(id, optimizer.parameters), weights, strict=True)))
    try:
        yield
    finally:
        _rounded.reset(token)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, optimizer: Adam, dtype: torch.dtype, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.optimizer, ctx.dtype = optimizer, dtype
        ctx.set_materialize_grads(False)
        (whole,) = optimizer.held.tensors()
        return tuple(optimizer.gradient.parts_of(whole.to(dtype)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wide = ctx.optimizer.gradient
        narrow = wide.whole.new_zeros(wide.whole.shape, dtype=ctx.dtype)
        places = zip(wide.parts_of(narrow), grads, strict=True)
        given = [(place, grad) for place, grad in places if grad is not None]
        copy_all([place for place, _ in given], [grad for _, grad in given])
        wide.whole.copy_(narrow)
        parts = zip(wide.parts, grads, strict=True)
        return None, None, *(None if grad is None else part for part, grad in parts)
