"""Images inside a Dict of the observations, as robots' packages have their cameras, and those that are not seen."""

import dataclasses

import numpy as np
import pytest

from hdfast import envs
from hdfast.envs import gym_view
from hdfast.trained import load
from tests import loop_cases
from tests.gym_cameras import Cameras
from tests.loop_cases import one_thread, path_of, tiny  # noqa: F401


def make(name, num_envs=1, **settings):
    return envs.make("gym", f"tests.gym_cameras:{name}-v0", num_envs=num_envs, **{"seed": 0, **settings})


IMAGES, VECTORS = ["eyes-far-top", "eyes-left"], ["arm", "eyes-zoom", "hand"]


@pytest.mark.parametrize(
    ("obs", "seen"), [("auto", IMAGES), ("image", IMAGES), ("state", VECTORS), ("both", IMAGES + VECTORS)]
)
@pytest.mark.parametrize("num_envs", [1, 2])
def test_cameras_in_a_dict_are_seen_as_images(num_envs, obs, seen):
    with make("Cameras", num_envs, obs=obs) as env:
        assert sorted(env.obs_specs) == sorted(seen)
        env.reset()
        found = env.step(np.zeros(num_envs, np.int32)).obs
    ages = {"eyes-far-top": 2}  # the others are 1
    for name in seen:
        assert (found[name] == ages.get(name, 1)).all()
    if "eyes-left" in seen:
        assert found["eyes-left"].shape == found["eyes-far-top"].shape == (num_envs, 64, 64, 3)
    if "hand" in seen:
        assert [found[name].shape[1] for name in VECTORS] == [2, 1, 3]


def test_an_agent_acts_on_the_environment_s_own_observation(tmp_path):
    task = "tests.gym_cameras:Cameras-v0"
    config = tiny(tmp_path, suite="gym", task=task, env={"obs": "both", "image_size": 8, "num_envs": 1})
    loop_cases.train(config)
    config, own = dataclasses.replace(config, task=task.replace(":", "-")), Cameras()  # its folder
    with load(path_of(config)) as trained:
        observation, _ = own.reset(seed=0)
        for _ in range(3):
            observation, *_ = own.step(trained.act(observation))


def test_images_that_stay_unseen_are_told(capfd):
    gym_view._tell.cache_clear()
    make("Paired", obs="image").close()
    alone = "an image stands alone or in a Dict, (H, W, 3)"
    told = f"Paired-v0: sees what it draws, not the images in eyes; {alone}"
    assert capfd.readouterr().err == f"warning: {told}\n"
    make("Paired").close()
    told = f"Paired-v0: sees the images in eyes as a vector of 384 numbers; {alone}"
    assert capfd.readouterr().err == f"warning: {told}\n"
