"""Warnings about settings that do not fit."""

import dataclasses

import numpy as np
import pytest

from hdfast.advice import RewardScale, check_settings
from hdfast.config import Config, parse
from hdfast.envs.base import ArraySpec, ContinuousActions, DiscreteActions
from hdfast.sections import BehaviorConfig
from tests.loop_cases import (
    one_thread,  # noqa: F401
    tiny,
    train,
)

SMALL = {"return_low": 0.001, "return_high": 0.01}


def scale(rewards, *, floor=1.0):
    config = dataclasses.replace(Config(), behavior=BehaviorConfig(return_floor=floor))
    made = RewardScale(config, "Maze seed 3")
    for reward in rewards:
        made.add(np.array([0.0, reward]))
    return made


def test_small_rewards_are_told_once(capfd):
    made = scale([0.001, -0.004])
    made.check(499, SMALL)  # too early
    assert capfd.readouterr().err == ""
    made.check(500, SMALL)
    made.check(501, SMALL)
    assert capfd.readouterr().err == (
        "warning: Maze seed 3: rewards are at most 0.004 so far, and returns differ by 0.009; advantages are divided "
        "by 1, so that the actor hardly learns: scale rewards up, or --behavior.return-floor down\n"
    )


@pytest.mark.parametrize(
    ("rewards", "floor", "metrics"),
    [
        ([0.0], 1.0, SMALL),  # no reward yet
        ([0.004, 0.1], 1.0, SMALL),
        ([0.004], 0.01, SMALL),  # the floor fits
        ([0.004], 1.0, {"return_low": -0.1, "return_high": 0.05}),  # small rewards that add up
        ([0.004], 1.0, {}),  # no update was counted
    ],
)
def test_rewards_that_will_do(capfd, rewards, floor, metrics):
    scale(rewards, floor=floor).check(10_000, metrics)
    assert capfd.readouterr().err == ""


def test_a_run_tells_what_does_not_fit(tmp_path, monkeypatch, capfd):
    checked = []
    monkeypatch.setattr(
        RewardScale, "check", lambda self, updates, metrics: checked.append((self, updates, metrics))
    )
    config = tiny(tmp_path, log={"every": 20, "video_every": 10})
    train(config)
    err = capfd.readouterr().err
    told = "--replay.length 4 is too short for videos, which show what follows 5 rows: there will be none"
    assert err == f"warning: {told}\n"
    assert not list((tmp_path / "demo").rglob("*.gif"))
    assert checked[-1][0]._largest == 1.0  # a ball that was caught or lost
    assert checked[-1][1] == 15
    assert checked[-1][2].keys() >= {"return_low", "return_high"}


IMAGE, VECTOR = ArraySpec((16, 16, 3), np.dtype(np.uint8)), ArraySpec((3,), np.dtype(np.float32))
DISCRETE, CONTINUOUS = DiscreteActions(3), ContinuousActions(2)
NO_IMAGE, NO_VECTOR = "where nothing observed is an image", "where all that is observed are images"


@pytest.mark.parametrize(
    ("flags", "seen", "actions", "told"),
    [
        ("--behavior.unimix 0.1", IMAGE, DISCRETE, None),
        (
            "--behavior.unimix 0.1",
            IMAGE,
            CONTINUOUS,
            "--behavior.unimix changes nothing for continuous actions",
        ),
        ("--behavior.unimix 0.01", IMAGE, CONTINUOUS, None),  # the default
        ("--harmony.image 0.1", IMAGE, DISCRETE, None),
        ("--harmony.image 0.1", VECTOR, DISCRETE, f"--harmony.image changes nothing {NO_IMAGE}"),
        ("--size tiny", VECTOR, DISCRETE, None),
        ("--loss.vector 2", VECTOR, DISCRETE, None),
        ("--loss.vector 2", IMAGE, DISCRETE, f"--loss.vector changes nothing {NO_VECTOR}"),
    ],
)
def test_settings_that_change_nothing(flags, seen, actions, told, capfd):
    check_settings(parse(["--suite", "gym", "--task", "m:Maze-v0", *flags.split()]), {"seen": seen}, actions)
    assert capfd.readouterr().err == ("" if told is None else f"warning: {told}\n")
