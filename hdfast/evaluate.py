"""Plays the newest checkpoint of a run, or one that is named, in new environments and prints the scores as JSON.

The run may be training meanwhile: it is only read, except that --video writes a GIF into its videos/. In a notebook,
`load` returns the agent.
"""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from rich import progress

from hdfast import evaluation, suites
from hdfast.agent.policy import Policy
from hdfast.config import Config, validate
from hdfast.envs.base import BatchEnv, EnvStep
from hdfast.overrides import apply_overrides
from hdfast.runtime import checkpoint, errors, record
from hdfast.runtime.arguments import Arguments, given_path, natural, positive
from hdfast.runtime.console import Console
from hdfast.runtime.device import prepare_device, resolve_device, resolve_precision
from hdfast.runtime.errors import ConfigError, HdfastError
from hdfast.runtime.video import encode_gif, save_gif
from hdfast.sections import MOST_ENVS
from hdfast.streams import make_envs, stream_seed
from hdfast.tuning.choice import Job
from hdfast.tuning.settle import recalled
from hdfast_kernels import dispatch

FILMED = 128  # pixels; side of images that are drawn for the film alone
PLAIN_SECONDS = 30.0  # between two lines of progress, if there is no live one


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
        env_kwargs: keyword arguments of `gymnasium.make`, a JSON object, in place of those of the run.

    Raises:
        RunError: there is no run. CheckpointError: it has no checkpoint yet, all are damaged, or they do not fit its
        configuration or environments. ConfigError: a directory of several runs, no such device, a number of
        environments or a seed out of range, arguments that the environments do not take.
    """
    if not 1 <= num_envs <= MOST_ENVS:
        raise ConfigError(f"--num-envs {num_envs} is out of range: expected 1 to {MOST_ENVS:,}")
    if seed < 0:
        raise ConfigError(f"--seed {seed} is out of range: expected 0 or more")
    saved = record.chosen(run)
    config = dataclasses.replace(config_of(saved.run), seed=seed)
    if env_kwargs is not None:
        config = validate(dataclasses.replace(config, env=dataclasses.replace(config.env, kwargs=env_kwargs)))
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


def evaluate(
    run: str | Path,
    *,
    episodes: int = 100,
    seed: int = 0,
    num_envs: int = 8,
    device: str = "auto",
    video: bool = False,
    greedy: bool = False,
    env_kwargs: str | None = None,
    tell: Callable[[int], object] = lambda done: None,
) -> dict[str, Any]:
    """Scores of `episodes` episodes with the newest checkpoint of the run in directory `run`, or with the one it names.

    Args:
        episodes: at least 1.
        seed, num_envs, greedy, env_kwargs: as `load`; no more environments than episodes. The published protocol
            samples.
        video: also write an episode to videos/evaluate_<agent steps>.gif in the run's directory: the first, or one more
            where the agent sees no images.
        tell: gets at every step how many episodes are done.

    Raises:
        As `load`. ConfigError: no episodes, a video of a task that shows and draws no images. RunError,
        DiskFullError: the video cannot be written.
    """
    if episodes < 1:
        raise ConfigError(f"--episodes {episodes} is out of range: expected 1 or more")
    envs = min(num_envs, episodes)
    asked: dict[str, Any] = {"seed": seed, "device": device, "greedy": greedy, "env_kwargs": env_kwargs}
    with load(run, num_envs=envs, **asked) as trained:
        agent_steps = trained.checkpoint.meta["agent_steps"]
        film = None
        if video and _image_of(trained.env) is not None:
            film = Film.of(trained)
        elif video:  # drawing takes longer than all else, so only the episode that is shown is drawn
            with load(trained.checkpoint.path, drawn=True, **asked) as drawn:
                film = Film.of(drawn)
                evaluation.play(drawn.env, drawn.policy, 1, watch=film)
        watch = film or (lambda step: None)
        played = evaluation.play(trained.env, trained.policy, episodes, watch=watch, tell=tell)
    played_by = trained.checkpoint
    about = {"run": str(played_by.run), "checkpoint": played_by.path.name, "agent_steps": agent_steps}
    if film is not None:
        about["video"] = str(film.path)
    if greedy:
        about["greedy"] = True
    if env_kwargs is not None:
        about["env_kwargs"] = json.loads(env_kwargs)
    return {**about, "seed": seed, **evaluation.summarize(played)}


class Film:
    """Writes the first episode of the first environment as a GIF, at its end or after its first LONGEST rows.

    key: the observation to keep. path: of the GIF. Raises ConfigError if the key is None.
    """

    LONGEST = 3000  # 200 seconds; the encoder holds all enlarged frames, some 200 MB

    def __init__(self, key: str | None, path: Path) -> None:
        if key is None:
            raise ConfigError("--video: this task shows no images")
        self.key, self.path, self._over = key, path, False
        self._frames: list[np.ndarray] = []

    @classmethod
    def of(cls, trained: Trained) -> "Film":
        """The film that belongs into the directory of a run."""
        name = f"evaluate_{trained.checkpoint.meta['agent_steps']:010d}.gif"
        return cls(_image_of(trained.env), trained.checkpoint.run / "videos" / name)

    def __call__(self, step: EnvStep) -> None:
        """Takes one row of every environment. Raises: RunError, DiskFullError."""
        if not self._over:
            self._frames.append(step.obs[self.key][0].copy())  # a view would keep those of all environments
            ends, cut = bool(step.is_last[0]), len(self._frames) == self.LONGEST
            self._over = ends or cut
            if cut and not ends:
                errors.warn(f"{self.path}: the first {self.LONGEST:,} rows of an episode that goes on")
            if self._over:
                save_gif(self.path, encode_gif(np.stack(self._frames)))
                self._frames.clear()


def _image_of(env: BatchEnv) -> str | None:
    """The first image that the environments show."""
    return next((key for key, spec in env.obs_specs.items() if spec.is_image), None)


@contextlib.contextmanager
def _telling(episodes: int) -> Iterator[Callable[[int], object]]:
    """Shows on stderr how many episodes are done, and yields a function to call with that number.

    A live line if stderr is a terminal, else a line of text every PLAIN_SECONDS.
    """
    console = Console(sys.stderr)
    if not console.is_terminal or console.is_dumb_terminal:
        last = time.monotonic()

        def tell(done: int) -> None:
            nonlocal last
            if time.monotonic() >= last + PLAIN_SECONDS:
                last = time.monotonic()
                console.print(f"episodes={done}/{episodes}")

        yield tell
        return
    columns = (
        *(progress.TextColumn("episodes"), progress.BarColumn(), progress.MofNCompleteColumn()),
        *(progress.TimeElapsedColumn(), progress.TextColumn("left"), progress.TimeRemainingColumn()),
    )
    with progress.Progress(*columns, console=console, transient=True) as line:
        task = line.add_task("", total=episodes)
        yield lambda done: line.update(task, completed=done)


def main() -> None:
    parser = Arguments("python -m hdfast.evaluate", __doc__)
    parser.add_argument(
        "run",
        type=given_path,
        help="directory of a run, such as runs/atari100k/Pong/seed0, or one of its checkpoints",
    )
    parser.add_argument("--episodes", type=positive, default=100, help="episodes to play")
    parser.add_argument("--seed", type=natural, default=0, help="of environments and policy")
    parser.add_argument("--num-envs", type=positive, default=8, help="environments stepped together")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--video",
        action="store_true",
        help="write the first episode as a GIF, or one more if it must be drawn for that",
    )
    parser.add_argument("--greedy", action="store_true", help="the likeliest actions instead of sampled ones")
    parser.add_argument(
        "--env.kwargs",
        dest="env_kwargs",
        metavar="JSON",
        help="with gym: keyword arguments of gymnasium.make, in place of those of the run",
    )
    flags = parser.parse_args()
    with _telling(flags.episodes) as tell:
        scores = evaluate(**vars(flags), tell=tell)
    sys.stdout.write(json.dumps(scores) + "\n")


if __name__ == "__main__":
    errors.main(main)
