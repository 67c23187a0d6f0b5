"""rssm_observe on the CPU: each direction is one call into C++, the matrices' gradients are GEMMs after it.

C++ (csrc/ops/rssm_observe.cpp) packs the matrices once per call; there is no Python between the steps. Forward
stores what backward reads: the inputs of the three layer norms and the operands of the GEMMs.

Measured on one core of a Xeon with AMX, T=64, B=16, D=U=512, S=K=32, forward + backward against the reference in the
same run: 162 against 433 ms in float32, 64 against 375 ms in bfloat16.
Since then its rows are those of the other ops, which on one core of a Zen 4 took 2 to 14% from it at these widths,
and 20 to 32% at widths of 64.

Axes: T time, B batch, D deter, U units, S groups, K classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import native
from .autograd import once_differentiable
from .linear_native import weight_grad

WEIGHTS = (
    *("is_first", "initial_deter", "initial_index"),
    *("in_stoch", "in_norm_weight", "in_norm_bias", "gru", "gru_norm_weight", "gru_norm_bias"),
    *("post_deter", "post_norm_weight", "post_norm_bias", "logit_weight", "logit_bias"),
)
MATRICES = ("in_stoch", "gru", "post_deter", "logit_weight")
STATE = ("deter", "index", "logp", "in_sum", "gates_sum", "post_sum", "gru_low", "deter_low", "post_low")


class _Observe(torch.autograd.Function):
    @staticmethod
    def forward(ctx, embed, action, is_first, uniform, *rest):
        *weights, unimix, eps = rest
        T, B, S = uniform.shape
        fixed = {}
        low = weights[WEIGHTS.index("gru") - 1].dtype
        for name, value in zip(WEIGHTS, (is_first, *weights), strict=True):
            dtype = {"is_first": torch.bool, "initial_index": torch.int64}.get(name, torch.float32)
            fixed[name] = value.to(low if name in MATRICES else dtype).contiguous()
        D, U = fixed["initial_deter"].shape[0], embed.shape[-1]
        K = fixed["in_stoch"].shape[0] // S
        for group, index in enumerate(fixed["initial_index"].tolist()):
            if not 0 <= index < K:
                raise IndexError(f"rssm_observe: index {index} of group {group} is not in [0, {K})")

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(T, B, *shape, dtype=dtype, device="cpu")

        deter = empty(D)
        state = {
            "deter": deter,
            "index": empty(S, dtype=torch.int64),
            "logp": empty(S, K),
            "in_sum": empty(U),
            "gates_sum": empty(3 * D),
            "post_sum": empty(U),
            "gru_low": empty(D + U, dtype=low),
            "deter_low": deter if low == torch.float32 else empty(D, dtype=low),
            "post_low": empty(U, dtype=low),
        }
        stoch = native.empty(T, B, S, K).zero_()
        inputs = {"embed": embed, "action": action, "uniform": uniform}
        inputs = {name: value.to(torch.float32).contiguous() for name, value in inputs.items()}
        ctx.sizes = {
            "T": T,
            "B": B,
            "D": D,
            "U": U,
            "S": S,
            "K": K,
            "is_bfloat16": int(low == torch.bfloat16),
        }
        ctx.constants = (unimix, eps)
        _call("rssm_observe_forward", ctx, fixed | state | inputs | {"stoch": stoch})
        ctx.save_for_backward(*fixed.values(), *state.values())
        ctx.dtypes = [value.dtype for value in (embed, action, is_first, uniform, *weights)]
        ctx.mark_non_differentiable(state["index"])
        ctx.set_materialize_grads(False)
        return deter, stoch, state["index"], state["logp"]

    @staticmethod
    @once_differentiable("rssm_observe")
    def backward(ctx, grad_deter, grad_stoch, _, grad_logp):
        saved = dict(zip((*WEIGHTS, *STATE), ctx.saved_tensors, strict=True))
        T, B, D, U, S, K, _ = ctx.sizes.values()
        low = saved["gru"].dtype

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(T, B, *shape, dtype=dtype, device="cpu")

        given = {"grad_deter": grad_deter, "grad_stoch": grad_stoch, "grad_logp": grad_logp}
        given = {name: value if value is None else value.contiguous() for name, value in given.items()}
        sizes = (U, U, 3 * D, 3 * D, U, U, S * K, D)
        grad = {
            "grad_in_sum": empty(U),
            "grad_post_sum": empty(U),
            "grad_gates_low": empty(3 * D, dtype=low),
            "grad_logits_low": empty(S * K, dtype=low),
            "grad_in_stoch": native.empty(S * K, U).zero_(),
            "grad_vectors": native.empty(sum(sizes)),
        }
        post = grad["grad_post_sum"]
        grad["grad_post_low"] = post if low == torch.float32 else empty(U, dtype=low)
        _call("rssm_observe_backward", ctx, saved | given | grad)
        in_weight, in_bias, gru_weight, gru_bias, post_weight, post_bias, logit_bias, initial = grad[
            "grad_vectors"
        ].split(sizes)
        gradients = (
            *(post, grad["grad_in_sum"], None, None, initial, None),
            *(grad["grad_in_stoch"], in_weight, in_bias),
            *(_outer(grad["grad_gates_low"], saved["gru_low"]), gru_weight, gru_bias),
            *(_outer(grad["grad_post_low"], saved["deter_low"]), post_weight, post_bias),
            *(_outer(grad["grad_logits_low"], saved["post_low"]), logit_bias),
        )
        typed = [g if g is None else g.to(d) for g, d in zip(gradients, ctx.dtypes, strict=True)]
        return *typed, None, None


def _outer(grad: Tensor, operand: Tensor) -> Tensor:
    """The gradient of a matrix: grad (T, B, out), operand (T, B, in) -> (out, in), in one GEMM."""
    return weight_grad(grad.flatten(0, 1), operand.flatten(0, 1))


def _call(function: str, ctx: Any, tensors: dict[str, Tensor | None]) -> None:
    addresses = {name: 0 if value is None else native.ptr(value) for name, value in tensors.items()}
    getattr(native.module(), function)(*ctx.constants, native.threads(), **ctx.sizes, **addresses)


def rssm_observe_native(*arguments: Tensor | float) -> Sequence[Tensor]:
    """`rssm_observe` in C++; the same arguments, in the same order."""
    return _Observe.apply(*arguments)
