"""A model's weights in the type of its matrix work: all rounded in one launch, their gradients widened in one.

This is for optimizers whose parameters are one tensor, as on CUDA. Casting each weight and each gradient by itself
would add a hundred launches to an update, most of which take longer to start than to run.
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
    """A parameter in `dtype`, differentiably: the copy that `rounded` made of it, else a new cast."""
    known = _rounded.get({}).get(id(parameter))
    return parameter.to(dtype) if known is None or known.dtype != dtype else known


@contextmanager
def rounded(optimizer: Adam, dtype: torch.dtype) -> Iterator[None]:
    """In the block, `in_type` returns the optimizer's parameters from one copy in `dtype`, cast in a single launch.

    Does nothing in float32, or where the parameters are not one tensor. The gradients are written into
    `optimizer.gradient`, so that they are valid only until its next step or the next backward pass.
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
