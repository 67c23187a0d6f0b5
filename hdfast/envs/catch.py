"""Catch: a ball falls through ten rows of five cells, and the paddle in the lowest row must be under it.

A task of the suite `demo`, from envpool's Catch (bsuite's rules): actions are left, stay, right; the last
of the ten rows of an episode is terminal with reward +1 (caught) or -1 (missed), every other reward is 0.

Axes: N environments. The 10 x 5 board is stretched over 16 x 16 pixels.
"""

from typing import Any

import numpy as np

from hdfast.envs.base import ArraySpec, DiscreteActions
from hdfast.envs.pool import PoolEnv, make_pool
from hdfast.suites import Task

SIZE = 16
ROWS, COLUMNS = 10, 5
BALL = (255, 255, 0)
PADDLE = (0, 0, 255)  # of the whole lowest row: a ball that is missed shows there as a second paddle
# What an untrained decoder draws: nothing must be learnt before ball and paddle stand out.
GREY = np.uint8(128)


class Catch(PoolEnv):
    """Catch as images, uint8 (N, 16, 16, 3) under the key `image`."""

    def __init__(self, task: Task, *, num_envs: int, seed: int, action_repeat: int, threads: int = 0) -> None:
        super().__init__(
            task.name,
            make_pool(task.env_id, num_envs=num_envs, seed=seed, threads=threads, height=ROWS, width=COLUMNS),
            num_envs=num_envs,
            obs_specs={"image": ArraySpec((SIZE, SIZE, 3), np.dtype(np.uint8))},
            actions=DiscreteActions(3),
            action_repeat=action_repeat,
        )
        self._cells = np.ix_(
            np.arange(num_envs), np.arange(SIZE) * ROWS // SIZE, np.arange(SIZE) * COLUMNS // SIZE
        )
        self._colours = np.full((ROWS, 1, 3), BALL, np.uint8)
        self._colours[-1] = PADDLE

    def _observe(self, obs: np.ndarray, info: dict[str, Any]) -> dict[str, np.ndarray]:
        board = np.where(obs[..., None] > 0, self._colours, GREY)  # (N, 10, 5) -> (N, 10, 5, 3)
        return {"image": board[self._cells]}  # -> (N, 16, 16, 3)
