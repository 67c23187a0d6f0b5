"""Lambda-returns over an imagined rollout, and the discount weight of each of its steps.

    returns[H] = value[H]
    returns[t] = reward[t] + discount * cont[t+1] * ((1 - lam) * value[t+1] + lam * returns[t+1])
    weight[t]  = prod_{i <= t} (discount * cont[i]) / discount

Axes: H horizon (steps), N rows; states are numbered 0..H, and reward[t] is the reward of state t+1.

Source: DreamerV2 (arXiv 2010.02193), equation 4, indexed as DreamerV3's code does.
"""

import torch
from torch import Tensor

from . import dispatch
from ._triton import tl, triton
from .autograd import once_differentiable
from .lambda_return_native import lambda_return_native
from .numerics import as_contiguous, check_device, check_shape, check_tensor, compute_dtype

DISCOUNT = 1 - 1 / 333

# One warp for 32 columns: 1,024 rollouts of 15 steps are 32 programs, each a chain of 15 steps that waits for
# memory.
BLOCK, WARPS = 32, 1


def lambda_return_reference(
    reward: Tensor, cont: Tensor, value: Tensor, discount: float = DISCOUNT, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """The definition, in plain PyTorch; see `lambda_return`."""
    dtype, out_dtype = compute_dtype(value), value.dtype
    reward, discounts, value = reward.to(dtype), discount * cont.detach().to(dtype), value.to(dtype)
    weight = discounts.cumprod(dim=0) / discount
    one_step = reward + (1 - lam) * discounts[1:] * value[1:]  # (H, N)
    returns = [value[-1]]
    for step, decay in zip(
        reversed(one_step.unbind()), reversed((lam * discounts[1:]).unbind()), strict=True
    ):
        returns.append(torch.addcmul(step, decay, returns[-1]))
    return torch.stack(returns[:0:-1]).to(out_dtype), weight.to(out_dtype)


@triton.jit
def lambda_return_forward(
    reward_ptr,
    cont_ptr,
    value_ptr,
    returns_ptr,
    weight_ptr,
    columns,
    DISCOUNT: tl.constexpr,
    LAM: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    weight = tl.full((BLOCK,), 1.0 / DISCOUNT, tl.float32)
    for step in range(H + 1):
        at = tl.cast(step, tl.int64) * columns + column
        weight *= DISCOUNT * tl.load(cont_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(weight_ptr + at, weight.to(weight_ptr.dtype.element_ty), mask=inside)
    returns = tl.load(value_ptr + tl.cast(columns, tl.int64) * H + column, mask=inside, other=0.0).to(
        tl.float32
    )
    for back in range(H):
        at = tl.cast(H - 1 - back, tl.int64) * columns + column
        reward = tl.load(reward_ptr + at, mask=inside, other=0.0).to(tl.float32)
        cont = tl.load(cont_ptr + at + columns, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(value_ptr + at + columns, mask=inside, other=0.0).to(tl.float32)
        returns = reward + DISCOUNT * cont * ((1.0 - LAM) * value + LAM * returns)
        tl.store(returns_ptr + at, returns.to(returns_ptr.dtype.element_ty), mask=inside)


@triton.jit
def lambda_return_backward(
    cont_ptr,
    dreturns_ptr,
    dreward_ptr,
    dvalue_ptr,
    columns,
    DISCOUNT: tl.constexpr,
    LAM: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    carry = tl.zeros((BLOCK,), tl.float32)  # what reaches returns[step] from the returns before it
    # value[0] is in no return
    tl.store(dvalue_ptr + column, carry.to(dvalue_ptr.dtype.element_ty), mask=inside)
    for step in range(H):
        at = tl.cast(step, tl.int64) * columns + column
        slope = carry + tl.load(dreturns_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dreward_ptr + at, slope.to(dreward_ptr.dtype.element_ty), mask=inside)
        slope *= DISCOUNT * tl.load(cont_ptr + at + columns, mask=inside, other=0.0).to(tl.float32)
        carry = LAM * slope
        dvalue = (1.0 - LAM) * slope
        if step == H - 1:
            dvalue += carry  # the bootstrap
        tl.store(dvalue_ptr + at + columns, dvalue.to(dvalue_ptr.dtype.element_ty), mask=inside)


class _LambdaReturn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, reward: Tensor, cont: Tensor, value: Tensor, discount: float, lam: float
    ) -> tuple[Tensor, Tensor]:
        reward, cont, value = as_contiguous((reward, cont, value))
        returns, weight = torch.empty_like(reward, dtype=value.dtype), torch.empty_like(value)
        H, N = reward.shape
        lambda_return_forward[(max(1, triton.cdiv(N, BLOCK)),)](
            reward, cont, value, returns, weight, N, discount, lam, H, BLOCK, num_warps=WARPS
        )
        ctx.save_for_backward(cont)
        ctx.discount, ctx.lam, ctx.dtypes = discount, lam, (reward.dtype, value.dtype)
        ctx.mark_non_differentiable(weight)
        return returns, weight

    @staticmethod
    @once_differentiable("lambda_return")
    def backward(ctx, dreturns: Tensor, _: Tensor) -> tuple[Tensor, None, Tensor, None, None]:
        (cont,), (H, N), (reward, value) = ctx.saved_tensors, dreturns.shape, ctx.dtypes
        dreturns = dreturns.contiguous()
        dreward, dvalue = torch.empty_like(dreturns, dtype=reward), torch.empty_like(cont, dtype=value)
        lambda_return_backward[(max(1, triton.cdiv(N, BLOCK)),)](
            cont, dreturns, dreward, dvalue, N, ctx.discount, ctx.lam, H, BLOCK, num_warps=WARPS
        )
        return dreward, None, dvalue, None, None


def lambda_return(
    reward: Tensor,
    cont: Tensor,
    value: Tensor,
    discount: float = DISCOUNT,
    lam: float = 0.95,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The lambda-return of each imagined step, and the probability-and-discount weight of each state.

    Args:
        reward: (H, N), H >= 1; reward[t] is received on arriving at state t+1.
        cont: (H+1, N) the probability that the episode goes on after each state; gets no gradient.
        value: (H+1, N) the critic's value of each state; value[H] is the bootstrap.
        discount: in (0, 1].
        lam: in [0, 1].
        backend: "reference", "triton" or "native"; None lets `dispatch` choose (by value).

    Returns:
        returns: (H, N) in value's dtype; differentiable in reward and value.
        weight: (H+1, N) in value's dtype, detached; weight[0] is cont[0].

    Raises ValueError on shapes or devices that do not fit, a discount outside (0, 1] or a lam outside [0, 1];
    `dispatch.BackendError` if the backend cannot run here.
    """
    check_tensor("lambda_return", "reward", reward)
    if reward.ndim != 2 or not reward.shape[0]:
        raise ValueError(
            f"lambda_return: reward has shape {tuple(reward.shape)}, expected (H, N) with H >= 1"
        )
    states = (reward.shape[0] + 1, reward.shape[1])
    check_shape("lambda_return", "cont", cont, states)
    check_shape("lambda_return", "value", value, states)
    if not 0 < discount <= 1:
        raise ValueError(f"lambda_return: discount is {discount}, expected a number in (0, 1]")
    if not 0 <= lam <= 1:
        raise ValueError(f"lambda_return: lam is {lam}, expected a number in [0, 1]")
    check_device("lambda_return", value=value, reward=reward, cont=cont)
    return dispatch.resolve("lambda_return", backend, value)(reward, cont, value, discount, lam)


dispatch.register(
    "lambda_return",
    reference=lambda_return_reference,
    triton=_LambdaReturn.apply,
    native=lambda_return_native,
)
