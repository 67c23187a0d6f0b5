"""The whole observe scan of the RSSM, T steps as one op.

    where is_first: deter, stoch <- initial
    x     = SiLU(LN(in_stoch[stoch] + action))                               (B, U)
    g     = LN(gru @ [deter, x]);  r, c, u = split(g)                        (B, 3D)
    deter = sigmoid(u - 1) * tanh(sigmoid(r) * c) + (1 - sigmoid(u - 1)) * deter
    y     = SiLU(LN(post_deter @ deter + embed))                             (B, U)
    p     = (1 - unimix) * softmax(logit_weight @ y + logit_bias) + unimix / K
    stoch = one_hot(#{k: cumsum(p)_k <= uniform}) + p - sg(p)

What does not depend on the recurrent state stays outside: the caller projects embeddings and actions for all
steps at once, and applies the prior to the returned deter.

Axes: T time, B batch, D deter, U units, S groups, K classes. Source: DreamerV3's RSSM (danijar/dreamerv3,
dreamerv3/rssm.py) with HarmonyDream's sizes; the prior head is not part of the op.
"""

import functools
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from hdfast_kernels import dispatch
from hdfast_kernels.layer_norm_gru import layer_norm_gru_reference
from hdfast_kernels.layer_norm_silu import layer_norm_silu_reference
from hdfast_kernels.numerics import (
    check_axes,
    check_device,
    check_eps,
    check_shape,
    check_tensor,
    check_unimix,
    compute_dtype,
)
from hdfast_kernels.rssm_observe_native import rssm_observe_native
from hdfast_kernels.rssm_observe_triton import MOST_CLASSES, fits_one_launch, rssm_observe_triton
from hdfast_kernels.sample_onehot import sample_onehot_reference


