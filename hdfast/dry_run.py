"""`--dry-run`: builds everything a run needs and says, as JSON, what it is and what it will take."""

import dataclasses
import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hdfast
from hdfast import init_from
from hdfast.advice import check_settings
from hdfast.agent.custom import with_options
from hdfast.agent.learner import Learner
from hdfast.agent.world_model import LossError, WorldModel
from hdfast.config import GROWING, RESUMABLE_CHANGES, Config, with_defaults
from hdfast.envs.base import BatchEnv, DiscreteActions
from hdfast.loop import as_begun
from hdfast.replay import Replay
from hdfast.replay.contents import replay_specs
from hdfast.runtime import record
from hdfast.runtime.device import describe_device, ready_device, resolve_precision
from hdfast.runtime.errors import ConfigError, warn
from hdfast.streams import make_envs
from hdfast.tuning.choice import Job


def describe(config: Config) -> str:
    """JSON: version, tasks, device, resolved config, and for the first task its environment, parameters and memory.

    Raises: RunError, CheckpointError: --init-from names neither a run with a checkpoint nor a checkpoint, or one that
    does not fit. ConfigError: a learner of one's own has losses that cannot be added.
    """
    _warn_of_refusals(config)
    device = ready_device(config.device, config.little_work, config.train.graph)
    dtype = resolve_precision(config.precision, device)
    start = init_from.checkpoint_for(config)
    with make_envs(config, config.tasks[0], num_envs=config.env.num_envs, stream="train") as env:
        seen = env.obs_specs, env.actions
        check_settings(config, *seen)
        learner = Job(*seen, config, device, dtype).learner(config.seed)
        if start is not None:
            init_from.load_parameters(learner, start, config)
        specs = replay_specs(env.obs_specs, env.actions)
        replay = Replay(specs, num_envs=env.num_envs, capacity=config.replay_rows, device=device)
        held = _memory(learner, replay, env)
        _warn_of_memory(held["total"], device)
        about = {
            "version": hdfast.__version__,
            "tasks": [task.name for task in config.tasks],
            "seeds": list(range(config.seed, config.seed + config.seeds)),
            "device": {**describe_device(device), "precision": str(dtype).removeprefix("torch.")},
            "environment": _environment(env),
            "parameters": {**learner.parameter_counts(), "modules": _modules(learner)},
            "memory_bytes": held,
            "config": learner.config.to_dict(),
        }
    return json.dumps(about, indent=2)


def _warn_of_refusals(config: Config) -> None:
    """Warns of each run that has begun with another configuration, as `RunDir.open` refuses it."""
    for seed in range(config.seed, config.seed + config.seeds):
        for task in config.tasks:
            path = record.path_of(config.logdir, config.suite, task.folder, seed)
            if not (path / "config.json").exists() or not record.has_begun(path):
                continue
            one = dataclasses.replace(config, task=task.name, seed=seed, seeds=1)
            wanted = as_begun(with_options(one), path).to_dict()
            saved = record.read(path)
            theirs = with_defaults(saved.config)
            finished = saved.summary is not None
            if lines := record.refused(theirs, wanted, finished, RESUMABLE_CHANGES, GROWING):
                warn(f"{path}: it has another config, and the run is refused ({', '.join(lines)})")


def _warn_of_memory(total: int, device: torch.device) -> None:
    """Warns of a run that its device has no room for."""
    if total > (room := describe_device(device)["memory_bytes"]):
        hint = "lower --replay.capacity, --replay.batch or --size"
        warn(f"the run takes {total / 1e9:.1f} GB of memory and {device} has {room / 1e9:.1f} GB; {hint}")


def _environment(env: BatchEnv) -> dict[str, Any]:
    own = env.actions
    actions = {"discrete": own.count} if isinstance(own, DiscreteActions) else {"continuous": own.size}
    return {
        "name": env.name,
        "num_envs": env.num_envs,
        "action_repeat": env.action_repeat,
        "observations": {k: {"shape": v.shape, "dtype": str(v.dtype)} for k, v in env.obs_specs.items()},
        "actions": actions,
    }


def _modules(learner: Learner) -> dict[str, int]:
    """Parameters of each module, two levels deep."""
    counts: dict[str, int] = {}
    for part, module in learner.parts().items():
        for name, parameter in module.named_parameters():
            owner = f"{part}.{name.partition('.')[0]}" if part == "world_model" else part
            counts[owner] = counts.get(owner, 0) + parameter.numel()
    return counts


def _memory(learner: Learner, replay: Replay, env: BatchEnv) -> dict[str, int]:
    """What the run holds: the ring when full, parameters with Adam's moments and gradients, saved activations."""
    parameters = [parameter for _, module in learner.modules() for parameter in module.parameters()]
    trained = sum(p.nbytes for p in parameters if p.requires_grad)
    held = {
        "replay": replay.nbytes,
        "parameters": sum(p.nbytes for p in parameters),
        "gradients": trained,
        "optimizer": 2 * trained,
        "activations": _activations(learner, env),
    }
    return {**held, "total": sum(held.values())}


def _activations(learner: Learner, env: BatchEnv) -> int:
    """Bytes that one world-model loss keeps for its backward pass.

    A world model of one's own that does not run on shapes alone is counted as hdfast's.

    Raises: ConfigError for losses of its own that cannot be added.
    """
    config, dtype, kind = learner.config, learner.dtype, type(learner).model_type
    try:
        return _kept(kind, config, env, dtype)
    except LossError as error:
        raise ConfigError(str(error), where=f"--learner {config.learner}") from error
    except Exception as error:
        if kind is WorldModel:
            raise
        what = f"--learner {config.learner}: its loss does not run on shapes alone ({type(error).__name__}: {error})"
        warn(f"{what}; its activations are counted as hdfast's")
    return _kept(WorldModel, config, env, dtype)


def _kept(kind: type[WorldModel], config: Config, env: BatchEnv, dtype: torch.dtype) -> int:
    """Bytes that its loss keeps, counted by running it on shapes alone."""
    with torch.device("meta"):
        model = kind(env.obs_specs, env.actions, config)
        lead = (config.replay.length, config.replay.batch)
        batch = {
            name: torch.empty(*lead, *spec.shape, dtype=torch.from_numpy(np.empty(0, spec.dtype)).dtype)
            for name, spec in replay_specs(env.obs_specs, env.actions).items()
        }
        uniform = torch.empty(*lead, config.rssm.stoch)
        parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        kept: dict[int, Tensor] = {}  # by storage; holding the tensors keeps the keys from being used again

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.loss(batch, uniform, dtype)
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in parameters)
