"""Atari: both sources against the authors' protocol on the bare emulator, and against each other."""

import contextlib
import dataclasses

import numpy as np
import pytest

from hdfast import envs, suites
from hdfast.envs.ale import AtariALE, area_resize, rom_name
from hdfast.envs.atari import AtariPool
from hdfast.envs.pool import library

ale_py = pytest.importorskip("ale_py")
SUITE = suites.get("atari100k")
SOURCES = {"envpool": AtariPool, "ale": AtariALE}


def means(values, count=64):
    """Means over `count` equal intervals of the first axis, as differences of the interpolated integral."""
    integral = np.concatenate([np.zeros_like(values[:1]), np.cumsum(values, axis=0)])
    edges = np.arange(count + 1) * len(values) / count
    below = np.floor(edges).astype(int)
    above = np.minimum(below + 1, len(values))
    beyond = (edges - below).reshape(-1, *[1] * (values.ndim - 1))
    return np.diff((1 - beyond) * integral[below] + beyond * integral[above], axis=0) * count / len(values)


def resized(frame):
    """Area interpolation in floating point: (210, 160, 3) -> (64, 64, 3)."""
    rows = means(frame.astype(np.float64))
    return np.rint(means(rows.swapaxes(0, 1)).swapaxes(0, 1)).astype(np.uint8)


class Emulator:
    """The authors' environment on the bare emulator."""

    def __init__(self, game, noops):
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self.ale = ale_py.ALEInterface()
        self.ale.setFloat("repeat_action_probability", 0.0)
        self.ale.loadROM(ale_py.roms.get_rom_path(rom_name(game)))
        self.actions = self.ale.getMinimalActionSet()
        self.noops = noops

    def reset(self):
        self.ale.reset_game()
        for _ in range(self.noops):
            self.ale.act(0)
        self.earlier = np.zeros((210, 160, 3), np.uint8)
        return self.image()

    def image(self):
        return resized(np.maximum(self.earlier, self.ale.getScreenRGB()))

    def step(self, action):
        reward = 0
        for repeat in range(4):
            reward += self.ale.act(self.actions[action])
            if repeat == 2:
                self.earlier = self.ale.getScreenRGB()
            if self.ale.game_over():
                break
        return self.image(), reward, self.ale.game_over()


def one_noop(game, time_limit):
    """Both sources of a game, with one no-op before each episode."""
    task = dataclasses.replace(SUITE.task(game), time_limit=time_limit)
    return {
        "envpool": AtariPool(task, num_envs=1, seed=0, action_repeat=4, noop_max=1),
        "ale": AtariALE(task, num_envs=1, seed=0, action_repeat=4, noops=range(1, 2)),
    }


@pytest.mark.parametrize(
    ("game", "time_limit", "agent_steps", "ends", "rewards"),
    [
        ("Pong", 70, 145, 2, 1),
        ("MsPacman", 80, 100, 1, 3),
        ("Asterix", 27_000, 210, 1, 4),  # these two end with the game, within the four frames of a step
        ("RoadRunner", 27_000, 125, 1, 0),
        (
            "UpNDown",
            27_000,
            375,
            1,
            3,
        ),  # ends within the first half of a step, whose image is another in envpool
    ],
)
def test_both_sources_follow_the_authors_protocol(game, time_limit, agent_steps, ends, rewards):
    emulator, rng = Emulator(game, noops=1), np.random.default_rng(0)
    with contextlib.ExitStack() as stack:
        pools = {name: stack.enter_context(env) for name, env in one_noop(game, time_limit).items()}
        count = pools["envpool"].actions.count
        assert count == pools["ale"].actions.count == len(emulator.actions)
        image, reward, is_last, length = emulator.reset(), 0, False, 0
        rows = {name: env.reset() for name, env in pools.items()}
        seen_ends = seen_rewards = 0
        for agent_step in range(agent_steps):
            for name, row in rows.items():
                where = f"{name} at agent step {agent_step}"
                if (game, name, is_last) != ("UpNDown", "envpool", True):
                    assert np.array_equal(row.obs["image"][0], image), where
                assert row.reward.tolist() == [reward], where
                assert row.is_first.tolist() == [length == 0], where
                assert row.is_last.tolist() == [is_last], where
                assert row.is_terminal.tolist() == [is_last], where
            seen_ends += is_last
            seen_rewards += reward != 0
            action = rng.integers(count, size=1, dtype=np.int32)
            rows = {name: env.step(action) for name, env in pools.items()}
            if is_last:
                image, reward, is_last, length = emulator.reset(), 0, False, 0
            else:
                image, reward, over = emulator.step(action[0])
                length += 1
                is_last = over or length == time_limit
    assert seen_ends >= ends
    assert seen_rewards >= rewards


