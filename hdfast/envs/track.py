"""Track: a dot wanders along the top of the picture, and the paddle at the bottom earns 1 in each step it is below it.

A task of the suite `demo`. Behind both, sixteen blocks take other colours in every frame: nothing depends on them, no
one can foresee them, and most of the picture's squared error is theirs. TrackGrey is the same without them, with the
same dots. Actions are left, stay, right. An episode has 32 steps, and its end is a truncation. The dot moves by a cell
a step and turns at the walls, elsewhere one time in ten.

Axes: N environments. The 8 cells of a row are 2 pixels wide each.
"""

import numpy as np

from hdfast.envs.base import ArraySpec, BatchEnv, DiscreteActions, EnvStep, env_seeds
from hdfast.suites import Task

SIZE, CELL, BLOCK = 16, 2, 4  # pixels
CELLS = SIZE // CELL
REACH = 1  # cells to either side that the paddle covers
TURNS = 0.1
DOT = (255, 255, 255)
PADDLE = (0, 0, 255)
GREY = 128


class Track(BatchEnv):
    """Track, or TrackGrey, as images, uint8 (N, 16, 16, 3) under the key `image`."""

    source = "hdfast"

    def __init__(self, task: Task, *, num_envs: int, seed: int, action_repeat: int, threads: int = 0) -> None:
        super().__init__(
            task.name,
            num_envs=num_envs,
            obs_specs={"image": ArraySpec((SIZE, SIZE, 3), np.dtype(np.uint8))},
            actions=DiscreteActions(3),
            action_repeat=action_repeat,
        )
        assert task.time_limit is not None
        self._length, self._grey = task.time_limit, task.env_id == "TrackGrey"
        self._rngs = [np.random.default_rng(one) for one in env_seeds(seed, num_envs)]
        self._dot, self._way, self._paddle, self._elapsed = np.zeros((4, num_envs), np.int64)

    def _reset(self) -> EnvStep:
        self._elapsed[:] = self._length
        self._send(np.zeros(self.num_envs, np.int32))
        return self._recv()

    def _send(self, action: np.ndarray) -> None:
        self._action = action.copy()

    def _recv(self) -> EnvStep:
        is_first = self._elapsed == self._length
        self._elapsed = np.where(is_first, 0, self._elapsed + 1)
        image = np.empty((self.num_envs, SIZE, SIZE, 3), np.uint8)
        for i, rng in enumerate(self._rngs):
            if is_first[i]:
                self._dot[i], self._paddle[i] = rng.integers(CELLS, size=2)
                self._way[i] = rng.choice((-1, 1))
            else:
                self._move(i, rng)
            colours = rng.integers(256, size=(SIZE // BLOCK, SIZE // BLOCK, 3), dtype=np.uint8)
            image[i] = GREY if self._grey else colours.repeat(BLOCK, 0).repeat(BLOCK, 1)
            column = CELL * self._dot[i]
            image[i, 1 : 1 + CELL, column : column + CELL] = DOT
            left, right = self._paddle[i] - REACH, self._paddle[i] + REACH + 1
            image[i, -CELL:, CELL * max(left, 0) : CELL * right] = PADDLE
        below = np.abs(self._dot - self._paddle) <= REACH
        is_last = self._elapsed == self._length
        return EnvStep(
            obs={"image": image},
            reward=(below & ~is_first).astype(np.float32),
            is_first=is_first,
            is_last=is_last,
            is_terminal=np.zeros_like(is_last),
        )

    def _move(self, i: int, rng: np.random.Generator) -> None:
        if rng.random() < TURNS or not 0 <= self._dot[i] + self._way[i] < CELLS:
            self._way[i] *= -1
        if not 0 <= self._dot[i] + self._way[i] < CELLS:  # turned towards a wall
            self._way[i] *= -1
        self._dot[i] += self._way[i]
        self._paddle[i] = np.clip(self._paddle[i] + self._action[i] - 1, 0, CELLS - 1)

    def _close(self) -> None:
        pass
