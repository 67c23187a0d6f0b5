"""An update of sheeprl's DreamerV3 for `bench.peers`, run by the interpreter that has sheeprl.

Its own configuration of Atari 100k (size S), its own `build_agent`, optimizers and metrics, and its own `train` on
one batch of noise. Sampling and the move of the target critic, which its loop does outside of `train`, are left out.
"""

import logging
import warnings

import gymnasium
import hydra
import numpy as np
import sheeprl
import torch
from omegaconf import OmegaConf
from sheeprl.algos.dreamer_v3.agent import build_agent
from sheeprl.algos.dreamer_v3.dreamer_v3 import train
from sheeprl.algos.dreamer_v3.utils import AGGREGATOR_KEYS, Moments
from sheeprl.utils.utils import dotdict
from torch.utils.flop_counter import FlopCounterMode
from turns import serve

ACTIONS = 6


def configuration(settings):
    overrides = [
        "exp=dreamer_v3_100k_ms_pacman",
        "run_name=bench",
        f"algo.per_rank_batch_size={settings['batch']}",
        f"algo.per_rank_sequence_length={settings['length']}",
        f"algo.horizon={settings['horizon']}",
        f"fabric.accelerator={settings['device']}",
        f"fabric.precision={'32-true' if settings['precision'] == 'float32' else 'bf16-mixed'}",
        f"algo.compile.enabled={settings['compile']}",
    ]
    with hydra.initialize_config_module("sheeprl.configs", version_base="1.3"):
        composed = hydra.compose("config", overrides=overrides)
    return dotdict(OmegaConf.to_container(composed, resolve=True, throw_on_missing=True))


def noise(settings, device):
    """A batch as its loop hands it to `train`: float32, time-major, episodes of 100 rows."""
    rows = settings["length"], settings["batch"]
    action = torch.randint(ACTIONS, rows)
    ends = (torch.arange(rows[0]) % 100 == 99).float()[:, None, None].expand(*rows, 1)
    batch = {
        "rgb": torch.randint(256, (*rows, 3, 64, 64)),
        "actions": torch.nn.functional.one_hot(action, ACTIONS),
        "rewards": torch.randn(*rows, 1),
        "terminated": ends,
        "truncated": torch.zeros_like(ends),
        "is_first": ends.roll(1, 0),
    }
    return {key: value.float().contiguous().to(device) for key, value in batch.items()}


def build(settings):
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    cfg = configuration(settings)
    torch.set_num_threads(settings["threads"])
    torch.set_float32_matmul_precision(cfg.float32_matmul_precision)
    torch.distributions.Distribution.set_default_validate_args(cfg.distribution.validate_args)
    torch.backends.cudnn.benchmark = cfg.torch_backends_cudnn_benchmark
    fabric = hydra.utils.instantiate(cfg.fabric, callbacks=None, _convert_="all")
    space = gymnasium.spaces.Dict({"rgb": gymnasium.spaces.Box(0, 255, (3, 64, 64), np.uint8)})
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
    batch = noise(settings, fabric.device)

    def update():
        train(
            fabric, world_model, actor, critic, target_critic, *optimizers,
            batch, aggregator, cfg, False, (ACTIONS,), moments,
        )  # fmt: skip
        if fabric.device.type == "cuda":
            torch.cuda.synchronize()

    if settings["compile"]:
        gflop = None  # compiled code is not counted
    else:
        with FlopCounterMode(display=False) as counter:
            update()
        gflop = counter.get_total_flops() / 1e9
    return update, {
        "version": sheeprl.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for part in parts.values() for p in part.parameters()),
        "gflop": gflop,
    }


if __name__ == "__main__":
    serve(build)
