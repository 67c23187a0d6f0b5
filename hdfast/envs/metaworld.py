"""Meta-World's v3 tasks through envpool: 64 x 64 images of the corner camera, the state of 39 numbers, or both.

500 agent steps, then the time limit, which is not terminal. Goals are drawn anew in each episode, and the state
shows them (its last three numbers), as in the goal-observable variant that the authors train on. Each row's
`info["success"]` says whether the task is solved in it; no agent may see it.

Axes: N environments.
"""

from typing import Any

import numpy as np

from hdfast.envs.mujoco import MujocoEnv
from hdfast.suites import Task

CORNER_CAMERA = 1  # hangs head down


class MetaWorld(MujocoEnv):
    """One task of Meta-World."""

    def __init__(self, task: Task, **settings: Any) -> None:
        super().__init__(
            task,
            camera=CORNER_CAMERA,
            flip=True,
            assets="metaworld",
            partially_observable=False,
            **settings,
        )

    def _info(self, info: dict[str, Any]) -> dict[str, np.ndarray]:
        return {"success": (info["success"] > 0) & (info["elapsed_step"] > 0)}
