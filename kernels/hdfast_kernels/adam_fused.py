"""adam_step by PyTorch's own fused kernel, the one behind torch.optim.Adam(fused=True): a pass over everything.

Before it, one pass lays out the gradients and one takes their norm. The kernel scales gradients in place, which are
the caller's, and takes no two tensors in different orders, as the gradient of a convolution is on a GPU: both are why
it works on a copy. On the CPU it is here to be tested; native is faster.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .numerics import as_contiguous, copy_back


def adam_step_fused(
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
    """See `hdfast_kernels.adam_step`."""
    changed, count = [*params, *exp_avg, *exp_avg_sq], len(params)
    laid = as_contiguous(changed)
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    parts = flat.split([param.numel() for param in params])
    norm = torch.linalg.vector_norm(flat)
    applied = norm.isfinite() if apply is None else norm.isfinite() & apply
    step += applied
    torch._fused_adam_(
        laid[:count],
        [part.view(param.shape) for part, param in zip(parts, params, strict=True)],
        laid[count : 2 * count],
        laid[2 * count :],
        [],
        [step] * count,
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        # What it divides by: infinity where the norm is to be 0, and 1 where it is that already.
        grad_scale=(norm / max_norm).nan_to_num(1.0, math.inf).clamp(min=1.0)
        if math.isfinite(max_norm)
        else None,
        found_inf=(~applied).to(norm.dtype),  # where it is 1, the kernel changes nothing
    )
    copy_back(changed, laid)
    # As in-place operations do, so that a backward through what was computed before is refused.
    torch.autograd.graph.increment_version(changed)
    return norm, applied
