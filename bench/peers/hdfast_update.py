"""An update of ours for `bench.peers`: sampling from replay, world model, actor, critic, slow critic, metrics."""

from collections.abc import Callable
from typing import Any

import torch

from bench.agent import Bench, config_of, gflop
from bench.machine import synchronised
from bench.peers.turns import serve
from hdfast.runtime.device import prepare_device, resolve_device, resolve_precision


def build(settings: dict[str, Any]) -> tuple[Callable[[], None], dict[str, Any]]:
    device = resolve_device(settings["device"])
    prepare_device(device, little_work=False)
    torch.set_num_threads(settings["threads"])
    shape = {name: settings[name] for name in ("batch", "length", "horizon")}
    config = config_of(settings.get("size", "small"), **shape)
    name = {"default": "auto"}.get(settings["precision"], settings["precision"])
    bench = Bench(config, device, resolve_precision(name, device))
    update = bench.graph() if settings["graph"] else bench.update()
    return synchronised(update, device), {
        "precision": str(bench.dtype).removeprefix("torch."),
        "on": f"torch {torch.__version__}",
        "threads": torch.get_num_threads(),
        "parameters": bench.learner.parameter_counts()["total"],
        "gflop": gflop(config, "update", device),
    }


if __name__ == "__main__":
    serve(build)
