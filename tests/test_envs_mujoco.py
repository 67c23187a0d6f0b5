"""DeepMind Control Suite and Meta-World: rows against the bare pool, states without OpenGL, images with EGL."""

import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hdfast import envs, suites
from hdfast.envs import mujoco
from hdfast.envs.dmc import ControlSuite
from hdfast.envs.metaworld import MetaWorld, textured_models
from hdfast.envs.pool import library, make_pool
from hdfast.runtime.errors import MissingLibraryError

DMC, METAWORLD = suites.get("dmc"), suites.get("metaworld")


def without_egl():
    """Why images cannot be drawn here, or None."""
    try:
        mujoco.require_egl()
    except MissingLibraryError as error:
        return str(error)
    return None


@pytest.fixture
def egl():
    if reason := without_egl():
        pytest.skip(reason)


def short(suite, name, time_limit):
    return dataclasses.replace(suite.task(name), time_limit=time_limit)


def settings(suite, **changed):
    defaults = {"num_envs": 2, "seed": 0, "threads": 0, "obs": "state", "render": "full", "image_size": 64}
    return {"action_repeat": suite.action_repeat, **defaults, **changed}


def drawing_pool(task, **settings):
    """envpool's own pool of a task, rendering the first camera."""
    drawn = {"render_mode": "rgb_array", "render_width": 64, "render_height": 64, "render_camera_id": 0}
    return make_pool(task.env_id, seed=0, threads=0, **drawn, **settings)


def test_an_agent_step_is_two_control_steps_with_their_rewards_summed():
    task = short(DMC, "walker_stand", time_limit=4)
    bare = make_pool(task.env_id, num_envs=2, seed=0, threads=0, max_episode_steps=8)
    rng = np.random.default_rng(0)
    with ControlSuite(task, **settings(DMC)) as env:
        assert env.action_repeat == 2
        assert env.actions == envs.ContinuousActions(6)
        row = env.reset()
        obs, _ = bare.reset()
        reward, seen = np.zeros(2), 0
        for agent_step in range(12):
            assert list(row.obs) == list(env.obs_specs) == ["orientations", "height", "velocity"]
            for key, value in row.obs.items():
                assert value.dtype == np.float32
                assert value.shape == (2, *env.obs_specs[key].shape)
                assert np.array_equal(value, obs[key].reshape(2, -1).astype(np.float32))
            assert row.reward == pytest.approx(reward, rel=1e-6)
            assert row.is_first.tolist() == [agent_step % 5 == 0] * 2
            assert row.is_last.tolist() == [agent_step % 5 == 4] * 2
            assert not row.is_terminal.any()  # time limits are not terminal
            seen += reward.sum()
            action = env.actions.sample(rng, 2)
            reset = row.is_last.all()
            row = env.step(action)
            obs, first, *_ = bare.step(action.astype(np.float64))
            reward = np.zeros(2)
            if not reset:
                obs, second, *_ = bare.step(action.astype(np.float64))
                reward = first + second
        assert seen > 1


def test_an_episode_of_the_suite_has_a_thousand_control_steps():
    with envs.make("dmc", "cartpole_balance", num_envs=1, seed=0, obs="state") as env:
        env.reset()
        for agent_step in range(1, 501):
            row = env.step(np.zeros((1, 1), np.float32))
            assert row.is_last[0] == (agent_step == 500)
        assert not row.is_terminal[0]
        row = env.step(np.zeros((1, 1), np.float32))
        assert row.is_first[0]
        assert row.reward[0] == 0


def test_actions_are_stretched_to_the_bounds_of_the_joints():
    task = short(DMC, "quadruped_walk", time_limit=10)
    bare = make_pool(task.env_id, num_envs=2, seed=0, threads=0)
    with ControlSuite(task, **settings(DMC)) as env:
        env.reset()
        bare.reset()
        action = np.tile(np.array([1, -1, 0.5], np.float32), (2, 4))
        row = env.step(action)
        # Yaw within -1 and 1, lift within -1 and 1.1, extension within -0.8 and 0.8.
        joints = np.tile([1.0, -1.0, 0.4], (2, 4))
        assert np.allclose(env.own_action(action), joints[0])
        bare.step(joints)
        obs, *_ = bare.step(joints)
        assert np.array_equal(row.obs["egocentric_state"], obs["egocentric_state"].astype(np.float32))


