"""An update of the HarmonyDream authors' program of Atari 100k for `bench.peers`, in JAX, imported from a checkout.

Its own configuration of Atari 100k, with harmony, and its own `Agent.train` on one batch of noise that lies on the
device, until the new parameters are complete. Sampling is left out, and its training script, which imports TensorFlow.
"""

import sys
import types

sys.modules["dreamerv3.train"] = types.SimpleNamespace(wrap_env=None)

import embodied  # noqa: E402
import numpy as np  # noqa: E402
from dreamerv3.agent import Agent  # noqa: E402
from dreamerv3.jaxutils import Optimizer  # noqa: E402
from jax_peer import serve_jax  # noqa: E402
from noise import ACTIONS, SIDE, noise  # noqa: E402


def configuration(settings):
    config = embodied.Config(Agent.configs["defaults"]).update(Agent.configs["atari100k"])
    config = config.update(
        {
            "harmony": True,
            "batch_size": settings["batch"],
            "batch_length": settings["length"],
            "imag_horizon": settings["horizon"],
            "jax.platform": {"cuda": "gpu"}.get(settings["device"], "cpu"),
            "jax.prealloc": False,  # the device is shared with the others
        }
    )
    if settings["precision"] != "default":
        config = config.update({"jax.precision": settings["precision"]})
    return config


def build(settings):
    config = configuration(settings)
    observation = {
        "image": embodied.Space(np.uint8, (SIDE, SIDE, 3)),
        "reward": embodied.Space(np.float32),
        **{name: embodied.Space(bool) for name in ("is_first", "is_last", "is_terminal")},
    }
    action = {"action": embodied.Space(np.float32, (ACTIONS,), 0, 1)}
    action["action"]._discrete = True  # as its wrapper of one-hot actions marks them
    agent = Agent(observation, action, embodied.Counter(), config)
    batch = agent._convert_inps(noise(settings["batch"], settings["length"]), agent.train_devices)
    state = None

    def update():
        nonlocal state
        _, state, _ = agent.train(batch, state)
        return agent.varibs, state

    return update, map(int, Optimizer.PARAM_COUNTS.values()), config.jax.precision


if __name__ == "__main__":
    serve_jax(build)
