"""Sources of randomness in a run: a seed for each use, and the environments seeded with one."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from hdfast import envs
from hdfast.config import Config
from hdfast.envs.base import BatchEnv
from hdfast.suites import Task


def stream_seed(seed: int, stream: str, *numbers: int) -> int:
    """A seed for one use of randomness, so that no two uses share a sequence."""
    words = [seed, *stream.encode(), *numbers]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def make_envs(
    config: Config,
    task: Task,
    *,
    num_envs: int,
    stream: str,
    agent_steps: int = 0,
    stop: Callable[[], object] = lambda: None,
) -> BatchEnv:
    """The environments of `task`, seeded for `stream` ("train", "eval") and for the agent step at which they begin.

    Without that step, a resumed run would meet its first episodes again. stop: as `hdfast.envs.make`.
    """
    return envs.make(
        config.suite,
        task.name,
        seed=stream_seed(config.seed, stream, agent_steps) % 2**31,
        stop=stop,
        **vars(replace(config.env, num_envs=num_envs)),
    )
