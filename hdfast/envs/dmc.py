"""The DeepMind Control Suite through envpool: images, states, or both; two control steps per agent step.

An episode has 1,000 control steps; its end is a time limit, never terminal.

Axes: N environments.
"""

from typing import Any

import numpy as np

from hdfast.envs.base import env_seeds
from hdfast.envs.mujoco import MujocoEnv
from hdfast.suites import Task

# The camera that Dreamer's agents look through: the first of the model, but a quadruped's stands far away.
CAMERA, QUADRUPED_CAMERA = 0, 2

# envpool has one set of vectors for each body, dm_control one for each task; dm_control's lack these.
_QUADRUPED_WALK = {"origin", "rangefinder", "ball_state", "target_position"}
_HUMANOID = {"joint_angles", "head_height", "extremities", "torso_vertical", "com_velocity"}
_UNUSED: dict[str, set[str]] = {
    "dog_run": {"ball_state", "target_position"},
    "dog_stand": {"ball_state", "target_position"},
    "dog_trot": {"ball_state", "target_position"},
    "dog_walk": {"ball_state", "target_position"},
    "finger_spin": {"target_position", "dist_to_target"},
    "fish_upright": {"target"},
    "humanoid_run": {"position"},
    "humanoid_run_pure_state": _HUMANOID,
    "humanoid_stand": {"position"},
    "humanoid_walk": {"position"},
    "quadruped_escape": {"ball_state", "target_position"},
    "quadruped_fetch": {"origin", "rangefinder"},
    "quadruped_run": _QUADRUPED_WALK,
    "quadruped_walk": _QUADRUPED_WALK,
}

# dm_control hides the target's marks in finger_spin, which has no target. envpool means to, but fails: the marks
# show the angle of a body that looks the same from all sides.
_LOOKS = {"finger_spin": {r'(<site name="(?:tip|target)")': r'\1 rgba="0 0 0 0"'}}

# To be exchanged, sky and floor are drawn in a green that no light changes, with hard edges.
GREEN = (0, 255, 0)
_SKY = '<texture name="skybox" type="skybox" builtin="flat" rgb1="0 1 0" rgb2="0 1 0" width="8" height="8"/>'
_GREEN_SCREEN = {
    r'<texture name="skybox"[^>]*>': _SKY,
    r'<material name="(grid|background)"[^>]*>': r'<material name="\1" rgba="0 1 0 1" emission="1" specular="0"/>',
    r"<quality\b[^>]*>": '<quality shadowsize="2048" offsamples="0"/>',
}
BLOCKS = 4  # to a side of the image


class ControlSuite(MujocoEnv):
    """One task of the DeepMind Control Suite.

    background: `task` as the task's authors have it, or `blocks`: in place of sky and floor, 4 x 4 blocks that take
    random colours in every frame, which `seed` decides, too. The physics is the same.
    """

    def __init__(
        self, task: Task, *, num_envs: int, seed: int, background: str = "task", **settings: Any
    ) -> None:
        blocks = background == "blocks"
        super().__init__(
            task,
            num_envs=num_envs,
            seed=seed,
            camera=QUADRUPED_CAMERA if task.name.startswith("quadruped_") else CAMERA,
            assets="assets_dmc",
            looks={**_LOOKS.get(task.name, {}), **(_GREEN_SCREEN if blocks else {})},
            unused=frozenset(_UNUSED.get(task.name, ())),
            **settings,
        )
        self._rngs = [np.random.default_rng(one) for one in env_seeds(seed, num_envs)] if blocks else []

    def _draw(self) -> np.ndarray:
        images = super()._draw()
        for image, rng in zip(images, self._rngs, strict=False):
            colours = rng.integers(256, size=(BLOCKS, BLOCKS, 3), dtype=np.uint8)
            behind = colours.repeat(self._side // BLOCKS, 0).repeat(self._side // BLOCKS, 1)
            green = (image == GREEN).all(-1)
            image[green] = behind[green]
        return images
