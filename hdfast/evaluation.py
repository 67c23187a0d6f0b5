"""Episodes: keeping their scores while they run, and playing a number of them to the end.

Axes: N environments.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hdfast.envs.base import BatchEnv, EnvStep

Act = Callable[[Mapping[str, np.ndarray], np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Episode:
    """A finished episode: undiscounted score, length in agent steps without the reset row, success if known."""

    env: int
    score: float
    length: int
    success: bool | None = None


class EpisodeMeter:
    """Adds up the rows of N environments and hands out each episode as it ends."""

    def __init__(self, num_envs: int):
        self._score = np.zeros(num_envs, np.float64)
        self._length = np.zeros(num_envs, np.int64)
        self._success = np.zeros(num_envs, bool)

    def add(self, step: EnvStep) -> list[Episode]:
        """Takes one row of every environment and returns the episodes that end with it."""
        self._score = np.where(step.is_first, 0.0, self._score + step.reward)
        self._length = np.where(step.is_first, 0, self._length + 1)
        success = step.info.get("success")
        if success is not None:
            self._success = np.where(step.is_first, False, self._success | success.astype(bool))
        return [
            Episode(
                env=int(i),
                score=float(self._score[i]),
                length=int(self._length[i]),
                success=None if success is None else bool(self._success[i]),
            )
            for i in np.flatnonzero(step.is_last)
        ]


def play(
    env: BatchEnv,
    act: Act,
    episodes: int,
    stop: Callable[[], object] = lambda: None,
    watch: Callable[[EnvStep], object] = lambda step: None,
    tell: Callable[[int], object] = lambda done: None,
) -> list[Episode]:
    """Plays `episodes` episodes from fresh resets.

    Each environment plays its share, fixed beforehand: taking whichever episodes end first would favour short ones.

    Args:
        env: N environments; they are reset.
        act: from observations (N, ...) and is_first (N,) to actions.
        episodes: how many, at least 1.
        stop: called at every step; may raise to give up.
        watch: gets every row, including those that end or follow the last episodes.
        tell: gets the number of finished episodes at every step.
    """
    quota = np.array([episodes // env.num_envs + (i < episodes % env.num_envs) for i in range(env.num_envs)])
    meter, done = EpisodeMeter(env.num_envs), []
    step = env.reset()
    while True:
        watch(step)
        for episode in meter.add(step):
            if quota[episode.env] > 0:
                quota[episode.env] -= 1
                done.append(episode)
        tell(len(done))
        if not quota.any():
            return done
        stop()
        step = env.step(act(step.obs, step.is_first))


def summarize(episodes: list[Episode]) -> dict[str, Any]:
    """Mean score and length, standard error, and every single score, JSON-able."""
    scores = [episode.score for episode in episodes]
    error = float(np.std(scores, ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else 0.0
    summary: dict[str, Any] = {
        "score": float(np.mean(scores)),
        "length": float(np.mean([episode.length for episode in episodes])),
        "episodes": len(episodes),
        "standard_error": error,
        "scores": scores,
    }
    if any(episode.success is not None for episode in episodes):
        summary["success"] = float(np.mean([bool(episode.success) for episode in episodes]))
    return summary
