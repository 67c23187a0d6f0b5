"""Where data comes from: one batched interface (`base`), one file per source.

Importing this imports no source: envpool, ale-py and MuJoCo are loaded where `make` needs them.
"""

from collections.abc import Callable
from typing import Any

from hdfast import suites
from hdfast.envs.base import ArraySpec, BatchEnv, ContinuousActions, DiscreteActions, EnvStep, installed
from hdfast.runtime.errors import MissingLibraryError

__all__ = ["ArraySpec", "BatchEnv", "ContinuousActions", "DiscreteActions", "EnvStep", "check", "make"]


def make(
    suite: str,
    task: str,
    *,
    num_envs: int,
    seed: int,
    source: str = "auto",
    obs: str = "auto",
    render: str = "full",
    image_size: int = 64,
    threads: int = 0,
    kwargs: str = "{}",
    time_limit: int = 0,
    stop: Callable[[], object] = lambda: None,
) -> BatchEnv:
    """The environments of one task, by the names of `hdfast.suites`.

    num_envs: how many step together.
    seed: 0 or more; decides everything random in them. Training and evaluation need different ones.
    source: for Atari `envpool`, `ale`, or `auto`: envpool where it is installed, else ale.
    obs: for robotic tasks and those of gymnasium `image`, `state` or `both`; `auto` is image, of gymnasium state
        where no image is observed.
    render: for robotic tasks `full`, or `fast`: no shadows, no antialiasing.
    image_size: side in pixels of the images of robotic tasks, and of those of gymnasium that are resized.
    threads: of the source; 0 lets it choose.
    kwargs: keyword arguments of gymnasium.make, a JSON object.
    time_limit: agent steps after which an episode of gymnasium is truncated; 0 leaves it to the environment.
    stop: called while waiting for those of gymnasium; what it raises ends the wait if they hang.

    Raises UnknownName (a ValueError) for a suite, a task or a setting that does not exist, listing the
    nearest; MissingLibraryError, with the command that installs it, where a package or system library is
    missing.
    """
    benchmark = suites.get(suite)
    found = benchmark.task(task)
    if obs == "auto" and benchmark.source != "gym":
        obs = "image"
    benchmark.check_env(source=source, obs=obs, render=render)
    if num_envs < 1 or threads < 0:
        raise ValueError(f"num_envs is {num_envs} and threads {threads}; expected 1 or more and 0 or more")
    shared: dict[str, Any] = {
        "num_envs": num_envs,
        "seed": seed,
        "action_repeat": benchmark.action_repeat,
        "threads": threads,
    }

    match benchmark.source:
        case "atari":
            return _atari(source)(found, **shared)
        case "demo":
            from hdfast.envs.catch import Catch
            from hdfast.envs.track import Track

            if found.env_id == "Catch-v0":
                return Catch(found, **shared)
            if source != "auto":
                raise suites.UnknownName(f"--env.source cannot be {source!r} for {found.name}; choose 'auto'")
            return Track(found, **shared)
        case "dmc":
            from hdfast.envs.dmc import ControlSuite

            return ControlSuite(found, **shared, obs=obs, render=render, image_size=image_size)
        case "gym":
            from hdfast.envs.gym import GymEnv

            of_gym: dict[str, Any] = {"kwargs": kwargs, "time_limit": time_limit}
            return GymEnv(found, **shared, obs=obs, image_size=image_size, **of_gym, stop=stop)
        case "metaworld":
            from hdfast.envs.metaworld import MetaWorld

            return MetaWorld(found, **shared, obs=obs, render=render, image_size=image_size)


def check(suite: str, task: str) -> None:
    """Raises what `make` would about a name that only the source can know, without making an environment."""
    benchmark = suites.get(suite)
    if benchmark.source == "gym":
        from hdfast.envs.gym import find

        find(benchmark.task(task).env_id)


def _atari(source: str) -> Callable[..., BatchEnv]:
    from hdfast.envs.ale import AtariALE
    from hdfast.envs.atari import AtariPool

    if source == "auto":
        sources = [
            name for name, package in (("envpool", "envpool"), ("ale", "ale_py")) if installed(package)
        ]
        if not sources:
            raise MissingLibraryError(
                "Atari needs envpool or ale-py", hint="pip install envpool, or the smaller ale-py"
            )
        source = sources[0]
    return AtariPool if source == "envpool" else AtariALE
