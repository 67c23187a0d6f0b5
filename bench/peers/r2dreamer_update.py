"""An update of NM512's r2dreamer for `bench.peers`, imported from a checkout.

Its own configuration of Atari 100k with our latents and widths, and its own `Dreamer.update` on one batch of noise;
sampling and writing latents back are left out. It is another architecture (GRU in eight blocks, RMSNorm, convolutions
of stride 1, a critic that also learns from replay), by default without a decoder; `rep_loss` gives it one. Its update
is written for float16, in which two CPU cores do not finish three updates in 200 seconds: on a CPU its default is timed
in bfloat16. For precisions other than float16 the type in its call of `autocast` is replaced. By default it also
compiles its update; here only with `--compile`.
"""

import types
from pathlib import Path

import dreamer
import hydra
import torch
from noise import ACTIONS, SIDE
from tensordict import TensorDict
from torch_peer import serve_torch, tensors


def configuration(settings):
    overrides = [
        "env=atari100k",
        *(f"model.{name}=512" for name in ("deter", "hidden", "units")),
        "model.discrete=32",
        "model.depth=16",  # the first convolution has twice as many channels
        f"model.rep_loss={settings['rep_loss']}",
        f"model.imag_horizon={settings['horizon']}",
        f"model.compile={settings['compile']}",
        f"device={settings['device']}",
    ]
    folder = Path(dreamer.__file__).with_name("configs")
    with hydra.initialize_config_dir(str(folder), version_base=None):
        return hydra.compose("configs", overrides=overrides).model


def build(settings):
    torch.set_float32_matmul_precision("high")  # as its train.py does
    name = settings["precision"]
    if name == "default":
        name = "float16" if settings["device"] == "cuda" else "bfloat16"
    if name != "float16":
        half = torch.bfloat16, name == "bfloat16"
        dreamer.autocast = lambda device_type, dtype: torch.autocast(device_type, *half)
    config = configuration(settings)
    image = types.SimpleNamespace(shape=(SIDE, SIDE, 3))
    spaces = types.SimpleNamespace(spaces={"image": image}), types.SimpleNamespace(n=ACTIONS, discrete=True)
    agent = dreamer.Dreamer(config, *spaces).to(settings["device"])
    rows = tensors(settings)
    rows |= {key: rows[key][..., None].bool() for key in ("is_first", "is_last", "is_terminal")}
    rows |= {"image": rows["image"].byte(), "reward": rows["reward"][..., None]}
    size = settings["batch"], settings["length"]
    latent = agent.get_initial_state(settings["batch"])
    initial = latent["stoch"], latent["deter"]
    replay = types.SimpleNamespace(
        sample=lambda: (TensorDict(rows, batch_size=size), None, initial), update=lambda *_: None
    )
    return lambda: agent.update(replay), [torch.nn.ParameterList(agent._named_params.values())], name


if __name__ == "__main__":
    serve_torch(build)
