"""The batch that every peer updates on: noise, in episodes of 100 rows. This runs on a peer's interpreter.

Axes: B windows, T rows of a window. Only NumPy is imported, all that the peers have in common.
"""

import numpy as np

ACTIONS = 6
SIDE = 64


def noise(batch, length):
    """(B, T, ...) of all that a replay returns: image bytes, one-hot float32 action, float32 reward, three flags."""
    rng = np.random.default_rng(0)
    t = np.broadcast_to(np.arange(length), (batch, length))
    ends = t % 100 == 99
    return {
        "image": rng.integers(256, size=(batch, length, SIDE, SIDE, 3), dtype=np.uint8),
        "action": np.eye(ACTIONS, dtype=np.float32)[rng.integers(ACTIONS, size=(batch, length))],
        "reward": rng.standard_normal((batch, length), np.float32),
        "is_first": t % 100 == 0,
        "is_last": ends,
        "is_terminal": ends.copy(),
    }
