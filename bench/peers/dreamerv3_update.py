"""An update of danijar's dreamerv3 for `bench.peers`, in JAX, imported from a checkout.

Its own defaults with our latents and widths, and its own `Agent.train` on one batch of noise that lies on the device,
until the new parameters are complete. It is another architecture (GRU in eight blocks, RMSNorm, convolutions of stride
1, a critic that also learns from replay). Sampling and writing latents back are left out.
"""

import itertools
import re
from pathlib import Path

import dreamerv3.agent
import elements
import numpy as np
import ruamel.yaml
from embodied.jax import internal
from jax_peer import serve_jax
from noise import ACTIONS, SIDE, noise


def configuration(settings):
    path = Path(dreamerv3.agent.__file__).with_name("configs.yaml")
    config = elements.Config(ruamel.yaml.YAML(typ="safe").load(path.read_text())["defaults"])
    config = config.update(
        {
            r".*\.rssm": {"deter": 512, "hidden": 512, "classes": 32},
            r".*\.units": 512,
            r".*\.depth": 16,  # the first convolution has twice as many channels
            "agent.imag_length": settings["horizon"],
            "jax.platform": settings["device"],
            "jax.prealloc": False,  # the device is shared with the others
        }
    )
    if settings["precision"] != "default":
        config = config.update({"jax.compute_dtype": settings["precision"]})
    return elements.Config(
        **config.agent,
        logdir=".",
        seed=config.seed,
        jax={**config.jax, "precompile": False, "profiler": False},
        batch_size=settings["batch"],
        batch_length=settings["length"],
        report_length=config.report_length,
        replay_context=config.replay_context,
        replica=config.replica,
        replicas=config.replicas,
    )


def build(settings):
    config = configuration(settings)
    observation = {
        "image": elements.Space(np.uint8, (SIDE, SIDE, 3)),
        "reward": elements.Space(np.float32),
        **{name: elements.Space(bool) for name in ("is_first", "is_last", "is_terminal")},
    }
    action = {"action": elements.Space(np.int32, (), 0, ACTIONS)}
    agent = dreamerv3.agent.Agent(observation, action, config)
    # Some rows before a window give the latent that it starts from.
    rows = settings["length"] + config.replay_context
    batch = noise(settings["batch"], rows)
    batch["action"] = batch["action"].argmax(-1).astype(np.int32)
    batch = {**agent._zeros(agent.spaces, (settings["batch"], rows)), **batch}
    batch = internal.device_put(batch, agent.train_sharded)
    numbers = itertools.count()
    carry = agent.init_train(settings["batch"])

    def update():
        nonlocal carry
        seed = agent._seeds(next(numbers), agent.train_mirrored)
        carry, *_ = agent.train(carry, {**batch, "seed": seed})
        return agent.params, carry

    learned = re.compile("(enc|dyn|dec|rew|con|pol|val)/")
    sizes = [value.size for key, value in agent.params.items() if learned.match(key)]
    return update, sizes, str(config.jax.compute_dtype)


if __name__ == "__main__":
    serve_jax(build)
