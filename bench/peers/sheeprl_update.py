"""An update of sheeprl's DreamerV3 for `bench.peers`, run on the interpreter that has sheeprl.

Its own configuration of Atari 100k (size S), its own `build_agent`, optimizers and metrics, and its own `train` on
one batch of noise. Sampling and the target critic's move, which its loop does outside of `train`, are left out.
"""

import logging

import gymnasium
import hydra
import numpy as np
import torch
from noise import ACTIONS, SIDE
from omegaconf import OmegaConf
from sheeprl.algos.dreamer_v3.agent import build_agent
from sheeprl.algos.dreamer_v3.dreamer_v3 import train
from sheeprl.algos.dreamer_v3.utils import AGGREGATOR_KEYS, Moments
from sheeprl.utils.utils import dotdict
from torch_peer import serve_torch, tensors


def configuration(settings):
    overrides = [
        "exp=dreamer_v3_100k_ms_pacman",
        "run_name=bench",
        f"algo.per_rank_batch_size={settings['batch']}",
        f"algo.per_rank_sequence_length={settings['length']}",
        f"algo.horizon={settings['horizon']}",
        f"fabric.accelerator={settings['device']}",
        f"algo.compile.enabled={settings['compile']}",
    ]
    if settings["precision"] != "default":
        name = {"float32": "32-true", "bfloat16": "bf16-mixed"}[settings["precision"]]
        overrides.append(f"fabric.precision={name}")
    with hydra.initialize_config_module("sheeprl.configs", version_base="1.3"):
        composed = hydra.compose("config", overrides=overrides)
    return dotdict(OmegaConf.to_container(composed, resolve=True, throw_on_missing=True))


def batch_of(settings):
    """A batch as its loop passes it to `train`: float32, time-major, channels first."""
    rows = {key: value.transpose(0, 1) for key, value in tensors(settings).items()}
    batch = {
        "rgb": rows["image"].permute(0, 1, 4, 2, 3),
        "actions": rows["action"],
        "rewards": rows["reward"][..., None],
        "terminated": rows["is_terminal"][..., None],
        "truncated": torch.zeros_like(rows["is_last"])[..., None],
        "is_first": rows["is_first"][..., None],
    }
    return {key: value.contiguous() for key, value in batch.items()}


def build(settings):
    logging.disable(logging.WARNING)
    cfg = configuration(settings)
    torch.set_float32_matmul_precision(cfg.float32_matmul_precision)
    torch.distributions.Distribution.set_default_validate_args(cfg.distribution.validate_args)
    torch.backends.cudnn.benchmark = cfg.torch_backends_cudnn_benchmark
    fabric = hydra.utils.instantiate(cfg.fabric, callbacks=None, _convert_="all")
    space = gymnasium.spaces.Dict({"rgb": gymnasium.spaces.Box(0, 255, (3, SIDE, SIDE), np.uint8)})
    world_model, actor, critic, target_critic, _ = build_agent(fabric, (ACTIONS,), False, cfg, space)
    parts = {"world_model": world_model, "actor": actor, "critic": critic}
    optimizers = fabric.setup_optimizers(
        *(
            hydra.utils.instantiate(cfg.algo[name].optimizer, params=part.parameters(), _convert_="all")
            for name, part in parts.items()
        )
    )
    normal = cfg.algo.actor.moments
    moments = Moments(normal.decay, normal.max, normal.percentile.low, normal.percentile.high)
    for name in set(cfg.metric.aggregator.metrics) - AGGREGATOR_KEYS:
        del cfg.metric.aggregator.metrics[name]
    aggregator = hydra.utils.instantiate(cfg.metric.aggregator, _convert_="all").to(fabric.device)
    batch = batch_of(settings)

    def update():
        train(
            fabric, world_model, actor, critic, target_critic, *optimizers,
            batch, aggregator, cfg, False, (ACTIONS,), moments,
        )  # fmt: skip

    return update, parts.values(), {"32-true": "float32", "bf16-mixed": "bfloat16"}[cfg.fabric.precision]


if __name__ == "__main__":
    serve_torch(build)
