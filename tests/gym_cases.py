"""Environments of tests.gym_envs, as a run makes them."""

from typing import Any

from hdfast import envs
from hdfast.envs.base import BatchEnv


def make(name: str, num_envs: int = 1, **settings: Any) -> BatchEnv:
    """N environments of the suite gym, with seed 0 unless settings say otherwise."""
    return envs.make("gym", f"tests.gym_envs:{name}-v0", num_envs=num_envs, **{"seed": 0, **settings})
