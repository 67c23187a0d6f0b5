"""Where hdfast keeps each parameter of the authors' program (thuml/HarmonyDream, dreamerv3-jax).

Layouts: a dense kernel is (inputs, outputs), a convolution's (height, width, inputs, outputs), a
deconvolution's (height, width, outputs, inputs) and not flipped; hdfast has torch's layouts, splits the
layers that read a latent, and keeps the three harmony scalars in one vector.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hdfast.agent.behavior import Behavior
from hdfast.agent.networks import LatentMLP, LatentProjection
from hdfast.agent.world_model import WorldModel

HARMONY = {"har_s1": "reward", "har_s2": "image", "har_s3": "kl"}


class Part(NamedTuple):
    """A tensor of hdfast's, and how to bring a tensor of its shape into the authors' layout."""

    ours: Tensor
    to_theirs: Callable[[Tensor], Tensor] = lambda x: x


# By the authors' names; an array of theirs is one part, or several along its first axis.
Counterparts = dict[str, tuple[Part, ...]]


def counterparts(model: WorldModel, behavior: Behavior) -> Counterparts:
    """All parameters and buffers of the two modules, by the authors' names (without `agent/`)."""
    table: Counterparts = {}

    def norm(name: str, module: nn.Module) -> None:
        table[f"{name}/norm/scale"] = (Part(module.weight),)
        table[f"{name}/norm/bias"] = (Part(module.bias),)

    def linear(name: str, module: nn.Module) -> None:
        table[f"{name}/kernel"] = (Part(module.weight, torch.t),)
        table[f"{name}/bias"] = (Part(module.bias),)

    def projection(name: str, module: LatentProjection) -> None:
        table[f"{name}/kernel"] = (Part(module.deter_weight, torch.t), Part(module.stoch_weight))
        if module.bias is not None:
            table[f"{name}/bias"] = (Part(module.bias),)

    def hidden(name: str, layers: Iterable[nn.Module], start: int) -> None:
        for i, layer in enumerate(layers, start):
            table[f"{name}/h{i}/kernel"] = (Part(layer.weight, torch.t),)
            norm(f"{name}/h{i}", layer.norm)

    def mlp(name: str, module: LatentMLP, outputs: dict[str, str]) -> None:
        projection(f"{name}/h0", module.first)
        norm(f"{name}/h0", module.norm)
        hidden(name, module.hidden, 1)
        for output, layer in module.out.items():
            linear(f"{name}/{outputs[output]}", layer)

    if "image" in model.encoder:
        encoder, decoder = model.encoder["image"], model.decoder["image"]
        for i, (kernel, module) in enumerate(zip(encoder.kernels, encoder.norms, strict=True)):
            table[f"wm/enc/cnn/s{i}res/kernel"] = (Part(kernel, _convolution),)
            norm(f"wm/enc/cnn/s{i}res", module)
        projection("wm/dec/cnn/in", decoder.first)
        for i, kernel in enumerate(decoder.kernels):
            table[f"wm/dec/cnn/s{i}res/kernel"] = (Part(kernel, _deconvolution),)
        for i, module in enumerate(decoder.norms):
            norm(f"wm/dec/cnn/s{i}res", module)
        table[f"wm/dec/cnn/s{len(decoder.norms)}res/bias"] = (Part(decoder.bias),)
    if "vector" in model.encoder:
        hidden("wm/enc/mlp", model.encoder["vector"].hidden, 0)
        mlp("wm/dec/mlp", model.decoder["vector"], {key: f"dist_{key}/out" for key in model.vectors})
    rssm = model.rssm
    table["wm/rssm/initial"] = (Part(rssm.initial_deter),)
    table["wm/rssm/img_in/kernel"] = (Part(rssm.in_stoch), Part(rssm.in_action))
    table["wm/rssm/gru/kernel"] = (Part(rssm.gru, torch.t),)
    table["wm/rssm/img_out/kernel"] = (Part(rssm.prior_hidden, torch.t),)
    table["wm/rssm/obs_out/kernel"] = (Part(rssm.post_deter, torch.t), Part(rssm.post_embed, torch.t))
    norm("wm/rssm/img_in", rssm.in_norm)
    norm("wm/rssm/gru", rssm.gru_norm)
    norm("wm/rssm/img_out", rssm.prior_norm)
    norm("wm/rssm/obs_out", rssm.post_norm)
    linear("wm/rssm/img_stats", rssm.prior_out)
    linear("wm/rssm/obs_stats", rssm.post_out)
    outputs = {
        "logits": "dist_out/out",
        "logit": "dist_out/out",
        "mean": "dist_out/out",
        "std": "dist_out/std",
    }
    mlp("wm/rew", model.reward, outputs)
    mlp("wm/cont", model.cont, outputs)
    groups = list(model.harmonizer.groups)
    for name, group in HARMONY.items():
        if group in groups:
            table[f"wm/{name}/harmony_s"] = (Part(model.harmonizer.log_sigma, _entry(groups.index(group))),)
    mlp("task_behavior/ac/actor", behavior.actor.mlp, outputs)
    mlp("task_behavior/critic/net", behavior.critic, outputs)
    mlp("task_behavior/critic/slow", behavior.slow_critic, outputs)
    table["task_behavior/critic/updates/value"] = (Part(behavior.slow_updates),)
    for at, name in enumerate(("low", "high")):
        table[f"task_behavior/ac/retnorm_extr/{name}/value"] = (
            Part(behavior.return_range.bounds, _entry(at)),
        )
    return table


def in_their_layout(parts: tuple[Part, ...], of: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """`of` each part's tensor (itself, its gradient, ...), as one array in the authors' layout."""
    pieces = [part.to_theirs(of(part.ours)) for part in parts]
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


@torch.no_grad()
def fill(parts: tuple[Part, ...], theirs: Tensor) -> None:
    """Copies an array of the authors', of the right shape, into hdfast's tensors.

    Each entry goes to where `to_theirs` takes it from, so that loading and comparing cannot disagree.
    """
    start = 0
    for part in parts:
        places = part.to_theirs(torch.arange(part.ours.numel()).view(part.ours.shape))
        rows = slice(start, start + len(places)) if len(parts) > 1 else ...
        part.ours.view(-1)[places.flatten()] = theirs[rows].flatten().to(part.ours.dtype)
        start += len(places) if len(parts) > 1 else 0


def _entry(at: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x[at]


def _convolution(x: Tensor) -> Tensor:
    return x.permute(2, 3, 1, 0)


def _deconvolution(x: Tensor) -> Tensor:
    return x.flip(2, 3).permute(2, 3, 1, 0)
