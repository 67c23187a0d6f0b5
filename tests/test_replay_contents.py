"""Rows of noise, on which an update is tried and measured."""

import numpy as np
import pytest

from hdfast.envs.base import ArraySpec
from hdfast.replay.contents import random_row, replay_specs
from hdfast.replay.rows import RowLayout
from tests.agent_cases import make_actions

OBSERVATIONS = {"image": ArraySpec((4, 4, 3), np.uint8), "state": ArraySpec((3,), np.float64)}
ROWS = 20_000


@pytest.mark.parametrize("continuous", [False, True], ids=["discrete", "continuous"])
def test_rows_of_noise_are_rows_of_a_replay_with_the_values_of_experience(continuous):
    actions = make_actions(continuous)
    row = random_row(OBSERVATIONS, actions, ROWS, np.random.default_rng(0))
    RowLayout(replay_specs(OBSERVATIONS, actions), ROWS).check(row)
    assert actions.error(row["action"]) is None
    assert (row["image"].min(), row["image"].max()) == (0, 255)
    assert row["image"].mean() == pytest.approx(127.5, rel=0.01)
    for key in ("state", "reward"):
        assert (row[key].mean(), row[key].std()) == pytest.approx((0, 1), abs=0.03)
    for key in ("is_first", "is_last"):
        assert row[key].mean() == pytest.approx(0.02, abs=0.005)
    assert not np.array_equal(row["is_first"], row["is_last"])
    assert np.array_equal(row["is_terminal"], row["is_last"])
    assert not np.shares_memory(row["is_terminal"], row["is_last"])
