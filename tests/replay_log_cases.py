"""Replays with a log, and rows that depend on nothing but the agent step.

Axes: N environments.
"""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from hdfast.envs import ArraySpec
from hdfast.replay import Replay, log

NUM_ENVS = 2
SPECS = {
    "image": ArraySpec((8, 8, 3), np.uint8),
    "state": ArraySpec((3,), np.float64),
    "action": ArraySpec((2,), np.float32),
    "reward": ArraySpec((), np.float32),
    **{key: ArraySpec((), np.bool_) for key in ("is_first", "is_last", "is_terminal")},
}


def make_row(agent_step: int) -> dict[str, np.ndarray]:
    """The row of an agent step, always the same; rows vary slowly, except for some random bits."""
    rng = np.random.default_rng(agent_step)
    image = np.full((NUM_ENVS, 8, 8, 3), agent_step // 5 % 256, np.uint8)
    image[:, agent_step % 8] = rng.integers(256, size=(8, 3), dtype=np.uint8)
    return {
        "image": image,
        "state": rng.integers(2**63, size=(NUM_ENVS, 3)).view(np.float64),
        "action": rng.normal(size=(NUM_ENVS, 2)).astype(np.float32),
        "reward": np.full(NUM_ENVS, agent_step, np.float32),
        **{key: rng.random(NUM_ENVS) < 0.2 for key in ("is_first", "is_last", "is_terminal")},
    }


def new_replay(directory: Path, *, ring: int = 20, checkpoints: int = 2) -> Replay:
    kwargs = {"directory": directory / "replay", "seed": 5, "checkpoints": checkpoints}
    return Replay(SPECS, num_envs=NUM_ENVS, capacity=NUM_ENVS * ring, **kwargs)


def extend(replay: Replay, rows: int) -> Replay:
    for agent_step in range(replay.rows_added, replay.rows_added + rows):
        replay.add(make_row(agent_step))
    return replay


def loaded(directory: Path, state: dict[str, torch.Tensor], *, ring: int = 20) -> Replay:
    replay = new_replay(directory, ring=ring)
    replay.load_state_dict(state)
    return replay


def check_content(replay: Replay, rows: int) -> None:
    """Checks that the ring holds the newest rows up to `rows`, bit for bit."""
    assert replay.rows_added == int(replay._rows_added) == rows
    for agent_step in range(max(rows - replay.ring, 0), rows):
        for key, array in make_row(agent_step).items():
            found = replay._by_env[key][:, agent_step % replay.ring]
            assert found.tobytes() == array.tobytes(), (agent_step, key)


def chunks(directory: Path) -> list[Path]:
    return sorted((directory / "replay").iterdir())


def no_room(*args) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def nbytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in chunks(directory))


def new_packed_nbytes() -> int:
    return Replay(SPECS, num_envs=NUM_ENVS, capacity=NUM_ENVS)._layout.packed_nbytes


def make_blocks_small(set_: Callable[[object, str, int], None] = setattr) -> None:
    """Records of 4 rows, chunks of about 20 rows."""
    set_(log, "BLOCK_BYTES", 4 * new_packed_nbytes())
    set_(log, "CHUNK_BYTES", 2500)
