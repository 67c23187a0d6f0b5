"""The Atari protocol of `hdfast.envs.atari` over ale-py's emulator: a small second source.

For machines without envpool. After the same number of no-ops, the same actions give the same pixels, rewards
and ends as envpool, to the bit; but a game's last image may be another there, and is the authors' here. ale-py's own
vector environment is not used, because it leaves the last frame out of the image that ends an episode. The emulator
holds Python's interpreter lock while it runs a frame, so stepping overlaps the learner only while the learner
computes outside Python.

Axes: N environments; a frame is (210, 160, 3) uint8.
"""

import os
import re
from concurrent.futures import Future, ThreadPoolExecutor
from types import ModuleType
from typing import NamedTuple

import numpy as np

from hdfast.envs.atari import NOOP_MAX, SIZE
from hdfast.envs.base import ArraySpec, BatchEnv, DiscreteActions, EnvStep, env_seeds, load
from hdfast.suites import Task

FRAME = (210, 160, 3)
# 160 columns become 64: five columns make two, with weights 2 2 1 0 0 and 0 0 1 2 2 (over 5).
# 210 rows become 64: each covers 3.28125 of them and touches five, with weights over 105 (in units of 1/32).
_EDGES = np.arange(SIZE + 1) * FRAME[0] / SIZE
_ROWS = np.floor(_EDGES[:-1, None]).astype(np.int64) + np.arange(5)
_ROW_WEIGHTS = np.minimum(_EDGES[1:, None], _ROWS + 1) - np.maximum(_EDGES[:-1, None], _ROWS)
_ROW_WEIGHTS = (32 * _ROW_WEIGHTS.clip(min=0)).astype(np.int32)
_ROWS = _ROWS.clip(max=FRAME[0] - 1)


def area_resize(frame: np.ndarray) -> np.ndarray:
    """Mean over equal areas, rounded: uint8 (210, 160, 3) -> (64, 64, 3). OpenCV's INTER_AREA, to the bit.

    In integers, over the common denominator 5 * 105 = 525, which is odd, so that no mean lies half-way.
    """
    a, b, c, d, e = frame.reshape(210, 32, 5, 3).astype(np.uint16).transpose(2, 0, 1, 3)
    columns = np.stack([2 * (a + b) + c, c + 2 * (d + e)], axis=2).reshape(210, SIZE * 3)
    total = np.zeros((SIZE, SIZE * 3), np.int32)
    for tap in range(5):
        total += _ROW_WEIGHTS[:, tap, None] * columns[_ROWS[:, tap]]
    return ((total + 262) // 525).astype(np.uint8).reshape(SIZE, SIZE, 3)


def rom_name(game: str) -> str:
    """`MsPacman` -> `ms_pacman`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", game).lower()


class _Row(NamedTuple):
    image: np.ndarray
    reward: float
    is_first: bool
    is_last: bool


class _Game:
    """One emulator with the protocol around it; each call gives a row."""

    def __init__(
        self, ale_py: ModuleType, task: Task, *, seed: int, action_repeat: int, noops: range
    ) -> None:
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self._ale = ale_py.ALEInterface()
        self._ale.setInt("random_seed", seed)
        self._ale.setFloat("repeat_action_probability", 0.0)
        self._ale.loadROM(ale_py.roms.get_rom_path(rom_name(task.name)))
        self.actions = self._ale.getMinimalActionSet()
        self._rng = np.random.default_rng(seed)
        self._noops = noops
        self._repeat = action_repeat
        assert task.time_limit is not None
        self._time_limit = task.time_limit
        self._frame, self._earlier = np.zeros((2, *FRAME), np.uint8)
        self._agent_step = 0
        self._over = True

    def reset(self) -> _Row:
        self._ale.reset_game()
        for _ in range(self._rng.choice(self._noops)):
            self._ale.act(0)
            if self._ale.game_over():
                self._ale.reset_game()
        self._agent_step = 0
        self._earlier[:] = 0
        return self._row(0.0, is_first=True, is_last=False)

    def step(self, action: int) -> _Row:
        if self._over:
            return self.reset()
        reward = 0
        for repeat in range(self._repeat):
            reward += self._ale.act(self.actions[action])
            if repeat == self._repeat - 2:
                self._ale.getScreenRGB(self._earlier)
            if self._ale.game_over():
                break
        self._agent_step += 1
        is_last = self._ale.game_over() or self._agent_step >= self._time_limit
        return self._row(float(reward), is_first=False, is_last=is_last)

    def _row(self, reward: float, *, is_first: bool, is_last: bool) -> _Row:
        self._over = is_last
        self._ale.getScreenRGB(self._frame)
        return _Row(area_resize(np.maximum(self._frame, self._earlier)), reward, is_first, is_last)


class AtariALE(BatchEnv):
    """One Atari game, uint8 images (N, 64, 64, 3) under the key `image`; a time limit counts as terminal.

    noops: the range from which the number of no-ops before each episode is drawn (the authors': 0 to 29).
    """

    source = "ale"

    def __init__(
        self,
        task: Task,
        *,
        num_envs: int,
        seed: int,
        action_repeat: int,
        threads: int = 0,
        noops: range = range(NOOP_MAX),
    ) -> None:
        ale_py = load("ale_py", needed_by=task.name, install="pip install ale-py")
        self._games = [
            _Game(ale_py, task, seed=one, action_repeat=action_repeat, noops=noops)
            for one in env_seeds(seed, num_envs)
        ]
        super().__init__(
            task.name,
            num_envs=num_envs,
            obs_specs={"image": ArraySpec((SIZE, SIZE, 3), np.dtype(np.uint8))},
            actions=DiscreteActions(len(self._games[0].actions)),
            action_repeat=action_repeat,
        )
        self._workers = ThreadPoolExecutor(threads or min(num_envs, os.cpu_count() or 1), "ale")
        self._rows: list[Future[_Row]] = []

    def _reset(self) -> EnvStep:
        self._rows = [self._workers.submit(game.reset) for game in self._games]
        return self._recv()

    def _send(self, action: np.ndarray) -> None:
        self._rows = [
            self._workers.submit(game.step, one)
            for game, one in zip(self._games, action.tolist(), strict=True)
        ]

    def _recv(self) -> EnvStep:
        image, reward, is_first, is_last = zip(*(row.result() for row in self._rows), strict=True)
        return EnvStep(
            obs={"image": np.stack(image)},
            reward=np.array(reward, np.float32),
            is_first=np.array(is_first),
            is_last=np.array(is_last),
            is_terminal=np.array(is_last),
        )

    def _close(self) -> None:
        self._workers.shutdown()
        self._games = []
