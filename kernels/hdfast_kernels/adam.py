"""One Adam step of many parameters, with the gradient clipped to a global norm, and skipped if that is not finite.

    norm  = sqrt(sum of grad^2 over all parameters)
    grad  = grad * min(1, max_norm / norm) + weight_decay * param
    m, v  = beta1 m + (1 - beta1) grad,  beta2 v + (1 - beta2) grad^2
    param = param - lr * m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps)

A step whose norm is infinite or NaN changes nothing, not even the step count. That is decided on the device, and
the step count is a tensor, so that the op can be captured in a CUDA graph and replayed.

Source: Kingma and Ba (arXiv 1412.6980); clipped as by optax's clip_by_global_norm, which the authors of
HarmonyDream use; weight decay is coupled, as in DreamerV2.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import dispatch
from .adam_native import adam_step_native
from .adam_triton import adam_step_triton
from .numerics import check_device, check_shape


def adam_step_reference(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    step: Tensor,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_norm: float = math.inf,
    apply: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, in plain PyTorch; see `adam_step`."""
    grads = [grad.to(param.dtype) for grad, param in zip(grads, params, strict=True)]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    applied = norm.isfinite() if apply is None else norm.isfinite() & apply
    keep = applied.to(norm.dtype)
    # A skipped step has gradients of zero, betas of one and a learning rate of zero.
    clip = max_norm / norm.clamp(min=max_norm) if math.isfinite(max_norm) else torch.ones_like(norm)
    # As one tensor, so that one operation removes what is not finite; each part in its parameter's memory order, or
    # foreach operations would do one parameter at a time: the gradient of a convolution is channels-last.
    flat = torch.cat([grad.reshape(-1) for grad in grads]).mul_(torch.where(applied, clip, 0.0))
    parts = flat.nan_to_num_(0.0, 0.0, 0.0).split([param.numel() for param in params])
    scaled = [part.view_as(param) for part, param in zip(parts, params, strict=True)]
    if weight_decay:
        torch._foreach_add_(scaled, torch._foreach_mul(params, keep * weight_decay))
    step += keep
    count = step.clamp(min=1.0)  # a skipped first step would divide by zero
    (beta1, beta2), lr = betas, keep * lr
    torch._foreach_mul_(exp_avg, 1 - keep * (1 - beta1))
    torch._foreach_add_(exp_avg, scaled, alpha=1 - beta1)
    torch._foreach_mul_(exp_avg_sq, 1 - keep * (1 - beta2))
    torch._foreach_addcmul_(exp_avg_sq, scaled, scaled, value=1 - beta2)
    root = torch._foreach_sqrt(exp_avg_sq)
    torch._foreach_div_(root, (1 - beta2**count).sqrt())
    torch._foreach_add_(root, eps)
    change = torch._foreach_div(exp_avg, root)
    torch._foreach_mul_(change, -lr / (1 - beta1**count))
    torch._foreach_add_(params, change)
    return norm, applied


@torch.no_grad()
def adam_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    step: Tensor,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_norm: float = math.inf,
    apply: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Update `params`, `exp_avg`, `exp_avg_sq` and `step` in place.

    Args:
        params, grads, exp_avg, exp_avg_sq: at least one float32 tensor each, shapes alike by position, on one
            device. All but the reference copy those that are not contiguous, and back.
        step: scalar float32, the number of steps done; becomes one more.
        lr: learning rate, a number or a scalar tensor on the parameters' device.
        betas, eps: of Adam; betas in [0, 1).
        weight_decay: added to the gradient times the parameter, after the clip.
        max_norm: the global norm that the gradient is scaled down to where it is larger.
        apply: scalar bool tensor; False skips the step too.
        backend: "reference", "triton" or "native"; None lets `dispatch` choose.

    Returns:
        norm: scalar float32, the global norm before the clip.
        applied: scalar bool, whether the norm is finite and `apply` is not False; if not, nothing was changed.

    Raises ValueError on tensors that do not fit together, None among them, a `step`, `lr` or `apply` that is no such
    scalar, or betas out of range; `dispatch.BackendError` if the backend cannot run here.
    """
    params, grads, exp_avg, exp_avg_sq = list(params), list(grads), list(exp_avg), list(exp_avg_sq)
    _check_fit(params, grads=grads, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    _check_scalar("step", step, torch.float32)
    if apply is not None:
        _check_scalar("apply", apply, torch.bool)
    rate = lr if isinstance(lr, Tensor) else None
    if rate is not None:
        _check_scalar("lr", rate, rate.dtype)
    check_device("adam_step", params=params[0], step=step, apply=apply, lr=rate)
    beta1, beta2 = betas
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"adam_step: betas are {tuple(betas)}, expected two numbers in [0, 1)")
    run = dispatch.resolve("adam_step", backend, params[0])
    return run(params, grads, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay, max_norm, apply)


def _check_fit(params: list[Tensor], **others: list[Tensor]) -> None:
    """Raise ValueError unless all are tensors on one device, as many of each, shapes alike by position."""
    if not params or any(len(tensors) != len(params) for tensors in others.values()):
        counts = ", ".join(f"{len(tensors)} {name}" for name, tensors in others.items())
        raise ValueError(
            f"adam_step: {len(params)} params, {counts}; expected as many of each, and at least 1"
        )
    lists = {"params": params, **others}
    if _fit(*lists.values()):
        return
    for name, tensors in lists.items():  # hundreds of them, so names are built only for a message
        for position, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            place = f"{name}[{position}]"
            if not isinstance(tensor, Tensor):
                raise ValueError(
                    f"adam_step: {place} is {tensor}, expected a tensor; leave its parameter out"
                )
            check_shape("adam_step", place, tensor, param.shape)
            check_device("adam_step", **{"params[0]": params[0], place: tensor})


def _fit(params: list[Tensor], *others: list[Tensor]) -> bool:
    try:
        shapes, device = [param.shape for param in params], params[0].device
        return all([tensor.shape for tensor in tensors] == shapes for tensors in others) and all(
            tensor.device == device for tensors in (params, *others) for tensor in tensors
        )
    except AttributeError:
        return False


def _check_scalar(name: str, value: Tensor, dtype: torch.dtype) -> None:
    if not isinstance(value, Tensor) or value.ndim or value.dtype != dtype:
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(f"adam_step: {name} is {got}, expected a {kind} scalar tensor")


dispatch.register(
    "adam_step",
    reference=adam_step_reference,
    triton=adam_step_triton,
    native=adam_step_native,
    dtypes=(torch.float32,),
)
