"""Plays the newest checkpoint of a run on environments of its own and prints the scores as one JSON line.

The run is only read: it may be training meanwhile.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from hdfast import evaluation, suites
from hdfast.agent.learner import Learner
from hdfast.agent.policy import Policy
from hdfast.config import Config, apply_overrides
from hdfast.envs.base import EnvStep
from hdfast.loop import make_envs, stream_seed
from hdfast.runtime import checkpoint, errors, rundir
from hdfast.runtime.arguments import Arguments, natural, positive
from hdfast.runtime.device import prepare_device, resolve_device, resolve_precision
from hdfast.runtime.errors import CheckpointError, ConfigError
from hdfast.runtime.video import encode_gif, save_gif


def evaluate(
    run: Path,
    *,
    episodes: int = 100,
    seed: int = 0,
    num_envs: int = 8,
    device: str = "auto",
    video: bool = False,
) -> dict[str, Any]:
    """Scores of `episodes` episodes with the newest checkpoint of the run in directory `run`.

    Args:
        seed: of the environments and of the sampled latents and actions; not those of training.
        num_envs: environments stepped together.
        video: also write the first episode to videos/evaluate_<agent steps>.gif in the run's directory.

    Raises:
        RunError: there is no run. CheckpointError: it has no checkpoint yet, or all are damaged.
        ConfigError: a directory of several runs, no such device, or a video of a task without images.
    """
    if not (run / "config.json").exists() and (below := sorted(run.glob("**/config.json"))):
        raise ConfigError(
            f"this is not a run, it holds {len(below)}", where=run, hint=f"try {below[0].parent}"
        )
    record = rundir.read(run)
    config = dataclasses.replace(apply_overrides(Config(), record.config), seed=seed)
    task = suites.get(config.suite).task(config.task)
    saved = checkpoint.load_latest(run / "checkpoints")
    if saved is None:
        hint = f"the first is written after {record.config['checkpoint']['seconds']:g} seconds of training"
        raise CheckpointError("there is no checkpoint yet", where=run, hint=hint)
    where = resolve_device(device)
    prepare_device(where, config.little_work)
    with make_envs(config, task, num_envs=min(num_envs, episodes), stream="evaluate") as env:
        dtype = resolve_precision(config.precision, where)
        learner = Learner(env.obs_specs, env.actions, config, device=where, dtype=dtype)
        for name, module in (("model", learner.model), ("behavior", learner.behavior)):
            prefix = f"learner.{name}."
            parameters = {k.removeprefix(prefix): v for k, v in saved.tensors.items() if k.startswith(prefix)}
            module.load_state_dict(parameters)
        policy = Policy(learner, env.num_envs, stream_seed(seed, "evaluate"))
        film = Film(next(iter(learner.model.images), None)) if video else None
        played = evaluation.play(env, policy, episodes, watch=film or (lambda step: None))
    about = {"run": str(run), "checkpoint": saved.path.name, "agent_steps": saved.meta["agent_steps"]}
    if film is not None:
        path = run / "videos" / f"evaluate_{saved.meta['agent_steps']:010d}.gif"
        save_gif(path, encode_gif(np.stack(film.frames)))
        about["video"] = str(path)
    return {**about, "seed": seed, **evaluation.summarize(played)}


class Film:
    """Keeps the images of the first episode of the first environment.

    key: the observation to keep. Raises ConfigError if it is None.
    """

    def __init__(self, key: str | None) -> None:
        if key is None:
            raise ConfigError("--video: this task is not seen through images")
        self.key, self.frames, self._over = key, [], False

    def __call__(self, step: EnvStep) -> None:
        """Takes one row of every environment."""
        if not self._over:
            self.frames.append(step.obs[self.key][0])
            self._over = bool(step.is_last[0])


def main() -> None:
    parser = Arguments("python -m hdfast.evaluate", __doc__)
    parser.add_argument("run", type=Path, help="directory of a run, such as runs/atari100k/Pong/seed0")
    parser.add_argument("--episodes", type=positive, default=100, help="episodes to play")
    parser.add_argument("--seed", type=natural, default=0, help="of environments and policy")
    parser.add_argument("--num-envs", type=positive, default=8, help="environments stepped together")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--video", action="store_true", help="write the first episode as a GIF")
    scores = evaluate(**vars(parser.parse_args()))
    sys.stdout.write(json.dumps(scores) + "\n")


if __name__ == "__main__":
    errors.main(main)
