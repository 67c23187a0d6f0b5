"""Runs on users' own environments: resuming, success, videos and reports."""

import dataclasses
import multiprocessing
import os
import signal

import gymnasium
import pytest

from hdfast import loop, results, suites
from hdfast.evaluate import evaluate
from hdfast.runtime.errors import CheckpointError, ConfigError, HdfastError, Interrupted, RunError
from tests import loop_cases
from tests.loop_cases import lines, one_thread, path_of, tiny  # noqa: F401


@pytest.mark.parametrize(("now", "error"), [("Tall", RunError), ("From9", CheckpointError)])
def test_a_run_whose_environment_has_changed_is_not_gone_on_with(tmp_path, monkeypatch, now, error):
    config = tiny(tmp_path, suite="gym", task="tests.gym_envs:Count-v0", checkpoint={"seconds": 0})
    with monkeypatch.context() as patch:
        patch.setattr(
            loop.Session, "_evaluate", lambda self: os.kill(os.getpid(), signal.SIGTERM) or self.stop.check()
        )
        with pytest.raises(Interrupted):
            loop_cases.train(config)
    before = {
        p: p.read_bytes()
        for p in tmp_path.rglob("*")
        if p.is_file() and p.name not in ("lock", "config.json")
    }
    changed = dataclasses.replace(gymnasium.spec(f"{now}-v0"), id="Count-v0")
    monkeypatch.setitem(gymnasium.registry, "Count-v0", changed)
    with pytest.raises(error, match=r"does not fit|holds rows of another environment: "):
        loop_cases.train(config)
    assert {p: p.read_bytes() for p in before} == before
    assert not multiprocessing.active_children()


def test_a_run_tells_how_often_it_succeeds(tmp_path):
    task = "tests.gym_envs:SolvedAtTheEnd-v0"
    config = tiny(tmp_path, suite="gym", task=task, env={"threads": 1}, eval={"episodes": 4})
    summary = loop_cases.train(config)
    assert summary["success"] == 0.5
    config = dataclasses.replace(config, task="tests.gym_envs-SolvedAtTheEnd-v0")  # its folder
    told = [line["success"] for line in lines(config, "scores", kind="episode")]
    assert set(told) == {False, True}
    assert evaluate(path_of(config), episodes=4, num_envs=2, device="cpu")["success"] == 0.5
    (row,) = results.collect(tmp_path, suites.get("gym"))
    assert row.success == {0: 0.5}


def test_a_run_on_an_environment_of_ones_own(tmp_path):
    task = "tests.gym_envs:Tall-v0"
    overrides = {"suite": "gym", "task": task, "env": {"num_envs": 2, "threads": 1}}
    config = tiny(tmp_path, **overrides)
    summary = loop_cases.train(config)
    path = tmp_path / "gym" / "tests.gym_envs-Tall-v0" / "seed0"
    assert (path / "finished.json").exists()
    assert summary["length"] == 5
    assert evaluate(path, episodes=2, device="cpu")["scores"] == pytest.approx([15, 15], abs=0.11)
    (row,) = results.collect(tmp_path, suites.get("gym"))
    assert (row.task.name, row.scores) == (task, {0: summary["score"]})


def test_of_two_environments_that_share_a_folder_the_second_is_refused(tmp_path, monkeypatch):
    for name in ("maze/Easy-v0", "maze-Easy-v0"):
        spec = gymnasium.envs.registration.EnvSpec(name, entry_point="tests.gym_envs:Count")
        monkeypatch.setitem(gymnasium.registry, name, spec)
    overrides = {"suite": "gym", "env": {"threads": 1}, "agent_steps": 4}
    loop_cases.train(tiny(tmp_path, task="maze/Easy-v0", **overrides))
    config = tiny(tmp_path, task="maze-Easy-v0", **overrides)
    with pytest.raises(ConfigError, match="another config") as error:
        loop_cases.train(config)
    assert error.value.details == ('task: "maze/Easy-v0" -> "maze-Easy-v0"',)
    (row,) = results.collect(tmp_path, suites.get("gym"))
    assert row.task.name == "maze/Easy-v0"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("Undrawn", "there is no image in its observations, and it draws none"),
        ("Undrawable", "it raised NotImplementedError"),
        ("Blind", 'no brush, run `pip install "brush"`'),
    ],
)
def test_a_video_of_what_cannot_be_drawn_is_to_be_left_out(tmp_path, name, what):
    task = {"suite": "gym", "task": f"tests.gym_envs:{name}-v0", "env": {"threads": 1, "obs": "auto"}}
    loop_cases.train(tiny(tmp_path, **task, agent_steps=4))
    path = tmp_path / "gym" / f"tests.gym_envs-{name}-v0" / "seed0"
    with pytest.raises(HdfastError) as error:
        evaluate(path, episodes=1, device="cpu", video=True)
    assert str(error.value) == f"{name}-v0: {what}; leave out --video"
    assert evaluate(path, episodes=1, device="cpu")["length"] == 5
