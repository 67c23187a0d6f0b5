"""A trained agent in a notebook: `load` returns the newest checkpoint of a run, or one that is named, ready to act."""

import contextlib
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from hdfast import suites
from hdfast.agent.policy import Policy
from hdfast.config import Config, validate
from hdfast.envs.base import BatchEnv
from hdfast.overrides import apply_overrides
from hdfast.runtime import checkpoint, record
from hdfast.runtime.device import prepare_device, resolve_device, resolve_precision
from hdfast.runtime.errors import ConfigError, HdfastError, RunError
from hdfast.sections import MOST_ENVS
from hdfast.streams import make_envs, stream_seed
from hdfast.tuning.choice import Job
from hdfast.tuning.settle import recalled
from hdfast_kernels import dispatch

FILMED = 128  # pixels; side of images that are drawn for the film alone


@dataclass(frozen=True)
class Trained:
    """A checkpoint of a run, ready to act; a context manager that closes its environments.

    In its block ops run as the search for kernels found best for the run, if it is remembered here.

    config: the run's, with the seed it was loaded with.
    env: environments of its task, to be reset: `step = env.reset()`.
    policy: acts in all of them: `step = env.step(policy(step.obs, step.is_first))`; its `learner` holds the modules.
    checkpoint: what was loaded.
    """

    config: Config
    env: BatchEnv
    policy: Policy
    checkpoint: checkpoint.Checkpoint
    _opened: contextlib.ExitStack

    def act(self, observation: Any, *, is_first: bool = False) -> Any:
        """An action for an environment of your own, from what it observes, both in its own spaces.

        Args:
            observation: for suite gym, what `gymnasium.make(...)` observes; its frame if the agent sees what is
                drawn, or "image" and "state" by name if it sees both. For other suites as in `env.obs_specs`.
            is_first: whether it is the first of an episode; that of the first call always is.

        Raises:
            ValueError: the agent was loaded for several environments, or with drawn=True.
            EnvError (ValueError or TypeError outside suite gym): the observation does not fit the environment.
        """
        if self.env.num_envs != 1:
            raise ValueError(f"act() is for one environment, this was loaded for {self.env.num_envs}")
        if self.env.obs_specs.keys() != self.policy.learner.obs_specs.keys():
            raise ValueError("act() is of what the agent sees; load it without drawn=True")
        return self.env.own_action(self.policy(self.env.row_of(observation), np.array([is_first])))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()


def load(
    run: str | Path,
    *,
    num_envs: int = 1,
    seed: int = 0,
    device: str = "auto",
    greedy: bool = False,
    drawn: bool = False,
    env_kwargs: str | None = None,
) -> Trained:
    """The agent of the run in directory `run`, with its newest checkpoint, and environments to act in.

    `run` may also be one of its checkpoints, such as runs/demo/Catch/seed0/checkpoints/0000008000.safetensors.
    The run is only read. One episode, in a notebook::

        with load("runs/demo/Catch/seed0") as trained:
            step = trained.env.reset()
            while not step.is_last.any():
                step = trained.env.step(trained.policy(step.obs, step.is_first))

    Args:
        num_envs: environments stepped together.
        seed: of the environments and of the sampled latents and actions, which differ from those of training.
        greedy: act with the actor's likeliest action instead of a sample; latents are sampled all the same.
        drawn: if the run sees vectors alone, its environments also give images, which the policy ignores.
        env_kwargs: keyword arguments of `gymnasium.make`, a JSON object. They replace the run's of the same names; its
            others stay.

    Raises:
        RunError: there is no run, or none around the checkpoint. CheckpointError: it has no checkpoint yet, all are
        damaged, or they do not fit its configuration or environments. ConfigError: a directory of several runs, no such
        device, a number of environments or a seed out of range, arguments that the environments do not take.
    """
    if not 1 <= num_envs <= MOST_ENVS:
        raise ConfigError(f"--num-envs {num_envs} is out of range: expected 1 to {MOST_ENVS:,}")
    if seed < 0:
        raise ConfigError(f"--seed {seed} is out of range: expected 0 or more")
    saved = record.chosen(run)
    if not (saved.run / "config.json").exists():
        hint = "a checkpoint is played where it lies, in <run>/checkpoints/"
        raise RunError("this checkpoint is in no run", where=run, hint=hint)
    config = dataclasses.replace(config_of(saved.run), seed=seed)
    if env_kwargs is not None:
        config = _with_kwargs(config, env_kwargs)
    assert config.task is not None
    task = suites.get(config.suite).task(config.task)
    where = resolve_device(device)
    prepare_device(where, config.little_work)
    env = make_envs(config, task, num_envs=num_envs, stream="evaluate")
    unseen = drawn and config.env.obs != "image" and not any(spec.is_image for spec in env.obs_specs.values())
    if unseen:
        env.close()
        shown = dataclasses.replace(
            config, env=dataclasses.replace(config.env, obs="both", image_size=FILMED)
        )
        try:
            env = make_envs(shown, task, num_envs=num_envs, stream="evaluate")
        except HdfastError as error:
            others = "" if "--env." in error.hint else error.hint  # flags of training do not help here
            hint = " or ".join(filter(None, [others, "leave out --video"]))
            raise type(error)(error.what, where=error.where, hint=hint, details=error.details) from error
    with contextlib.ExitStack() as opened:
        opened.callback(env.close)
        dtype = resolve_precision(config.precision, where)
        specs = {key: spec for key, spec in env.obs_specs.items() if not (unseen and spec.is_image)}
        job = Job(specs, env.actions, config, where, dtype)
        opened.callback(dispatch.use, where.type, recalled(job).use(where))
        learner = job.learner()
        with checkpoint.fitting(saved.path):
            learner.load_parameters(saved.part("learner."))
        policy = Policy(learner, num_envs, stream_seed(seed, "evaluate"), greedy=greedy)
        return Trained(config, env, policy, saved, opened.pop_all())


def _with_kwargs(config: Config, given: str) -> Config:
    """`config` with arguments of its environment changed. Raises: ConfigError: no JSON object, or no suite for it."""
    asked = validate(dataclasses.replace(config, env=dataclasses.replace(config.env, kwargs=given)))
    merged = json.loads(config.env.kwargs) | json.loads(asked.env.kwargs)
    return validate(
        dataclasses.replace(config, env=dataclasses.replace(config.env, kwargs=json.dumps(merged)))
    )


def config_of(run: Path) -> Config:
    """The configuration of the run in directory `run`; fields that are newer than the run have their defaults.

    Raises: RunError, ConfigError.
    """
    file, saved = run / "config.json", record.read(run).config
    try:
        config = apply_overrides(Config(), saved)
        if config.task is None:
            raise TypeError("config.task is missing")
        return validate(dataclasses.replace(config, seeds=1))  # the run's own; its sweep may have had more
    except TypeError as error:
        raise record.damaged(file, str(error)) from error
    except ConfigError as error:
        raise ConfigError(str(error), where=file, hint="did another version of hdfast write it?") from error
