"""envpool pools behind `BatchEnv`: C++ environments on their own threads.

Axes: N environments. envpool steps all of them between send and recv (sync mode), while the learner works.
"""

import ctypes
import functools
import sys
from types import ModuleType
from typing import Any

import numpy as np

from hdfast.envs.base import ArraySpec, BatchEnv, ContinuousActions, DiscreteActions, EnvStep, env_seeds, load


@functools.cache
def preload_egl() -> bool:
    """Load libEGL before envpool, with its symbols visible to it; whether that was possible.

    envpool 1.2.5 cannot draw MuJoCo's images otherwise (it kills the process instead), and once it is imported
    it is too late. Where nothing is drawn, False does no harm.
    """
    if "envpool" in sys.modules:
        return False
    try:
        ctypes.CDLL("libEGL.so.1", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def library(needed_by: str) -> ModuleType:
    """envpool, imported so that MuJoCo's images work later.

    Raises MissingLibraryError where it is not installed or does not load.
    """
    preload_egl()
    return load("envpool", needed_by=needed_by, install="pip install envpool")


def make_pool(env_id: str, *, num_envs: int, seed: int, threads: int, **settings: Any) -> Any:
    """An envpool pool with the gymnasium interface; threads=0 leaves their number to envpool.

    Raises MissingLibraryError where envpool is not installed or does not load.
    """
    return library(env_id).make(
        env_id,
        env_type="gymnasium",
        num_envs=num_envs,
        seed=env_seeds(seed, num_envs),
        num_threads=threads,
        **settings,
    )


class PoolEnv(BatchEnv):
    """A pool as a BatchEnv. They differ in `_observe`, and in whether a time limit ends the task itself."""

    source = "envpool"
    time_limit_is_terminal = False

    def __init__(
        self,
        name: str,
        pool: Any,
        *,
        num_envs: int,
        obs_specs: dict[str, ArraySpec],
        actions: DiscreteActions | ContinuousActions,
        action_repeat: int,
    ) -> None:
        super().__init__(
            name, num_envs=num_envs, obs_specs=obs_specs, actions=actions, action_repeat=action_repeat
        )
        self._pool = pool

    def _observe(self, obs: Any, info: dict[str, Any]) -> dict[str, np.ndarray]:
        """The arrays of `obs_specs`, from what the pool returned."""
        raise NotImplementedError

    def _info(self, info: dict[str, Any]) -> dict[str, np.ndarray]:
        return {}

    def _reset(self) -> EnvStep:
        obs, info = self._pool.reset()
        zero, never = np.zeros(self.num_envs, np.float32), np.zeros(self.num_envs, bool)
        return self._row(obs, zero, never, never, info)

    def _send(self, action: np.ndarray) -> None:
        self._pool.send(np.ascontiguousarray(action))

    def _recv(self) -> EnvStep:
        return self._row(*self._pool.recv())

    def _row(
        self,
        obs: Any,
        reward: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        info: dict[str, Any],
    ) -> EnvStep:
        is_first = info["elapsed_step"] == 0
        is_last = terminated | truncated
        return EnvStep(
            obs=self._observe(obs, info),
            # Some sources leave the last episode's reward, or uninitialised memory, in a reset row.
            reward=np.where(is_first, 0, reward).astype(np.float32),
            is_first=is_first,
            is_last=is_last,
            is_terminal=is_last.copy() if self.time_limit_is_terminal else terminated.copy(),
            info=self._info(info),
        )

    def _close(self) -> None:
        self._pool = None  # envpool's own close() does nothing: dropping the pool joins its threads
