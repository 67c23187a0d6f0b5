"""Suites: names in any spelling, published numbers, and what is aggregated of them."""

import dataclasses
import math

import pytest

from hdfast import suites
from hdfast.aggregates import Aggregate
from hdfast.runtime.errors import ConfigError

# As in the paper's tables: mean score of five seeds at 400k frames (HarmonyDream, and DreamerV3 run anew).
PRINTED = {
    "Alien": (889.7, 785.7),
    "Asterix": (1140, 974),
    "BankHeist": (1069, 894),
    "Boxing": (79.6, 78.3),
    "Breakout": (52.6, 24.0),
    "ChopperCommand": (1510, 1390),
    "Freeway": (0, 0),
    "Gopher": (13043, 4936),
    "Kangaroo": (5118, 2773),
    "Pong": (18.6, 16.1),
    "PrivateEye": (2932, 1036),
    "UpNDown": (10874, 5636),
}


@pytest.mark.parametrize(
    ("method", "mean", "median", "iqm"),
    [("HarmonyDream", 1.364, 0.671, 0.607), ("DreamerV3, rerun", 1.074, 0.416, 0.472)],
)
def test_published_aggregates_come_out_of_the_table(method, mean, median, iqm):
    suite = suites.get("atari100k")
    got = suite.aggregate(suite.published(method))
    assert dataclasses.astuple(got) == pytest.approx((mean, median, iqm), abs=5e-4)


def test_published_scores_are_those_of_the_paper():
    suite = suites.get("atari100k")
    assert len(suite.tasks) == 26
    assert suite.methods == ("HarmonyDream", "DreamerV3, rerun")
    for method, column in (("HarmonyDream", 0), ("DreamerV3, rerun", 1)):
        published = suite.published(method)
        assert list(published) == [task.name for task in suite.tasks]
        assert {len(seeds) for seeds in published.values()} == {5}
        for game, printed in PRINTED.items():
            mean = sum(published[game]) / 5
            assert mean == pytest.approx(printed[column], rel=6e-4, abs=0.1), game


def test_human_normalized_scores():
    suite = suites.get("atari100k")
    pong = suite.task("Pong")
    assert suites.human_normalized(pong, -20.7) == 0
    assert suites.human_normalized(pong, 14.6) == 1
    assert suites.human_normalized(suite.task("Krull"), 7754) == pytest.approx(5.76674, abs=1e-5)
    with pytest.raises(ValueError, match="Catch has no human"):
        suites.human_normalized(suites.get("demo").task("Catch"), 1.0)


def test_where_there_is_no_interval():
    suite = suites.get("atari100k")
    both = {"Pong": [-20.7, 14.6], "Boxing": [0.1, 12.1]}  # normalised 0 and 1
    assert suite.interval(both) == (Aggregate(0, 0, 0), Aggregate(1, 1, 1))
    assert suite.interval({**both, "Alien": [1.0]}) is None
    assert suite.interval({**both, "Alien": [1.0, math.nan]}) is None
    assert suites.get("demo").interval({"Catch": [1.0, 2.0]}) is None


def test_the_interval_of_the_published_scores():
    """The IQM of DreamerV3 lies beyond the interval of HarmonyDream's."""
    suite = suites.get("atari100k")
    low, high = suite.interval(suite.published("HarmonyDream"))
    assert low.iqm < 0.607 < high.iqm
    assert low.iqm > suite.aggregate(suite.published("DreamerV3, rerun")).iqm


def test_a_suite_aggregates_the_tasks_that_were_run():
    suite = suites.get("atari100k")
    assert suite.aggregate({"pong": [14.6], "boxing": [0.1]}).mean == pytest.approx(0.5)
    assert suites.get("demo").aggregate({"Catch": [1.0]}) is None


