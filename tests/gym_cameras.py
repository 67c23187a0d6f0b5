"""Registers environments whose images are not in the outermost Dict of their observations."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from tests.gym_envs import Count, box, pixels

EYES = spaces.Dict(
    {"left": pixels(8, 8, 3), "far": spaces.Dict({"top": pixels(16, 16, 3)}), "zoom": box(1, high=9)}
)
HAND = spaces.Dict({"tip": box(2, high=9), "force": box(1, high=9)})  # without an image: one vector


class Cameras(Count):
    """Observes the numbers of its age, the image "top" in twice as many."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(spaces.Dict({"eyes": EYES, "hand": HAND, "arm": box(2, high=9)}), **settings)

    def observe(self, space: spaces.Space | None = None) -> Any:
        found = super().observe(space)
        if space is None:
            found["eyes"]["far"]["top"] *= 2
        return found


class Paired(Count):
    """Observes two images in a Tuple."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(spaces.Dict({"eyes": spaces.Tuple((pixels(8, 8, 3),) * 2)}), **settings)

    def observe(self, space: spaces.Space | None = None) -> Any:
        return {"eyes": (np.full((8, 8, 3), self.age, np.uint8),) * 2}


for _kind in (Cameras, Paired):
    gymnasium.register(f"{_kind.__name__}-v0", _kind, max_episode_steps=1000)
