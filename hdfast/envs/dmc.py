"""The DeepMind Control Suite through envpool: images, states, or both; two control steps per agent step.

An episode has 1,000 control steps; its end is a time limit, never terminal.

Axes: N environments.
"""

from typing import Any

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


class ControlSuite(MujocoEnv):
    """One task of the DeepMind Control Suite."""

    def __init__(self, task: Task, **settings: Any) -> None:
        super().__init__(
            task,
            camera=QUADRUPED_CAMERA if task.name.startswith("quadruped_") else CAMERA,
            assets="assets_dmc",
            looks=_LOOKS.get(task.name),
            unused=frozenset(_UNUSED.get(task.name, ())),
            **settings,
        )
