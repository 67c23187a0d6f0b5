"""What a row of replay holds, and rows of noise to try an update on.

Axes: N environments.
"""

from collections.abc import Mapping

import numpy as np

from hdfast.envs.base import ArraySpec, ContinuousActions, DiscreteActions


def replay_specs(
    obs_specs: Mapping[str, ArraySpec], actions: DiscreteActions | ContinuousActions
) -> dict[str, ArraySpec]:
    """What one row of one environment holds."""
    flag = ArraySpec((), np.dtype(bool))
    return {
        **obs_specs,
        "action": actions.spec,
        "reward": ArraySpec((), np.dtype(np.float32)),
        "is_first": flag,
        "is_last": flag,
        "is_terminal": flag,
    }


def random_row(
    obs_specs: Mapping[str, ArraySpec],
    actions: DiscreteActions | ContinuousActions,
    num_envs: int,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """One row (N, ...) of every key: bytes and Normal numbers as observations, one in 50 the last of an episode.

    Rows are independent of each other: is_first is random, too.
    """
    row = {"action": actions.sample(rng, num_envs), "reward": rng.standard_normal(num_envs, np.float32)}
    for key, spec in obs_specs.items():
        shape = (num_envs, *spec.shape)
        noise = rng.integers(256, size=shape) if spec.dtype == np.uint8 else rng.standard_normal(shape)
        row[key] = noise.astype(spec.dtype)
    row["is_last"] = rng.random(num_envs) < 0.02
    return {**row, "is_first": rng.random(num_envs) < 0.02, "is_terminal": row["is_last"].copy()}
