"""The video of an evaluation: the first episode, as a GIF in the run's directory."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hdfast import evaluate
from hdfast.runtime.errors import RunError
from hdfast.trained import load
from tests import gym_envs, loop_cases
from tests.loop_cases import (
    one_thread,  # noqa: F401
    path_of,
    tiny,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of Catch."""
    config = tiny(tmp_path_factory.mktemp("runs"))
    loop_cases.train(config)
    return config


def test_evaluate_writes_a_video_of_the_first_episode(run):
    found = evaluate.evaluate(path_of(run), episodes=3, num_envs=2, video=True, device="cpu")
    path = Path(found["video"])
    assert path == path_of(run) / "videos" / "evaluate_0000000040.gif"
    with Image.open(path) as image:
        assert image.n_frames == 10  # the reset row and nine more
        assert image.size == (256, 256)
    other = evaluate.evaluate(path_of(run), episodes=1, video=True, device="cpu", greedy=True, seed=3)
    assert other["video"] == str(path.with_stem(f"{path.stem}_greedy_seed3"))
    assert path.exists(), "a film with other settings replaces none"
    path.unlink()
    Path(other["video"]).unlink()


def test_a_checkpoint_that_was_copied_out_of_its_run_is_named(run, tmp_path):
    (newest,) = path_of(run).glob("checkpoints/*.safetensors")
    lone = shutil.copy(newest, tmp_path / "lone.safetensors")
    with pytest.raises(RunError) as error:
        evaluate.evaluate(lone, episodes=1, video=True, device="cpu")
    hint = "a checkpoint is played where it lies, in <run>/checkpoints/"
    assert str(error.value) == f"{lone}: this checkpoint is in no run; {hint}"


def test_a_link_to_a_checkpoint_is_of_the_run_that_it_leads_to(run, tmp_path):
    (newest,) = path_of(run).glob("checkpoints/*.safetensors")
    (best := tmp_path / "best.safetensors").symlink_to(newest)
    found = evaluate.evaluate(best, episodes=1, video=True, device="cpu")
    assert (found["run"], found["checkpoint"]) == (str(path_of(run)), newest.name)
    (film,) = path_of(run).glob("videos/evaluate_*.gif")
    film.unlink()


def test_a_film_is_named_after_the_arguments_of_its_environment():
    named = {text: evaluate._otherwise(0, False, text) for text in ('{"level": 4}', '{"level": -4}', "{}")}
    assert list(named.values()) == ["_level-4", "_level--4", ""]


@pytest.mark.parametrize("obs", ["state", "auto"])
def test_a_video_of_a_run_from_vectors_is_drawn_and_changes_no_score(tmp_path, obs):
    config = tiny(
        tmp_path,
        suite="gym",
        task="tests.gym_envs:Drawn-v0",
        env={"num_envs": 1, "obs": obs},
        agent_steps=12,
    )
    loop_cases.train(config)
    run = next(tmp_path.glob("gym/*/seed0"))
    film, plain = (evaluate.evaluate(run, episodes=2, video=video, device="cpu") for video in (True, False))
    assert film["scores"] == plain["scores"]
    with Image.open(film["video"]) as image:
        ages = []
        for frame in range(image.n_frames):
            image.seek(frame)
            ages.append(image.convert("RGB").getpixel((100, 100)))
    assert ages == [(10 * age,) * 3 for age in range(6)]


def test_what_the_agent_does_not_see_is_drawn_for_the_film_alone(tmp_path, monkeypatch):
    loop_cases.train(
        tiny(tmp_path, agent_steps=4, suite="gym", task="tests.gym_envs:Drawn-v0", env={"obs": "state"})
    )
    (run,) = tmp_path.glob("gym/*/seed0")
    drawn, render = [], gym_envs.Count.render
    monkeypatch.setattr(gym_envs.Count, "render", lambda self: (drawn.append(1), render(self))[1])
    found = evaluate.evaluate(run, episodes=4, num_envs=1, video=True, device="cpu")
    assert len(found["scores"]) == 4
    with Image.open(found["video"]) as image:
        assert image.n_frames == 6
    assert len(drawn) == 7  # once to see how large it is


def test_a_video_of_a_long_episode_is_cut_and_told(run, monkeypatch, capfd):
    monkeypatch.setattr(evaluate.Film, "LONGEST", 4)
    path = Path(evaluate.evaluate(path_of(run), episodes=3, num_envs=2, video=True, device="cpu")["video"])
    with Image.open(path) as image:
        assert image.n_frames == 4
    assert capfd.readouterr().err == f"warning: {path}: the first 4 rows of an episode that goes on\n"
    path.unlink()


def test_a_video_that_cannot_be_written_is_told_after_its_episode_not_after_all(run, tmp_path):
    copy = tmp_path / "seed0"
    shutil.copytree(path_of(run), copy)
    shutil.rmtree(copy / "videos")
    (copy / "videos").touch()
    began = time.monotonic()
    with pytest.raises(RunError, match="cannot write the video"):
        evaluate.evaluate(copy, episodes=1_000_000, num_envs=2, video=True, device="cpu")
    assert time.monotonic() - began < 30


def test_what_is_drawn_for_a_video_is_nothing_that_it_acts_on(tmp_path):
    loop_cases.train(
        tiny(tmp_path, agent_steps=4, suite="gym", task="tests.gym_envs:Drawn-v0", env={"obs": "state"})
    )
    (folder,) = tmp_path.glob("gym/*/seed0")
    drawn = load(folder, device="cpu", drawn=True)
    with drawn, pytest.raises(ValueError, match="load it without drawn=True"):
        drawn.act(np.zeros(3, np.float32))
    with load(folder, device="cpu") as trained:
        assert trained.act(np.zeros(3, np.float32)) in (0, 1, 2)
