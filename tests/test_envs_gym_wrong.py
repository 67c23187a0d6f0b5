"""Users' own environments that misbehave: what they raise, return, warn of, and how they end."""

import re

import numpy as np
import pytest
from gymnasium import spaces

from hdfast import envs
from hdfast.envs import gym_spaces
from hdfast.runtime.errors import RunError
from tests import gym_envs, loop_cases
from tests.gym_cases import make
from tests.loop_cases import flags


@pytest.mark.parametrize("threads", [0, 1])
def test_what_an_environment_raises_is_one_line_with_its_own_frames(threads):
    with make("Broken", 2, threads=threads) as env:
        env.reset()
        for _ in range(2):
            env.step(np.zeros(2, np.int32))
        with pytest.raises(RunError, match=r"^Broken-v0: it raised ZeroDivisionError: at the third") as error:
            env.step(np.zeros(2, np.int32))
    (frame,) = error.value.details
    assert re.search(r"gym_envs.py:\d+ in step: raise ZeroDivisionError", frame)


@pytest.mark.parametrize("threads", [0, 1])
@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("nan", "observation 'arm' has numbers that are not finite, the first is number 1"),
        ("long", "observation 'arm' has 3 numbers, expected 2"),
        ("count", "observation 'arm' is -2, expected a whole number from -1 to 1"),
        ("float", "observation 'image' is (8, 8, 3) float64, its space says (8, 8, 3) uint8"),
        ("reward", "its reward is nan, expected a finite number"),
        ("none", "its reward is None, expected a finite number"),
        ("exit", "it raised SystemExit: 3"),
    ],
)
def test_what_an_environment_gives_wrong_never_reaches_the_agent(how, text, threads):
    with make(f"Wrong{how.title()}", 2, threads=threads, obs="both") as env:
        env.reset()
        env.step(np.zeros(2, np.int32))
        with pytest.raises(RunError) as error:
            env.step(np.zeros(2, np.int32))
    assert str(error.value) == f"Wrong{how.title()}-v0: {text}"


@pytest.mark.parametrize(
    ("space", "rights", "wrongs"),
    [
        (
            spaces.Discrete(3),
            [0, np.int8(2), np.array([1]), True],
            [(3, 3), (-1, -1), (1.0, 1.0), ([1, 2], "[1, 2]")],
        ),
        (spaces.Discrete(2, start=-1), [-1, 0], [(1, 1), (-2, -2)]),
        (
            spaces.MultiDiscrete([3, 2], start=[0, 4]),
            [[2, 5], np.uint8([0, 4])],
            [([2, 6], "6 at [1]"), ([-1, 4], "-1 at [0]"), ([2.0, 4.0], "(2,) float64"), ([1], "(1,) int64")],
        ),
        (
            spaces.Dict({"a": spaces.Tuple((spaces.Box(-1, 1, (2,)), spaces.Discrete(2)))}),
            [{"a": (np.full(2, 9), 1)}],
            [({"a": (np.zeros(2), 2)}, "'it/a/1' is 2")],
        ),
    ],
)
def test_what_counts_beyond_its_space_is_told(space, rights, wrongs):
    """gymnasium would take -1 as an index from the end."""
    for right in rights:
        assert gym_spaces.outside(space, right, "it") is None
        assert spaces.flatten(space, right).size == spaces.flatdim(space)
    for wrong, text in wrongs:
        assert f" {text}, expected " in (gym_spaces.outside(space, wrong, "it") or "")


def test_an_observation_without_its_names_or_one_of_them_is_told():
    with make("Goals", obs="both") as env:
        observation = gym_envs.GOALS.sample()
        assert env.row_of(observation).keys() == observation.keys()
        with pytest.raises(RunError, match="is of type ndarray, expected arm, depth, goal, image by name"):
            env.row_of(observation["image"])
        del observation["goal"]
        with pytest.raises(
            RunError, match=r"^Goals-v0: the observation has no 'goal', but arm, depth, image$"
        ):
            env.row_of(observation)


def test_an_environment_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, capfd):
    for name, num_envs, text in (
        ("WrongInit", 1, "ValueError: no such map"),
        ("WrongApart", 2, "OSError: the port is in use"),  # if each has a process
    ):
        with pytest.raises(RunError) as error:
            make(name, num_envs)
        assert str(error.value) == f"{name}-v0: it raised {text}"
        assert f"in __init__: raise {text.partition(':')[0]}" in error.value.details[-1]
    assert capfd.readouterr().err == ""
    needed = "^WrongNeeds-v0 needs no_such_package_at_all; pip install no_such_package_at_all$"
    with pytest.raises(envs.MissingLibraryError, match=needed):
        make("WrongNeeds")
    (tmp_path / "torn.py").write_text("def half(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RunError, match=r"^torn: it raised SyntaxError: "):
        envs.check("gym", "torn:Any-v0")
    (tmp_path / "closed.py").write_text("raise PermissionError('not here')\n")
    with pytest.raises(RunError) as error:
        envs.check("gym", "closed:Any-v0")
    assert str(error.value) == "closed: it raised PermissionError: not here"
    assert error.value.details == (
        f"{tmp_path / 'closed.py'}:1 in <module>: raise PermissionError('not here')",
    )


@pytest.mark.parametrize("threads", ["0", "1"])
def test_warnings_of_environments_are_a_line_each_and_told_once(tmp_path, threads):
    """Also those of four processes."""
    task = ["--suite", "gym", "--task", "tests.gym_envs:WrongOdd-v0", "--env.num-envs", "4"]
    argv = [*flags()[2:], *task, "--env.threads", threads, "--logdir", str(tmp_path)]
    process = loop_cases.start(argv)
    _, err = process.communicate(timeout=300)
    said, end, frame = err.splitlines()
    assert process.returncode == 1
    assert said == "warning: the joints are odd"
    assert end == "error: WrongOdd-v0: it raised RuntimeError: very odd"
    assert frame.startswith("  ")


@pytest.mark.parametrize("threads", ["0", "1"])
def test_an_environment_that_cannot_be_closed_is_a_warning(tmp_path, threads):
    task = ["--suite", "gym", "--task", "tests.gym_envs:WrongClose-v0"]
    process = loop_cases.start([*flags()[2:], *task, "--env.threads", threads, "--logdir", str(tmp_path)])
    _, err = process.communicate(timeout=300)
    said = "warning: WrongClose-v0: it raised RuntimeError: still in use; it was being closed"
    assert (process.returncode, set(err.splitlines())) == (0, {said})


def test_an_environment_whose_process_dies_is_one_line_and_can_be_closed():
    with make("Broken", 2) as env:
        env.reset()
        for _ in range(2):
            env.step(np.zeros(2, np.int32))
        with pytest.raises(
            RunError,
            match=r"process of an environment has ended \(killed by signal 9, Killed\); with --env.thr",
        ):
            env.step(np.array([2, 1], np.int32))
    assert not any(process.is_alive() for process in env._vector.processes)
