"""An update of the HarmonyDream authors' PyTorch program for `bench.peers`, imported from a checkout.

Its own configuration of DreamerV3 at size small, with harmony, and its own `DreamerV2.train` on one batch of noise:
world model, actor, critic, slow critic and metrics. As written, all convolutions of its encoder have 32 channels, so
that it has fewer parameters. Sampling is left out, and so are its environments and replay, whose modules import
simulators and video readers.
"""

import sys
import types
from pathlib import Path

import ruamel.yaml
import torch
from noise import ACTIONS, SIDE
from torch_peer import serve_torch, tensors

sys.modules |= {name: types.ModuleType(name) for name in ("wmlib.envs", "wmlib.core.replay")}

import wmlib  # noqa: E402
import wmlib.agents  # noqa: E402
import wmlib.utils  # noqa: E402


def configuration(settings):
    path = Path(wmlib.__file__).parents[1] / "configs" / "dreamerv2.yaml"
    known = ruamel.yaml.YAML(typ="safe").load(path.read_text())
    config = wmlib.utils.Config(known["defaults"])
    for name in ("dreamerv3", "small"):
        config = config.update(known[name])
    return config.update(
        {
            "task": "atari_pong",
            "atari_grayscale": False,
            r".*\.cnn_keys": "image",
            r".*\.mlp_keys": "$^",
            "harmony": True,
            "imag_horizon": settings["horizon"],
        }
    )


def build(settings):
    config = configuration(settings)
    # As in its training script, which needs CUDA: float16 is for CUDA alone.
    torch.backends.cudnn.deterministic = torch.backends.cudnn.benchmark = True
    half = settings["device"] == "cuda" and settings["precision"] == "default" and config.precision == 16
    wmlib.ENABLE_FP16 = half
    image = types.SimpleNamespace(shape=(SIDE, SIDE, 3))
    action = types.SimpleNamespace(n=ACTIONS, shape=(ACTIONS,))
    agent = wmlib.agents.DreamerV2(config, {"image": image}, {"action": action}, wmlib.utils.Counter(0))
    agent = agent.to(settings["device"])
    agent.init_optimizers()
    batch = tensors(settings)
    batch["image"] = batch["image"].permute(0, 1, 4, 2, 3).contiguous()
    batch = {key: value.to(torch.float16 if half else torch.float32) for key, value in batch.items()}
    train = wmlib.CarryOverState(agent.train)
    behavior = agent._task_behavior
    modules = [agent.wm, behavior.actor, behavior.critic]
    return lambda: train(batch), modules, "float16" if half else "float32"


if __name__ == "__main__":
    serve_torch(build)
