"""Batches of a replay on the host that are fetched ahead, when its state is saved and loaded."""

import shutil

import pytest
import torch

from hdfast.replay import Replay
from tests.replay_log_cases import NUM_ENVS, SPECS, extend, loaded


@pytest.mark.parametrize("staged", [False, True])
def test_going_back_forgets_prefetched_batches(staged, tmp_path):
    replay = Replay(SPECS, num_envs=NUM_ENVS, capacity=40, directory=tmp_path / "replay", place="host")
    extend(replay, 33)
    if staged:
        replay.stage(16, 4)
    state = replay.state_dict()
    assert any(key.startswith("ahead") for key in state) is staged
    batches = []
    for _ in range(2):
        replay.load_state_dict(state)
        replay.stage(16, 4)
        batches.append({key: rows.clone() for key, rows in replay.sample(16, 4).items()})
        extend(replay, 10).stage(16, 4)
    for key, rows in batches[0].items():
        assert rows.numpy().tobytes() == batches[1][key].numpy().tobytes(), key
    replay.close()


@pytest.mark.parametrize("rows", [15, 33])  # a ring of 20 rows per environment, and one that is full
def test_a_loaded_replay_goes_on_with_the_batch_that_was_fetched_ahead(tmp_path, rows):
    def new(folder):
        return Replay(SPECS, num_envs=NUM_ENVS, capacity=40, directory=folder, place="host")

    replay = new(tmp_path / "replay")
    extend(replay, rows).stage(3, 4)
    extend(replay, 1)
    replay.stage(2, 5)
    replay.flush()
    state = replay.state_dict()
    shutil.copytree(tmp_path / "replay", tmp_path / "copy")
    again = new(tmp_path / "copy")
    again.load_state_dict(state)
    for _ in range(3):
        for shape in ((3, 4), (2, 5)):
            batches = []
            for each in (replay, again):
                each.stage(*shape)
                batches.append({key: part.clone() for key, part in each.sample(*shape).items()})
            for key, part in batches[0].items():
                assert part.numpy().tobytes() == batches[1][key].numpy().tobytes(), key
        extend(replay, 1)
        extend(again, 1)
    replay.close()
    again.close()


@pytest.mark.parametrize(("capacity", "place"), [(60, "host"), (40, "device")])
def test_windows_fetched_ahead_mean_nothing_to_another_kind_of_ring(capacity, place, tmp_path):
    replay = Replay(SPECS, num_envs=NUM_ENVS, capacity=40, directory=tmp_path / "replay", place="host")
    extend(replay, 15).stage(16, 4)
    state = replay.state_dict()
    assert "ahead.16.4" in state
    replay.close()
    other = Replay(SPECS, num_envs=NUM_ENVS, capacity=capacity, directory=tmp_path / "replay", place=place)
    other.load_state_dict(state)
    batches = []
    for replay in (other, loaded(tmp_path, state, ring=capacity // 2)):
        replay.generator.manual_seed(3)
        replay.stage(16, 4)
        batches.append(replay.sample(16, 4)["reward"].clone())
    assert torch.equal(*batches)
    other.close()


def test_windows_fetched_ahead_are_kept_only_while_they_are_whole(tmp_path):
    replay = Replay(SPECS, num_envs=NUM_ENVS, capacity=40, directory=tmp_path / "replay", place="host")
    extend(replay, 20).stage(64, 4)  # some of 64 windows begin at the oldest row
    assert replay.state_dict()["ahead.64.4"].shape == (64,)
    extend(replay, 1)
    state = replay.state_dict()
    assert not any(key.startswith("ahead") for key in state)
    replay.load_state_dict(state)
    replay.stage(64, 4)
    steps = replay.sample(64, 4)["reward"]
    assert torch.equal(steps[1:], steps[:-1] + 1)
    replay.close()