@pytest.mark.parametrize(
    ("name", "vectors"),
    [
        ("finger_spin", {"position": 4, "velocity": 3, "touch": 2}),
        ("fish_upright", {"joint_angles": 7, "upright": 1, "velocity": 13}),
        ("humanoid_run_pure_state", {"position": 28, "velocity": 27}),
        (
            "humanoid_walk",
            {
                "joint_angles": 21,
                "head_height": 1,
                "extremities": 12,
                "torso_vertical": 3,
                "com_velocity": 3,
                "velocity": 27,
            },
        ),
        (
            "quadruped_run",
            {
                "egocentric_state": 44,
                "torso_velocity": 3,
                "torso_upright": 1,
                "imu": 6,
                "force_torque": 24,
            },
        ),
    ],
)
def test_states_are_those_of_dm_control(name, vectors):
    with envs.make("dmc", name, num_envs=1, seed=0, obs="state") as env:
        assert {key: spec.shape for key, spec in env.obs_specs.items()} == {
            key: (size,) for key, size in vectors.items()
        }


def test_meta_world_rows():
    with MetaWorld(short(METAWORLD, "reach", time_limit=6), **settings(METAWORLD)) as env:
        assert env.action_repeat == 1
        assert env.actions == envs.ContinuousActions(4)
        assert env.obs_specs == {"state": envs.ArraySpec((39,), np.dtype(np.float32))}
        row, rng, goals = env.reset(), np.random.default_rng(0), []
        for agent_step in range(14):
            assert row.is_first.tolist() == [agent_step % 7 == 0] * 2
            assert row.is_last.tolist() == [agent_step % 7 == 6] * 2
            assert not row.is_terminal.any()
            assert (row.reward != 0).tolist() == [agent_step % 7 != 0] * 2
            assert row.info["success"].dtype == bool
            assert not (row.info["success"] & row.is_first).any()
            if row.is_first.all():
                goals.append(row.obs["state"][:, 36:39])
            row = env.step(env.actions.sample(rng, 2))
        assert len(np.unique(np.concatenate(goals), axis=0)) == 4  # every environment draws anew


def test_meta_world_shows_the_goal_and_says_when_it_is_reached():
    with envs.make("metaworld", "reach", num_envs=3, seed=0, obs="state") as env:
        row, solved, returns = env.reset(), np.zeros(3, bool), np.zeros(3)
        assert not row.info["success"].any()
        for _ in range(60):
            hand, goal = row.obs["state"][:, 0:3], row.obs["state"][:, 36:39]
            towards = np.pad(10 * (goal - hand), ((0, 0), (0, 1)))
            row = env.step(towards.clip(-1, 1).astype(np.float32))
            near = np.linalg.norm(row.obs["state"][:, 36:39] - row.obs["state"][:, 0:3], axis=1)
            assert (near[row.info["success"]] < 0.1).all()  # the hand's position is a little off its fingers
            solved |= row.info["success"]
            returns += row.reward
        assert solved.all()
        assert (returns > 60).all()


@pytest.mark.parametrize(("suite", "task"), [("dmc", "cheetah_run"), ("metaworld", "lever-pull")])
def test_a_seed_decides_everything(suite, task):
    def play(seed, num_envs, threads=0):
        rng = np.random.default_rng(0)
        with envs.make(suite, task, num_envs=num_envs, seed=seed, obs="state", threads=threads) as env:
            actions = [env.actions.sample(rng, 3)[:num_envs].copy() for _ in range(10)]
            rows = [env.reset(), *map(env.step, actions)]
        return np.stack([np.concatenate(list(row.obs.values()), axis=1) for row in rows])

    first = play(0, 3)
    assert np.array_equal(first, play(0, 3, threads=1))
    assert np.array_equal(first[:, :1], play(0, 1))
    assert not np.array_equal(first, play(1, 3))


def test_wrong_actions_are_refused_before_the_simulator():
    with envs.make("dmc", "walker_walk", num_envs=2, seed=0, obs="state") as env:
        env.reset()
        wrong = np.zeros((2, 6), np.float32)
        wrong[1, 3] = np.nan
        with pytest.raises(ValueError, match="walker_walk: action has 1 values that are not finite"):
            env.step(wrong)
        with pytest.raises(ValueError, match="expected -1 to 1"):
            env.step(np.full((2, 6), 1.5, np.float32))
        assert np.isfinite(env.step(np.ones((2, 6), np.float32)).obs["velocity"]).all()
    with pytest.raises(RuntimeError, match="closed"):
        env.step(np.zeros((2, 6), np.float32))