def test_integer_resize_is_the_mean_over_areas():
    for seed in range(5):
        frame = np.random.default_rng(seed).integers(256, size=(210, 160, 3), dtype=np.uint8)
        assert np.array_equal(area_resize(frame), resized(frame))
    assert (area_resize(np.full((210, 160, 3), 255, np.uint8)) == 255).all()


@pytest.mark.parametrize("source", SOURCES)
def test_chopper_command_ends_after_5400_frames(source):
    # In this game doing nothing survives to the time limit.
    with envs.make("atari100k", "ChopperCommand", num_envs=1, seed=0, source=source) as env:
        env.reset()
        for agent_step in range(1, 1_351):
            row = env.step(np.zeros(1, np.int32))
            assert row.is_last[0] == (agent_step == 1_350)
        assert row.is_terminal[0]
        assert agent_step * env.action_repeat == 5_400
        assert env.step(np.zeros(1, np.int32)).is_first[0]


@pytest.mark.parametrize("source", SOURCES)
def test_rows_of_a_batch(source):
    with envs.make("atari100k", "breakout", num_envs=3, seed=5, source=source) as env:
        assert env.source == source
        assert env.obs_specs == {"image": envs.ArraySpec((64, 64, 3), np.dtype(np.uint8))}
        assert env.actions == envs.DiscreteActions(4)
        assert env.action_repeat == 4
        row, rng = env.reset(), np.random.default_rng(1)
        was_last, ends, kept = np.ones(3, bool), 0, []
        for _ in range(260):
            assert row.obs["image"].shape == (3, 64, 64, 3)
            assert row.obs["image"].dtype == np.uint8
            assert row.obs["image"].flags.c_contiguous
            assert row.reward.shape == (3,)
            assert row.reward.dtype == np.float32
            for flag in (row.is_first, row.is_last, row.is_terminal):
                assert flag.shape == (3,)
                assert flag.dtype == bool
            assert np.array_equal(row.is_first, was_last)
            assert (row.reward[row.is_first] == 0).all()
            assert np.array_equal(row.is_terminal, row.is_last)
            kept.append((row, row.obs["image"].copy()))
            was_last, ends = row.is_last, ends + row.is_last.sum()
            row = env.step(env.actions.sample(rng, 3))
        assert ends >= 3
        # Images that were returned have not been overwritten.
        assert all(np.array_equal(old.obs["image"], copy) for old, copy in kept)
        # A reset in the middle begins all environments anew.
        assert env.reset().is_first.all()


def play(source, seed, *, num_envs=2, agent_steps=40, threads=0, beside=None):
    """Images (agent_steps + 1, num_envs, 64, 64, 3) under random actions that are the same for every call."""
    rng = np.random.default_rng(0)
    with envs.make("atari100k", "Pong", num_envs=num_envs, seed=seed, source=source, threads=threads) as env:
        images = [env.reset().obs["image"]]
        for _ in range(agent_steps):
            env.send(rng.integers(6, size=4, dtype=np.int32)[:num_envs].copy())
            if beside is not None:
                beside.step(np.zeros(beside.num_envs, np.int32))
            images.append(env.recv().obs["image"])
    return np.stack(images)


@pytest.mark.parametrize("source", SOURCES)
def test_a_seed_decides_everything(source):
    first = play(source, 0)
    assert np.array_equal(first, play(source, 0, threads=1))
    assert np.array_equal(first[:, :1], play(source, 0, num_envs=1))
    assert not np.array_equal(first, play(source, 1))


@pytest.mark.parametrize("source", SOURCES)
def test_evaluation_environments_do_not_disturb_training_ones(source):
    with envs.make("atari100k", "Boxing", num_envs=3, seed=9, source=source) as beside:
        beside.reset()
        assert np.array_equal(play(source, 0), play(source, 0, beside=beside))


@pytest.mark.parametrize("source", SOURCES)
def test_wrong_actions_are_refused_before_the_emulator(source):
    with envs.make("atari100k", "Pong", num_envs=2, seed=0, source=source) as env:
        env.reset()
        with pytest.raises(ValueError, match=r"Pong: action has values in \[0, 6\], expected 0 to 5"):
            env.step(np.array([0, 6], np.int32))
        with pytest.raises(ValueError, match=r"shape \(1,\), expected \(2,\)"):
            env.step(np.zeros(1, np.int32))
        with pytest.raises(TypeError, match="dtype int64, expected int32"):
            env.step(np.zeros(2, np.int64))
        assert env.step(np.array([0, 5], np.int32)).reward.shape == (2,)
    with pytest.raises(RuntimeError, match="Pong: this environment is closed"):
        env.step(np.zeros(2, np.int32))


def test_every_game_of_the_suite_is_there_in_both_sources():
    known = set(library("this test").list_all_envs())
    for task in SUITE.tasks:
        assert task.env_id in known
        assert ale_py.roms.get_rom_path(rom_name(task.name)) is not None, task.name
