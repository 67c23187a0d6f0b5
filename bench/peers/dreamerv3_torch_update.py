"""An update of NM512's dreamerv3-torch for `bench.peers`, imported from a checkout.

Its own configuration of Atari 100k and its own `Dreamer._train` on one batch of noise, including the slow critic's
move and the metrics, which are fetched from the device. Sampling is left out. Its option for torch.compile, on by
default, wraps modules whose `forward` is not called in an update: it changes nothing here.
"""

import types
from pathlib import Path

import dreamer
import ruamel.yaml
from noise import ACTIONS, SIDE, noise
from torch_peer import serve_torch


def configuration(settings):
    """Its defaults, overridden by those of Atari 100k."""
    path = Path(dreamer.__file__).with_name("configs.yaml")
    known = ruamel.yaml.YAML(typ="safe").load(path.read_text())
    values = known["defaults"]
    for key, value in known["atari100k"].items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    values |= {
        "batch_size": settings["batch"],
        "batch_length": settings["length"],
        "imag_horizon": settings["horizon"],
        "device": settings["device"],
        "num_actions": ACTIONS,
    }
    return types.SimpleNamespace(**values)


def build(settings):
    config = configuration(settings)
    image = types.SimpleNamespace(shape=(SIDE, SIDE, 3))
    spaces = types.SimpleNamespace(spaces={"image": image}), types.SimpleNamespace(n=ACTIONS)
    agent = dreamer.Dreamer(*spaces, config, types.SimpleNamespace(step=0), None).to(config.device)
    agent.requires_grad_(requires_grad=False)
    batch = noise(settings["batch"], settings["length"])

    def update():
        agent._train(batch)
        agent._metrics.clear()

    behavior = agent._task_behavior
    return update, [agent._wm, behavior.actor, behavior.value], "float32"


if __name__ == "__main__":
    serve_torch(build)