def test_every_task_is_known_to_envpool():
    known = set(library("this test").list_all_envs())
    for suite in (DMC, METAWORLD):
        assert [task.name for task in (*suite.tasks, *suite.others) if task.env_id not in known] == []


def test_images_show_what_the_bare_pool_draws(egl):
    task = short(DMC, "cartpole_swingup", time_limit=3)
    bare = drawing_pool(task, num_envs=3, max_episode_steps=6)
    rng = np.random.default_rng(0)
    with ControlSuite(task, **settings(DMC, num_envs=3, threads=2, obs="both")) as env:
        assert list(env.obs_specs) == ["position", "velocity", "image"]
        row = env.reset()
        bare.reset()
        images = []
        for _ in range(5):
            expected = bare.render(np.arange(3, dtype=np.int32))
            assert row.obs["image"].dtype == np.uint8
            assert np.array_equal(row.obs["image"], expected)
            images.append(row.obs["image"])
            action, reset = env.actions.sample(rng, 3), row.is_last.all()
            row = env.step(action)
            for _ in range(1 if reset else 2):
                bare.step(action.astype(np.float64))
        assert not np.array_equal(images[0], images[1])
        assert not np.array_equal(images[0][0], images[0][1])


def test_fast_images_differ_and_states_do_not(egl):
    rng = np.random.default_rng(0)
    task = short(DMC, "walker_walk", time_limit=3)
    with (
        ControlSuite(task, **settings(DMC, num_envs=1, obs="both")) as full,
        ControlSuite(task, **settings(DMC, num_envs=1, obs="both", render="fast")) as fast,
        ControlSuite(task, **settings(DMC, num_envs=1, obs="state", render="fast")) as state,
    ):
        rows = full.reset(), fast.reset(), state.reset()
        for _ in range(3):
            for key in ("orientations", "height", "velocity"):
                assert np.array_equal(rows[0].obs[key], rows[1].obs[key])
                assert np.array_equal(rows[0].obs[key], rows[2].obs[key])
            difference = np.abs(rows[0].obs["image"].astype(float) - rows[1].obs["image"])
            assert 0 < difference.mean() < 25
            assert "image" not in rows[2].obs
            action = full.actions.sample(rng, 1)
            rows = full.step(action), fast.step(action), state.step(action)


def test_meta_world_is_seen_upright(egl):
    with envs.make("metaworld", "lever-pull", num_envs=1, seed=0, render="fast") as env:
        assert list(env.obs_specs) == ["image"]
        image = env.reset().obs["image"][0]
        # The grey wall fills the upper right corner, table and floor the lower one.
        assert np.ptp(image[:8, -16:].mean(-1)) < 10
        assert np.ptp(image[-8:, -16:].mean(-1)) > 50
        assert np.isfinite(env.step(np.zeros((1, 4), np.float32)).reward).all()


def test_meta_world_is_drawn_with_its_textures(egl):
    images = {}
    for name in ("lever-pull", "hammer"):
        with envs.make("metaworld", name, num_envs=1, seed=0) as env:
            images[name] = env.reset().obs["image"][0].astype(float)
    for image in images.values():
        wall, table = image[:16, -20:], image[38:44, 20:50]
        assert 110 < wall.mean() < 145  # as the package itself renders it; envpool's is white
        assert np.ptp(table.mean((0, 1))) > 20  # wood, not grey
    assert np.array_equal(images["lever-pull"][:16, -20:], images["hammer"][:16, -20:])


def test_meta_worlds_models_are_those_of_envpool_but_for_their_looks():
    def moves(path):
        """A model without what matters to images alone: comments, textures and where they are, a camera."""
        text = re.sub(
            r"<!--.*?-->|<texture\b.*?/>|\b(texture|texrepeat|texuniform)=\"[^\"]*\"|<camera name=\"corner4\".*?/>",
            "",
            path.read_text(),
            flags=re.S,
        )
        return re.sub(r"\s+", "", text)

    base_path = library("this test").make_spec("MetaWorld/Reach-v3").config.base_path
    envpools, ours = Path(base_path, "mujoco/metaworld/assets"), textured_models("this test")
    paths = [path.relative_to(envpools) for path in envpools.rglob("*.xml")]
    assert len(paths) > 90
    assert [path for path in paths if moves(envpools / path) != moves(ours / path)] == []
    assert any((envpools / path).read_text() != (ours / path).read_text() for path in paths)


