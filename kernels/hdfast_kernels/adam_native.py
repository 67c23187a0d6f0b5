"""adam_step on the CPU (csrc/ops/adam.cpp): one pass over the gradients for the norm, one over everything."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import native
from .numerics import as_contiguous, copy_back


def adam_step_native(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    step: Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    max_norm: float,
    apply: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `hdfast_kernels.adam_step`; tensors changed in place that are not contiguous are changed in a copy first."""
    changed, count = (*params, *exp_avg, *exp_avg_sq), len(params)
    for tensor in changed:
        if tensor.dtype != torch.float32:
            raise TypeError(f"adam_step: a tensor is {tensor.dtype}, expected float32")
    laid = as_contiguous(changed)
    grads = [native.as_float(grad) for grad in grads]
    norm = native.empty()
    applied = torch.ones((), dtype=torch.bool, device="cpu") if apply is None else apply.clone()
    sizes = torch.tensor([param.numel() for param in params], dtype=torch.int64, device="cpu")
    native.module().adam_step(
        *([native.ptr(tensor) for tensor in tensors]
          for tensors in (laid[:count], grads, laid[count : 2 * count], laid[2 * count :])),
        native.ptr(sizes), count, native.ptr(step), float(lr), *betas, eps, weight_decay, max_norm,
        native.ptr(norm), native.ptr(applied), native.threads(),
    )  # fmt: skip
    copy_back(changed, laid)
    # As in-place operations do, so that backward through earlier results is refused.
    torch.autograd.graph.increment_version([*changed, step])
    return norm, applied
