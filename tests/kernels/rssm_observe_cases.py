"""Inputs for rssm_observe, and its mathematics written independently of the op, in float64.

Axes: T time, B batch, D deter, U units, S groups, K classes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

WEIGHTS = (
    *("in_stoch", "in_norm_weight", "in_norm_bias", "gru", "gru_norm_weight", "gru_norm_bias"),
    *("post_deter", "post_norm_weight", "post_norm_bias", "logit_weight", "logit_bias"),
)
MATRICES = ("in_stoch", "gru", "post_deter", "logit_weight")
DIFFERENTIABLE = ("embed", "action", "initial_deter", *WEIGHTS)
UNIMIX = 0.01


class Sizes(NamedTuple):
    T: int
    B: int
    D: int
    U: int
    S: int
    K: int


def make_case(
    sizes: Sizes, seed: int = 0, likely: bool = False, unimix: float = UNIMIX
) -> dict[str, Tensor | float]:
    """Float64 arguments of rssm_observe whose samples do not depend on rounding.

    Each uniform number lies in the middle of its class's interval of the float64 distribution function; `likely`
    takes the most probable class, whose interval is wide enough for bfloat16.
    """
    T, B, D, U, S, K = sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        # Numbers that bfloat16 can represent, so that every dtype starts from the same ones.
        return (torch.randn(*shape, generator=generator) * scale).bfloat16().double()

    case = {
        "embed": normal(T, B, U),
        "action": normal(T, B, U),
        "is_first": torch.rand(T, B, generator=generator) < 0.2,
        "uniform": torch.rand(T, B, S, generator=generator),
        "initial_deter": normal(D, scale=0.5).tanh().bfloat16().double(),
        "initial_index": torch.randint(0, K, (S,), generator=generator),
        "in_stoch": normal(S * K, U, scale=S**-0.5),
        "in_norm_weight": 1 + normal(U, scale=0.125),
        "in_norm_bias": normal(U, scale=0.125),
        "gru": normal(3 * D, D + U, scale=(D + U) ** -0.5),
        "gru_norm_weight": 1 + normal(3 * D, scale=0.125),
        "gru_norm_bias": normal(3 * D, scale=0.125),
        "post_deter": normal(U, D, scale=D**-0.5),
        "post_norm_weight": 1 + normal(U, scale=0.125),
        "post_norm_bias": normal(U, scale=0.125),
        "logit_weight": normal(S * K, U, scale=2 * U**-0.5),
        "logit_bias": normal(S * K, scale=0.25),
        "unimix": unimix,
    }
    case["is_first"][:1] = True
    case["action"] *= ~case["is_first"][..., None]
    case["uniform"] = expected(case, likely=likely, recentre=True)["uniform"].float()
    return case


def level_case(sizes: Sizes) -> dict[str, Tensor | float]:
    """A case for float32 in which every layer norm gets rows of equal, large numbers, and so returns its bias.

    Each sequence begins anew at each step, from a deter with a single nonzero number: the gates' sums are exact.
    """
    T, B, D, U = sizes[:4]
    case, generator = make_case(sizes), torch.Generator().manual_seed(1)
    zero = ("in_stoch", "in_norm_bias", "initial_deter")
    case |= {name: torch.zeros_like(case[name]) for name in zero}
    case["is_first"] = torch.ones(T, B, dtype=torch.bool)
    case["initial_deter"][D // 2] = 0.5
    for name in ("action", "embed"):
        case[name] = 1000 * torch.rand(T, B, 1, generator=generator).double().expand(T, B, U)
    case["gru"] = torch.full_like(case["gru"], 731.7)
    case["post_deter"] = torch.zeros_like(case["post_deter"])
    case["uniform"] = expected(case, recentre=True)["uniform"].float()
    return case


def check_level_case(function: Callable[[dict], dict], run: Callable[..., dict], sizes: Sizes) -> None:
    """The rounding error of the mean must not be divided by a deviation of zero, which eps makes 1/32."""
    case = level_case(sizes)
    ours, theirs = run(function, cast(case, torch.float32)), run(expected, case)
    assert torch.equal(ours["index"], theirs["index"])
    norms = [f"grad {name}_norm_weight" for name in ("in", "gru", "post")]  # zero, but for rounding
    for name in ("deter", "logp", *norms):
        wrong = (ours[name].double() - theirs[name]).abs().max().item()
        assert wrong < 1e-5, f"{name} errs {wrong:.3g}"


def check_impossible_classes(function: Callable[[dict], dict]) -> None:
    """A class without probability is not drawn, not even by a number on its edge, until no other is left."""
    case = cast(make_case(Sizes(T=1, B=5, D=16, U=16, S=2, K=8), unimix=0.0), torch.float32)
    case["logit_weight"][:] = 0
    case["logit_bias"] = torch.tensor([-1e4, 0.0, -1e4, 0.0, -1e4, -1e4, -1e4, -1e4]).repeat(2)
    numbers = torch.tensor([2**-24, 0.25, 0.5, 0.75, 1.0])
    case["uniform"] = numbers[None, :, None].expand_as(case["uniform"])
    index = function(case)["index"]
    assert torch.equal(index, torch.tensor([1, 1, 3, 3, 7])[None, :, None].expand_as(index))


def cast(case: dict[str, Tensor | float], dtype: torch.dtype) -> dict[str, Tensor | float]:
    """The case as an agent passes it: matrices, embed and action in `dtype`, the rest at least in float32."""
    wide = torch.promote_types(dtype, torch.float32)
    out = {}
    for name, value in case.items():
        if name not in ("uniform", "unimix") and value.is_floating_point():
            value = value.to(dtype if name in (*MATRICES, "embed", "action") else wide)
        out[name] = value
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight + bias


def expected(
    case: dict[str, Tensor | float], likely: bool = False, recentre: bool = False
) -> dict[str, Tensor]:
    """deter, stoch, index, logp of the case, computed with dense one-hots, one sequence after another.

    Samples are drawn with case["uniform"], or with `likely` are the most probable classes. `uniform` is returned too,
    with `recentre` the middle of each sampled class's interval.
    """
    c = case
    T, B, S = c["uniform"].shape
    K = c["in_stoch"].shape[0] // S
    sequences = []
    for b in range(B):
        rows = []
        for t in range(T):
            if t == 0 or c["is_first"][t, b]:
                deter = c["initial_deter"]
                stoch = torch.eye(K, dtype=torch.float64)[c["initial_index"]]
            x = stoch.reshape(S * K) @ c["in_stoch"] + c["action"][t, b]
            x = layer_norm(x, c["in_norm_weight"], c["in_norm_bias"])
            x = x / (1 + (-x).exp())
            gates = layer_norm(c["gru"] @ torch.cat([deter, x]), c["gru_norm_weight"], c["gru_norm_bias"])
            reset, candidate, update = gates.split(len(deter))
            candidate = torch.tanh(candidate / (1 + (-reset).exp()))
            update = 1 / (1 + (1 - update).exp())
            deter = update * candidate + (1 - update) * deter
            y = c["post_deter"] @ deter + c["embed"][t, b]
            y = layer_norm(y, c["post_norm_weight"], c["post_norm_bias"])
            y = y / (1 + (-y).exp())
            e = (c["logit_weight"] @ y + c["logit_bias"]).reshape(S, K).exp()
            p = (1 - c["unimix"]) * e / e.sum(-1, keepdim=True) + c["unimix"] / K
            high = p.detach().cumsum(-1)
            uniform = c["uniform"][t, b]
            if likely:
                index = p.argmax(-1)
            else:
                index = torch.searchsorted(high, uniform[:, None].double(), right=True)[:, 0].clamp(max=K - 1)
            if recentre:
                uniform = (high - p.detach() / 2).gather(-1, index[:, None])[:, 0]
            stoch = torch.eye(K, dtype=torch.float64)[index] + p - p.detach()
            rows.append({"deter": deter, "stoch": stoch, "index": index, "logp": p.log(), "uniform": uniform})
        sequences.append({name: torch.stack([row[name] for row in rows]) for name in rows[0]})
    return {name: torch.stack([sequence[name] for sequence in sequences], 1) for name in sequences[0]}