def test_meta_world_without_its_package_names_the_command(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find(name) if name != "metaworld" else None)
    with pytest.raises(MissingLibraryError, match="images of lever-pull need the textures of") as error:
        envs.make("metaworld", "lever-pull", num_envs=1, seed=0)
    assert error.value.exit_code == 6
    assert "pip install --no-deps 'metaworld>=3.0,<3.1'" in str(error.value)
    with envs.make("metaworld", "lever-pull", num_envs=1, seed=0, obs="state") as env:
        env.reset()


@pytest.mark.parametrize(("name", "hidden"), [("finger_spin", True), ("finger_turn_easy", False)])
def test_marks_of_the_finger_are_seen_only_where_it_is_turned_to_them(name, hidden, egl):
    task = DMC.task(name)
    bare = drawing_pool(task, num_envs=1)
    bare.reset()
    with ControlSuite(task, **settings(DMC, num_envs=1, obs="image")) as env:
        image, marked = env.reset().obs["image"], bare.render(np.zeros(1, np.int32))
        assert env.source == ("envpool, other models" if hidden else "envpool")
    pixels = np.count_nonzero((image != marked).any(-1))
    assert 0 < pixels < 100 if hidden else pixels == 0


def test_images_are_as_large_as_one_says(egl):
    """An image of half the side shows the same, except for how pixels are averaged."""
    task = DMC.task("walker_walk")
    with (
        ControlSuite(task, **settings(DMC, num_envs=1, obs="image", image_size=32)) as small,
        ControlSuite(task, **settings(DMC, num_envs=1, obs="image", image_size=128)) as large,
    ):
        images = [env.reset().obs["image"] for env in (small, large)]
        assert [env.obs_specs["image"].shape for env in (small, large)] == [(32, 32, 3), (128, 128, 3)]
    assert [image.shape for image in images] == [(1, 32, 32, 3), (1, 128, 128, 3)]
    pooled = images[1].reshape(32, 4, 32, 4, 3).mean((1, 3))
    assert np.abs(pooled - images[0][0]).mean() < 8


def script(path, text):
    """An executable in place of the interpreter that runs `text` whatever its arguments."""
    path.write_text(f"#!{sys.executable}\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_images_without_egl_name_the_packages(tmp_path, monkeypatch):
    packages = "apt-get install libegl1 libgl1-mesa-dri libopengl0"
    fails = script(tmp_path / "fails", "import sys; sys.exit('libEGL.so.1: cannot open shared object file')")
    with pytest.raises(
        MissingLibraryError, match=f"EGL cannot draw .*libEGL.so.1: cannot.*; {packages}"
    ) as error:
        mujoco.require_egl(fails)
    assert error.value.exit_code == 6
    with pytest.raises(MissingLibraryError, match="the process ended with -6"):
        mujoco.require_egl(script(tmp_path / "aborts", "import os; os.abort()"))
    with pytest.raises(MissingLibraryError, match=r"draws no image within 0.5 s"):
        mujoco.require_egl(script(tmp_path / "hangs", "import time; time.sleep(60)"), seconds=0.5)

    # States do not need it, images do.
    probe = mujoco.require_egl
    monkeypatch.setattr(mujoco, "require_egl", lambda: probe(fails))
    with envs.make("dmc", "walker_walk", num_envs=1, seed=0, obs="state") as env:
        env.reset()
    with pytest.raises(MissingLibraryError, match="EGL cannot draw images here"):
        envs.make("dmc", "walker_walk", num_envs=1, seed=0)


def test_envpool_imported_too_early_is_an_error_and_no_crash():
    code = (
        "import envpool\n"
        "from hdfast import envs\n"
        "from hdfast.envs import mujoco\n"
        "mujoco.require_egl = lambda: None\n"
        "envs.make('dmc', 'walker_walk', num_envs=1, seed=0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "MissingLibraryError: walker_walk: envpool was imported before hdfast" in done.stderr