def rssm_observe_reference(
    embed: Tensor,
    action: Tensor,
    is_first: Tensor,
    uniform: Tensor,
    initial_deter: Tensor,
    initial_index: Tensor,
    in_stoch: Tensor,
    in_norm_weight: Tensor,
    in_norm_bias: Tensor,
    gru: Tensor,
    gru_norm_weight: Tensor,
    gru_norm_bias: Tensor,
    post_deter: Tensor,
    post_norm_weight: Tensor,
    post_norm_bias: Tensor,
    logit_weight: Tensor,
    logit_bias: Tensor,
    unimix: float = 0.01,
    eps: float = 1e-3,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`rssm_observe`, step by step in plain PyTorch, for any float dtype."""
    T, B, S = uniform.shape
    K = in_stoch.shape[0] // S
    low, work = gru.dtype, compute_dtype(gru)  # of the GEMMs, of everything else
    classes = torch.arange(K, device=uniform.device)
    first_deter = initial_deter.to(work).expand(B, -1)
    first_stoch = (initial_index[:, None] == classes).to(work).expand(B, S, K)
    deter, stoch = first_deter, first_stoch
    steps = []
    for t in range(T):
        first = is_first[t, :, None]
        deter = torch.where(first, first_deter, deter)
        stoch = torch.where(first[..., None], first_stoch, stoch)
        x = (stoch.flatten(-2).to(low) @ in_stoch).to(work) + action[t]  # (B, S*K) -> (B, U)
        x = layer_norm_silu_reference(x, in_norm_weight, in_norm_bias, eps)
        gates = F.linear(torch.cat([deter.to(low), x.to(low)], -1), gru).to(work)
        deter = layer_norm_gru_reference(gates, deter, gru_norm_weight, gru_norm_bias, eps)
        y = F.linear(deter.to(low), post_deter).to(work) + embed[t]
        y = layer_norm_silu_reference(y, post_norm_weight, post_norm_bias, eps)
        logits = (F.linear(y.to(low), logit_weight).to(work) + logit_bias).unflatten(-1, (S, K))
        stoch, index, logp = sample_onehot_reference(logits, uniform[t], unimix)
        steps.append((deter, stoch, index, logp))
    deter, stoch, index, logp = map(torch.stack, zip(*steps, strict=True))
    return deter, stoch, index, logp


dispatch.register(
    "rssm_observe",
    reference=rssm_observe_reference,
    triton=rssm_observe_triton,
    persistent=functools.partial(rssm_observe_triton, persistent=True),
    native=rssm_observe_native,
)


def rssm_observe(
    embed: Tensor,
    action: Tensor,
    is_first: Tensor,
    uniform: Tensor,
    initial_deter: Tensor,
    initial_index: Tensor,
    in_stoch: Tensor,
    in_norm_weight: Tensor,
    in_norm_bias: Tensor,
    gru: Tensor,
    gru_norm_weight: Tensor,
    gru_norm_bias: Tensor,
    post_deter: Tensor,
    post_norm_weight: Tensor,
    post_norm_bias: Tensor,
    logit_weight: Tensor,
    logit_bias: Tensor,
    unimix: float = 0.01,
    eps: float = 1e-3,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the posterior over T steps of B sequences.

    Args:
        embed: (T, B, U) image embedding, projected by the embedding half of the posterior's first layer.
        action: (T, B, U) previous action, projected by the action part of the input layer; zero at is_first.
        is_first: (T, B) bool; such a step starts from the initial state. Step 0 always does.
        uniform: (T, B, S) float32 in [0, 1): the random numbers that choose the classes (inverse CDF).
        initial_deter: (D,) of the initial state, in (-1, 1).
        initial_index: (S,) int64, the classes of the initial latent, in [0, K). Native raises if one is not. The
            others, which may run on a GPU, do not check: to them such a group has no class, a vector of zeros.
        in_stoch: (S*K, U), the latent part of the input layer, one row per class.
        gru: (3D, D+U), rows reset, candidate, update; columns deter, x.
        post_deter: (U, D), the deter half of the posterior's first layer.
        logit_weight, logit_bias: (S*K, U), (S*K,).
        *_norm_weight, *_norm_bias: (U,), (3D,), (U,) float32, of the LayerNorms.
        unimix: share of the uniform distribution in the classes' probabilities.
        eps: of the LayerNorms.
        backend: "reference", "triton", "persistent" (Triton in one launch a direction, for which all programs must
            run at the same time; ValueError if they cannot) or "native"; None takes the fastest that is proven on
            the device, "triton" for "persistent" where not all programs can run at the same time, and "reference"
            for both where a group has more than 128 classes, for which they raise ValueError.

    The matrices (in_stoch, gru, post_deter, logit_weight) share a dtype, which is that of the GEMMs; all else is
    computed in float32 (float64 if they are).

    Returns:
        deter (T, B, D), stoch (T, B, S, K), index (T, B, S) int64 and logp (T, B, S, K), float32. The value
        of stoch is one-hot, its gradient is that of the probabilities. Gradients reach embed, action,
        initial_deter and all weights, through stoch from each step into the next unless that is first.

    Raises:
        ValueError: if shapes or devices do not fit, T is 0, a matrix has another dtype than gru, unimix is outside
            [0, 1) or eps is not positive.
        TypeError: if initial_index holds no integers.
        IndexError: from native, if a class of initial_index is not in [0, K).
        dispatch.BackendError: if the backend cannot run on these tensors.
    """
    check_tensor("rssm_observe", "gru", gru)
    check_axes("rssm_observe", "uniform", uniform, "T", "B", "S")
    check_axes("rssm_observe", "post_deter", post_deter, "U", "D")
    check_axes("rssm_observe", "in_stoch", in_stoch, "S*K", "U")
    T, B, S = uniform.shape
    U, D = post_deter.shape
    classes = in_stoch.shape[0]
    if T == 0 or S == 0 or classes % S:
        raise ValueError(
            f"rssm_observe: uniform {tuple(uniform.shape)} needs T > 0, S > 0 and S dividing {classes} classes"
        )
    given = (
        ("embed", embed, (T, B, U)),
        ("action", action, (T, B, U)),
        ("is_first", is_first, (T, B)),
        ("initial_deter", initial_deter, (D,)),
        ("initial_index", initial_index, (S,)),
        ("in_stoch", in_stoch, (classes, U)),
        ("in_norm_weight", in_norm_weight, (U,)),
        ("in_norm_bias", in_norm_bias, (U,)),
        ("gru", gru, (3 * D, D + U)),
        ("gru_norm_weight", gru_norm_weight, (3 * D,)),
        ("gru_norm_bias", gru_norm_bias, (3 * D,)),
        ("post_norm_weight", post_norm_weight, (U,)),
        ("post_norm_bias", post_norm_bias, (U,)),
        ("logit_weight", logit_weight, (classes, U)),
        ("logit_bias", logit_bias, (classes,)),
    )
    for name, value, shape in given:
        check_shape("rssm_observe", name, value, shape)
        if name in ("in_stoch", "logit_weight") and not value.dtype == post_deter.dtype == gru.dtype:
            raise ValueError(
                f"rssm_observe: {name} is {value.dtype}, post_deter {post_deter.dtype}, gru {gru.dtype}"
            )
    if is_first.dtype != torch.bool:
        raise ValueError(f"rssm_observe: is_first is {is_first.dtype}, expected torch.bool")
    if initial_index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"rssm_observe: initial_index is {initial_index.dtype}, expected int64 or int32")
    check_eps("rssm_observe", eps)
    check_unimix("rssm_observe", unimix)
    tensors = {name: value for name, value, _ in given}
    check_device("rssm_observe", uniform=uniform, post_deter=post_deter, **tensors)
    name = dispatch.resolve_name("rssm_observe", backend, gru)
    asked_for = name in (backend, os.environ.get("HDFAST_BACKEND"))
    if name == "persistent" and not asked_for and not fits_one_launch(B, D, U, gru):
        backend = "triton"
    if name in dispatch.IN_TRITON and not asked_for and classes // S > MOST_CLASSES:
        backend = "reference"
    return dispatch.resolve("rssm_observe", backend, gru)(
        embed,
        action,
        is_first,
        uniform,
        initial_deter,
        initial_index,
        in_stoch,
        in_norm_weight,
        in_norm_bias,
        gru,
        gru_norm_weight,
        gru_norm_bias,
        post_deter,
        post_norm_weight,
        post_norm_bias,
        logit_weight,
        logit_bias,
        unimix,
        eps,
    )
