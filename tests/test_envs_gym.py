"""Users' own environments: rows like those of every source, observations, actions, and what is refused.

Axes: N environments.
"""

import dataclasses
import json
import os
import re
import signal
import sys
import threading

import gymnasium
import numpy as np
import pytest

from hdfast import envs, evaluation, train
from hdfast.envs import gym_spaces
from hdfast.evaluate import evaluate
from hdfast.runtime.errors import ConfigError, RunError
from tests import gym_envs, loop_cases
from tests.gym_cases import make
from tests.loop_cases import lines, one_thread, path_of, tiny  # noqa: F401


def columns(env, actions):
    """Age by the pixels, reward, is_first, is_last and is_terminal of every row, each (T, N)."""
    with env:
        rows = [env.reset(), *(env.step(np.asarray(action, np.int32)) for action in actions)]
    return tuple(
        np.array([getattr(row, name) if name else row.obs["image"][:, 0, 0, 0] for row in rows])
        for name in ("", "reward", "is_first", "is_last", "is_terminal")
    )


@pytest.mark.parametrize("threads", [0, 1])  # with and without processes
def test_rows_are_those_of_every_source(threads):
    actions = [[t % 3, (t + 1) % 3] for t in range(1, 8)]
    age, reward, first, last, terminal = columns(make("Count", 2, threads=threads), actions)
    assert age[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert reward[:, 1] == pytest.approx([0, 1.02, 2, 3.01, 4.02, 5, 0, 1.02])
    assert first[:, 0].tolist() == [True, *[False] * 5, True, False]
    assert last[:, 0].tolist() == terminal[:, 0].tolist() == [*[False] * 5, True, False, False]
    assert (reward.dtype, age.dtype, last.dtype) == (np.float32, np.uint8, bool)


def test_a_time_limit_ends_an_episode_that_could_go_on():
    age, _, first, last, terminal = columns(make("Limited"), [[0]] * 5)
    assert age[:, 0].tolist() == [0, 1, 2, 3, 0, 1]
    assert np.flatnonzero(last).tolist() == [3]
    assert np.flatnonzero(first).tolist() == [0, 4]
    assert not terminal.any()


@pytest.mark.parametrize("threads", [0, 1])
@pytest.mark.parametrize(
    ("name", "told", "rate"),
    [
        ("Solved", [False, True, False, True], 0.5),
        ("SolvedAtTheEnd", [False, True, False, True], 0.5),
        ("SolvedNow", [None, True, False, True], 0.5),  # unknown until it has told once
        ("SolvedItsWay", [None] * 4, None),
    ],
)
def test_success_is_that_of_any_row_or_of_the_last(name, threads, told, rate):
    with make(name, 2, threads=threads) as env:
        act = lambda obs, is_first: np.zeros(2, np.int32)  # noqa: E731
        episodes = evaluation.play(env, act, 8)
    for n in range(2):
        assert [episode.success for episode in episodes if episode.env == n] == told
    assert evaluation.summarize(episodes).get("success") == rate


def test_reset_begins_anew_at_any_time():
    with make("Count") as env:
        env.reset()
        for _ in range(5):
            env.step(np.zeros(1, np.int32))
        assert env.reset().is_first.all()
        row = env.step(np.zeros(1, np.int32))
        assert (row.is_first.tolist(), row.reward.tolist()) == ([False], [1.0])


def test_a_seed_decides_what_happens_and_reset_does_not_repeat_it():
    def rewards(**settings):
        with make("Seeded", 2, threads=1, **settings) as env:
            found = []
            for _ in range(2):
                env.reset()
                found.append(np.array([env.step(np.zeros(2, np.int32)).reward for _ in range(5)]))
        return found

    first, second = rewards()
    assert np.array_equal(first, rewards()[0])
    assert not np.array_equal(first, second)
    assert not np.array_equal(first[:, 0], first[:, 1])
    assert not np.array_equal(first, rewards(seed=1)[0])


@pytest.mark.parametrize(
    ("name", "obs", "shapes"),
    [
        ("Count", "image", {"image": (16, 16, 3)}),
        ("Tall", "image", {"image": (64, 64, 3)}),
        ("Grey", "image", {"image": (16, 16, 1)}),
        ("Grey", "auto", {"image": (16, 16, 1)}),
        ("Goals", "auto", {"image": (64, 64, 3), "depth": (64, 64, 1)}),
        *((name, "auto", {"state": (3,)}) for name in ("Drawn", "Undrawn", "Blind")),
        ("Goals", "image", {"image": (64, 64, 3), "depth": (64, 64, 1)}),
        ("Goals", "state", {"arm": (4,), "goal": (7,)}),
        ("Goals", "both", {"image": (64, 64, 3), "depth": (64, 64, 1), "arm": (4,), "goal": (7,)}),
        ("Drawn", "image", {"image": (64, 64, 3)}),
        ("Drawn", "state", {"state": (3,)}),
        ("Drawn", "both", {"image": (64, 64, 3), "state": (3,)}),
        ("Undrawn", "state", {"state": (3,)}),
        ("Blind", "state", {"state": (3,)}),
        ("LostImage", "state", {"image": (2,)}),
    ],
)
def test_what_is_seen(name, obs, shapes):
    with make(name, obs=obs) as env:
        assert {key: spec.shape for key, spec in env.obs_specs.items()} == shapes
        env.reset()
        for _ in range(3):
            row = env.step(np.zeros(1, np.int32))
    for key, shape in shapes.items():
        value = row.obs[key]
        assert (value.shape, value.dtype) == ((1, *shape), env.obs_specs[key].dtype)
        assert value.dtype == (np.uint8 if len(shape) == 3 else np.float32)
        if key == "goal":
            assert value[0].tolist() == [0, 0, 0, 1, 0, 0, 0]
        else:  # rendered pictures are ten times as bright
            assert (value == (30 if name == "Drawn" and key == "image" else 3)).all()


@pytest.mark.parametrize(
    ("name", "image_size", "side"),
    [
        ("Count", 8, 8),
        ("Count", 16, 16),
        ("Count", 128, 16),
        ("Goals", 32, 32),
        ("Goals", 128, 128),
        ("Drawn", 256, 256),
    ],
)
def test_images_are_as_large_as_one_says_where_they_are_resized(name, image_size, side):
    """Smaller images whose side is a power of two stay as they are."""
    with make(name, obs="image", image_size=image_size) as env:
        row = env.reset()
        assert {spec.shape[:2] for spec in env.obs_specs.values()} == {(side, side)}
        for key, spec in env.obs_specs.items():
            assert row.obs[key].shape == (1, *spec.shape)


@pytest.mark.parametrize("threads", [0, 1])  # with and without processes
@pytest.mark.parametrize(
    ("name", "count", "theirs"),
    [
        ("Multi", 6, {0: [4, -1], 1: [4, 0], 5: [5, 1]}),
        ("MultiTable", 8, {0: [[0, 0], [0, 0]], 3: [[0, 0], [1, 1]], 4: [[1, 0], [0, 0]]}),
        ("Switches", 8, {0: [0, 0, 0], 1: [0, 0, 1], 6: [1, 1, 0]}),
        ("MultiMost", 1_024, {33: [1, 1]}),
    ],
)
def test_every_combination_of_choices_is_an_action(name, count, theirs, threads):
    with make(name, 2, threads=threads) as env:
        assert env.actions == envs.DiscreteActions(count)
        env.reset()
        space = env._vector.single_action_space
        every = env._theirs(np.arange(count, dtype=np.int32))
        assert every.dtype == space.dtype
        assert all(space.contains(one) for one in every)
        assert len(np.unique(every.reshape(count, -1), axis=0)) == count
        for ours, expected in theirs.items():
            assert every[ours].tolist() == expected
            reward = env.step(np.array([0, ours], np.int32)).reward
            assert reward[1] - reward[0] == pytest.approx((every[ours] - every[0]).flat[0] / 100, abs=1e-6)


def test_a_single_choice_may_have_more_values_than_combinations_may_be():
    assert gym_spaces.actions_of(gymnasium.spaces.Discrete(2_000), "it") == envs.DiscreteActions(2_000)


def test_actions_are_stretched_and_counted_from_where_they_start():
    with make("Arm", 2, threads=1) as env:
        assert env.actions == envs.ContinuousActions(2)
        env.reset()
        reward = env.step(np.float32([[-1, 0], [0.5, 1]])).reward
        assert reward == pytest.approx([1 - 0.02, 1 + 0.01])
        assert env._theirs(np.float32([[-1, 0], [0.5, 1]])).tolist() == [[[-2, 5]], [[1, 10]]]
    with make("From5") as env:
        assert env.actions == envs.DiscreteActions(3)
        env.reset()
        assert env.step(np.array([2], np.int32)).reward == pytest.approx(1.07)


@pytest.mark.parametrize(("low", "high"), [(-0.3, 0.9), (-2.3, 0.7), (-3e38, 3e38)])
def test_the_ends_of_an_action_are_the_bounds_that_its_space_says(low, high, monkeypatch):
    """Rounding leads over the first bounds by a bit, for which a strict environment would refuse the action."""
    space = gym_envs.box(2, low=low, high=high)
    monkeypatch.setitem(gymnasium.registry["Arm-v0"].kwargs, "action", space)
    with make("Arm") as env:
        ends, (middle, _) = env._theirs(np.float32([[-1, 1], [0, 0]]))
    assert np.array_equal(ends, np.float32([low, high]))
    assert middle == pytest.approx(low / 2 + high / 2)


@pytest.mark.parametrize("threads", [0, 1])
@pytest.mark.parametrize(
    ("name", "reward", "theirs"), [("Clipped", 0.98, [[-2, 5], [1, 10]]), ("ClippedTwice", 0.97, None)]
)
def test_actions_that_are_clipped_have_the_bounds_that_they_are_clipped_to(name, threads, reward, theirs):
    with make(name, 2, threads=threads) as env:
        assert env.actions == envs.ContinuousActions(2)
        env.reset()
        action = np.float32([[-1, 0], [0.5, 1]])
        assert env.step(action).reward[0] == pytest.approx(reward)
        assert theirs is None or env._theirs(action).tolist() == theirs


def test_the_wrapper_that_the_refusal_of_actions_names_gives_them_bounds():
    unbounded = gym_envs.Count(action=gym_envs.box(2, low=-np.inf, high=np.inf))
    bounded = gymnasium.wrappers.TransformAction(unbounded, lambda action: action, gym_envs.box(2))
    assert gym_spaces.actions_of(gym_spaces.action_space_of(bounded), "it") == envs.ContinuousActions(2)


def test_what_cannot_be_drawn_can_be_trained_from_its_vectors():
    right = 'Blind-v0: no brush, run `pip install "brush"`; --env.obs state does without drawing'
    for obs in ("image", "both"):
        with pytest.raises(envs.MissingLibraryError) as raised:
            make("Blind", obs=obs)
        assert str(raised.value) == right


def test_what_observes_vectors_is_not_drawn_unless_asked_for(monkeypatch, capfd):
    """CartPole renders with pygame, which is not needed to observe its four numbers."""
    monkeypatch.setitem(sys.modules, "pygame", None)
    argv = [*loop_cases.flags()[2:], "--suite", "gym", "--task", "CartPole-v1", "--env.threads", "1"]
    code, out, err = loop_cases.door(train.main, [*argv, "--dry-run"], monkeypatch, capfd)
    assert (code, err) == (0, "")
    about = json.loads(out)
    assert about["environment"]["observations"] == {"state": {"shape": [4], "dtype": "float32"}}
    assert about["config"]["env"]["obs"] == "auto"
    argv += ["--env.obs", "image"]
    code, _, err = loop_cases.door(train.main, [*argv, "--dry-run"], monkeypatch, capfd)
    assert code == 6
    assert "--env.obs state does without drawing" in err


@pytest.mark.parametrize("saved", ["image", "state", "both", "auto"])
def test_a_run_goes_on_with_what_it_saw_where_that_is_left_open(tmp_path, saved):
    task = {"suite": "gym", "task": "tests.gym_envs:Drawn-v0"}
    loop_cases.train(tiny(tmp_path, **task, agent_steps=4, env={"threads": 1, "obs": saved}))
    summary = loop_cases.train(tiny(tmp_path, **task, agent_steps=8, env={"threads": 1, "obs": "auto"}))
    assert summary["length"] == 5
    (file,) = tmp_path.rglob("config.json")
    about = json.loads(file.read_text())
    assert (about["config"]["env"]["obs"], len(about["resumed"])) == (saved, 1)
    other = "state" if saved == "image" else "image"
    with pytest.raises(ConfigError, match="another config"):
        loop_cases.train(tiny(tmp_path, **task, env={"threads": 1, "obs": other}))


def test_a_run_that_has_not_begun_sees_what_is_asked_for_now(tmp_path):
    """For example a run whose environment could not be rendered."""
    task = {"suite": "gym", "task": "tests.gym_envs:Blind-v0", "agent_steps": 4}
    with pytest.raises(envs.MissingLibraryError):
        loop_cases.train(tiny(tmp_path, **task, env={"threads": 1, "obs": "image"}))
    loop_cases.train(tiny(tmp_path, **task, env={"threads": 1, "obs": "auto"}))
    (file,) = tmp_path.rglob("config.json")
    assert json.loads(file.read_text())["config"]["env"]["obs"] == "auto"


@pytest.mark.parametrize("obs", ["image", "both"])
def test_what_declares_a_drawing_it_does_not_have_is_told_what_would_do(obs):
    right = (
        "Undrawable-v0: it raised NotImplementedError; let it observe (H, W, 3) uint8, or render 'rgb_array'; "
        "--env.obs state does without"
    )
    with pytest.raises(RunError) as raised:
        make("Undrawable", obs=obs)
    assert str(raised.value) == right
    with make("Undrawable", obs="state") as env:
        assert env.reset().obs["state"].shape == (1, 3)


def test_an_observed_image_is_of_the_size_that_its_space_says():
    with make("WrongShort") as env:
        env.reset()
        env.step(np.zeros(1, np.int32))
        right = re.escape("observation 'image' is (4, 8, 3) uint8, its space says (8, 8, 3) uint8")
        with pytest.raises(RunError, match=right):
            env.step(np.zeros(1, np.int32))


@pytest.mark.parametrize("name", ["Planes", "Plane", "Unit", "UnitPlane", "Float", "FloatPlanes"])
def test_an_image_may_be_of_floats_and_have_its_channels_first(name):
    with make(f"Picture{name}") as env:
        (image,) = env.reset().obs["image"]
        spec = env.obs_specs["image"]
    assert spec.shape == image.shape == (16, 16, 3 if name in ("Planes", "Unit", "FloatPlanes") else 1)
    assert spec.dtype == image.dtype == np.uint8
    assert np.array_equal(image, gym_envs.picture(*image.shape))


@pytest.mark.filterwarnings("ignore:.*WARN:UserWarning")  # gymnasium warns of the same
def test_an_image_of_floats_has_the_numbers_that_its_space_says():
    for name, white in (("Bright", 1), ("Nan", 255)):
        with make(f"Picture{name}") as env:
            right = f"Picture{name}-v0: observation 'image' has numbers that are not 0 to {white}$"
            with pytest.raises(RunError, match=right):
                env.reset()


def test_a_slash_in_the_name_of_an_observation_becomes_a_hyphen():
    with make("Named5", obs="both") as env:
        assert {key: spec.shape for key, spec in env.obs_specs.items()} == {"image": (8, 8, 3), "a-b": (2,)}
        env.reset()
        assert env.step(np.zeros(1, np.int32)).obs["a-b"].tolist() == [[1, 1]]


def test_a_drawing_may_change_its_size():
    with make("Growing", obs="image") as env:
        env.reset()
        assert (env.step(np.zeros(1, np.int32)).obs["image"] == 10).all()


@pytest.mark.parametrize("name", [name for name in gym_envs.NAMES if name.startswith("Named")])
def test_an_observation_may_be_called_what_a_module_is_too(tmp_path, name):
    overrides = {"suite": "gym", "task": f"tests.gym_envs:{name}-v0", "env": {"threads": 1, "obs": "both"}}
    config = tiny(tmp_path, **overrides)
    loop_cases.train(config)
    config = dataclasses.replace(config, task=f"tests.gym_envs-{name}-v0")  # its folder
    assert lines(config, "metrics")[-1][f"loss/{re.sub('[/.]', '-', gym_envs.NAMES[name])}"] >= 0
    assert evaluate(path_of(config), episodes=2, device="cpu")["length"] == 5


@pytest.mark.filterwarnings("ignore:.*WARN:UserWarning")  # gymnasium warns of the same
def test_an_action_may_be_fixed_where_others_are_not():
    with make("HalfStill") as env:
        env.reset()
        assert env.step(np.float32([[1, -1]])).reward == pytest.approx([1])
        assert env._theirs(np.float32([[1, -1]])).tolist() == [[0, -1]]


def test_signals_of_the_terminal_are_for_the_learner_alone():
    with make("Broken", 2) as env:
        env.reset()
        for _ in range(2):
            env.step(np.zeros(2, np.int32))
        env.send(np.array([2, 2], np.int32))
        for process in env._vector.processes:
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(process.pid, signum)
        assert env.recv().reward == pytest.approx([3.02, 3.02])


def test_the_environments_work_while_the_learner_does(monkeypatch):
    sent, step = threading.Event(), gym_envs.Count.step

    def step_later(self, action):
        assert sent.wait(20), "`send` waits for the step"
        return step(self, action)

    with make("Count") as env:
        env.reset()
        monkeypatch.setattr(gym_envs.Count, "step", step_later)
        env.send(np.zeros(1, np.int32))
        sent.set()
        assert not env.recv().is_first.any()