@pytest.mark.parametrize(
    ("suite", "spelling", "name"),
    [
        ("atari100k", "pong", "Pong"),
        ("ATARI-100K", "ALE/Pong-v5", "Pong"),
        ("atari100k", "atari_ms_pacman", "MsPacman"),
        ("atari100k", "james_bond", "Jamesbond"),
        ("atari100k", "up-n-down", "UpNDown"),
        ("atari100k", "Demon Attack", "DemonAttack"),
        ("demo", "catch", "Catch"),
        ("dmc", "WalkerWalk-v1", "walker_walk"),
        ("dmc", "dmc_cartpole_swingup_sparse", "cartpole_swingup_sparse"),
        ("dmc", "humanoid_cmu_run", "humanoid_CMU_run"),
        ("metaworld", "MetaWorld/LeverPull-v3", "lever-pull"),
        ("metaworld", "lever_pull", "lever-pull"),
    ],
)
def test_names_are_found_in_any_spelling(suite, spelling, name):
    assert suites.get(suite).task(spelling).name == name


@pytest.mark.parametrize("suite", suites.SUITES.values(), ids=lambda suite: suite.name)
def test_no_two_names_are_confused(suite):
    tasks = (*suite.tasks, *suite.others)
    for task in tasks:
        assert suite.task(task.name) is task
        assert suite.task(task.env_id) is task
    assert len({task.env_id for task in tasks}) == len(tasks)


def test_a_task_that_is_named_twice_is_one():
    atari = suites.get("atari100k")
    chosen = atari.select(["Pong", "Alien", "pong", "ALE/Pong-v5"])
    assert [task.name for task in chosen] == ["Pong", "Alien"]
    assert atari.select([]) == list(atari.tasks)


def test_a_suite_without_a_list_needs_a_task():
    gym = suites.get("gym")
    assert [task.env_id for task in gym.select(["Maze-v0", "Maze-v0"])] == ["Maze-v0"]
    with pytest.raises(suites.UnknownName, match=r"^suite gym needs a task; a task is what gymnasium\.make"):
        gym.select([])


@pytest.mark.parametrize(
    ("suite", "wrong", "nearest"),
    [
        ("atari100k", "Pogn", "Pong"),
        ("atari100k", "ALE/Breakuot-v5", "Breakout"),
        ("atari100k", "mspackman", "MsPacman"),
        ("dmc", "walker_wlak", "walker_walk"),
        ("metaworld", "lever_pul", "lever-pull"),
    ],
)
def test_a_wrong_task_is_answered_with_the_nearest(suite, wrong, nearest):
    with pytest.raises(suites.UnknownName, match=f"did you mean .*'{nearest}'") as raised:
        suites.get(suite).task(wrong)
    assert wrong in str(raised.value)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, ValueError)
    assert isinstance(raised.value, ConfigError)
    assert raised.value.exit_code == 2


def test_a_task_of_another_suite_is_answered_with_that_suite():
    with pytest.raises(
        suites.UnknownName, match=r"^no task 'WalkerWalk' in suite atari100k; suite dmc has it$"
    ):
        suites.get("atari100k").task("WalkerWalk")
    with pytest.raises(suites.UnknownName, match=r"in suite demo; suite atari100k has it$"):
        suites.get("demo").task("pong")


def test_a_wrong_suite_is_answered_with_the_nearest():
    with pytest.raises(suites.UnknownName, match=r"no suite 'atari'; did you mean 'atari100k'\?"):
        suites.get("atari")
    with pytest.raises(suites.UnknownName, match="choose from 'atari100k', 'demo'"):
        suites.get("zzz")


def test_limits_and_budget_of_the_paper():
    suite = suites.get("atari100k")
    limits = {task.name: task.time_limit * suite.action_repeat for task in suite.tasks}
    assert limits.pop("ChopperCommand") == 5_400
    assert set(limits.values()) == {108_000}
    assert suite.defaults["agent_steps"] * suite.action_repeat == 400_000
    assert suite.defaults["train"]["ratio"] == 1024
