"""Warnings about settings that do not fit what a run sees."""

from collections.abc import Mapping
from operator import attrgetter

import numpy as np

from hdfast.agent.open_loop import CONTEXT
from hdfast.config import Config, default_config
from hdfast.envs.base import ArraySpec, ContinuousActions, DiscreteActions
from hdfast.runtime.errors import warn

UPDATES = 500  # before which a small range of returns says nothing
SMALL = 0.1  # of the least range of returns, and of a reward


def check_settings(
    config: Config, obs_specs: Mapping[str, ArraySpec], actions: DiscreteActions | ContinuousActions
) -> None:
    """Warns of settings that were chosen and change nothing, given what a run sees and does."""
    images = [spec.is_image for spec in obs_specs.values()]
    pointless = {
        "for continuous actions": isinstance(actions, ContinuousActions) and "behavior.unimix",
        "where nothing observed is an image": not any(images) and "harmony.image loss.image",
        "where all that is observed are images": all(images) and "loss.vector",
    }
    usual = default_config(config.suite, config.size)
    for where, names in pointless.items():
        for name in (names or "").split():
            value = attrgetter(name)
            if value(config) != value(usual):
                warn(f"--{name.replace('_', '-')} changes nothing {where}")
    if config.log.video_every and config.replay.length <= CONTEXT:
        what = f"--replay.length {config.replay.length} is too short for videos, which show what follows {CONTEXT} rows"
        warn(f"{what}: there will be none")


class RewardScale:
    """Warns once, in each session, of rewards so small that the actor hardly feels its advantages."""

    def __init__(self, config: Config, name: str):
        self._floor, self._name = config.behavior.return_floor, name
        self._largest, self._told = 0.0, False

    def add(self, reward: np.ndarray) -> None:
        """Takes the rewards (N,) of a step."""
        self._largest = max(self._largest, float(np.abs(reward).max()))

    def check(self, updates: int, metrics: Mapping[str, float]) -> None:
        """Takes the updates so far, and the metrics of some of them."""
        if self._told or updates < UPDATES or not 0 < self._largest < SMALL * self._floor:
            return
        size = metrics.get("return_high", np.inf) - metrics.get("return_low", 0.0)
        if size < SMALL * self._floor:
            self._told = True
            what = f"rewards are at most {self._largest:.2g} so far, and returns differ by {size:.2g}"
            why = f"advantages are divided by {self._floor:g}, so that the actor hardly learns"
            warn(f"{self._name}: {what}; {why}: scale rewards up, or --behavior.return-floor down")
