"""Meta-World's v3 tasks through envpool: images of the corner camera, the state of 39 numbers, or both.

500 agent steps, then the time limit, which is not terminal. Goals are drawn anew in each episode, and the state
shows them (its last three numbers), as in the goal-observable variant that the authors train on. Each row's
`info["success"]` says whether the task is solved in it; no agent may see it.

envpool's models are Meta-World's without the textures: white walls, a white floor and pale objects. The models drawn
here come from the package `metaworld`, of which nothing else is used.

Axes: N environments.
"""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from hdfast.envs.mujoco import MujocoEnv
from hdfast.runtime.errors import MissingLibraryError
from hdfast.suites import Task

CORNER_CAMERA = 1  # mounted upside down


def textured_models(needed_by: str) -> Path:
    """The folder of models and textures in the package `metaworld`, which is not imported.

    Raises MissingLibraryError, with the command that installs it, if it is missing.
    """
    package = importlib.util.find_spec("metaworld")
    folders = (
        [Path(folder, "assets") for folder in package.submodule_search_locations or ()] if package else []
    )
    for folder in folders:
        if (folder / "textures").is_dir():
            return folder
    raise MissingLibraryError(
        f"images of {needed_by} need the textures of metaworld 3",
        hint="pip install --no-deps 'metaworld>=3.0,<3.1'",
    )


class MetaWorld(MujocoEnv):
    """One task of Meta-World.

    Raises MissingLibraryError where images are wanted and the package `metaworld` is not installed.
    """

    def __init__(self, task: Task, *, obs: str, **settings: Any) -> None:
        super().__init__(
            task,
            obs=obs,
            camera=CORNER_CAMERA,
            flip=True,
            assets="metaworld/assets",
            models=textured_models(task.name) if obs != "state" else None,
            partially_observable=False,
            **settings,
        )

    def _info(self, info: dict[str, Any]) -> dict[str, np.ndarray]:
        return {"success": (info["success"] > 0) & (info["elapsed_step"] > 0)}
