"""Atari games through envpool, as in the paper's Atari 100k.

RGB of 64 x 64 pixels by area interpolation, the maximum of the last two of four repeated frames, the game's
minimal action set, up to 30 no-ops before an episode, no sticky actions, no fire on reset, lives unused,
rewards not clipped, a limit of agent steps per episode. Pixels, rewards and ends are those of ale-py with
OpenCV's area resize, but for one image: if the game ends within the first two of the four frames, envpool does not
take the maximum that the authors' program takes.

Axes: N environments.
"""

from typing import Any

import numpy as np

from hdfast.envs.base import ArraySpec, DiscreteActions
from hdfast.envs.pool import PoolEnv, make_pool
from hdfast.suites import Task

SIZE = 64
NOOP_MAX = 30


class AtariPool(PoolEnv):
    """One Atari game, uint8 images (N, 64, 64, 3) under the key `image`.

    A time limit counts as terminal: the authors' code sets is_terminal = is_last, so the model learns that
    the episode ends there. Each episode begins with 1 to noop_max no-ops (with the authors and in `ale`: 0 to
    noop_max - 1).
    """

    time_limit_is_terminal = True

    def __init__(
        self,
        task: Task,
        *,
        num_envs: int,
        seed: int,
        action_repeat: int,
        threads: int = 0,
        noop_max: int = NOOP_MAX,
    ) -> None:
        pool = make_pool(
            task.env_id,
            num_envs=num_envs,
            seed=seed,
            threads=threads,
            img_height=SIZE,
            img_width=SIZE,
            use_inter_area_resize=True,
            gray_scale=False,
            stack_num=1,
            frame_skip=action_repeat,
            noop_max=noop_max,
            max_episode_steps=task.time_limit,
            full_action_space=False,
            repeat_action_probability=0.0,
            use_fire_reset=False,
            episodic_life=False,
            zero_discount_on_life_loss=False,
            reward_clip=False,
        )
        super().__init__(
            task.name,
            pool,
            num_envs=num_envs,
            obs_specs={"image": ArraySpec((SIZE, SIZE, 3), np.dtype(np.uint8))},
            actions=DiscreteActions(int(pool.action_space.n)),
            action_repeat=action_repeat,
        )

    def _observe(self, obs: np.ndarray, info: dict[str, Any]) -> dict[str, np.ndarray]:
        return {"image": np.ascontiguousarray(obs.transpose(0, 2, 3, 1))}  # (N, 3, 64, 64) -> (N, 64, 64, 3)
