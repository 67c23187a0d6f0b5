"""Environments that the agent cannot use, and names of no environment: one line with what would be right."""

import re

import gymnasium
import pytest
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from hdfast import envs
from hdfast.envs import gym_spaces
from hdfast.envs.base import DiscreteActions
from hdfast.replay.contents import replay_specs
from hdfast.replay.rows import STARTS
from hdfast.runtime.errors import ConfigError, EnvError
from hdfast.suites import UnknownName
from tests import gym_envs, loop_cases
from tests.loop_cases import tiny
from tests.test_envs_gym import make


@pytest.mark.parametrize(
    ("name", "obs", "message"),
    [
        (
            "Undrawn",
            "image",
            r"Undrawn-v0: there is no image in its observations, and it draws none; let it observe",
        ),
        (
            "UndrawnFrames",
            "both",
            r"the images in state do not stand alone in its observations, and it draws none; let it observe",
        ),
        (
            "Stacked",
            "image",
            r"'image' is \(4, 84, 84\) uint8; an image is \(H, W, 3\), .* or \(H, W\) uint8; .*; leave out stacks "
            r"of frames, the agent remembers$",
        ),
        (
            "StackedLast",
            "auto",
            r"'image' is \(84, 84, 12\) uint8; an image is .*; leave out stacks of frames, the agent",
        ),
        (
            "StackedBeside",
            "auto",
            r"'eyes' is \(4, 84, 84\) uint8; .*; or leave it out with gymnasium.wrappers.FilterObservation; "
            r"--env.obs state does without images$",
        ),
        ("SentenceAlone", "auto", r"observation 'task' is Sentence, which has no fixed length$"),
        (
            "Unsure",
            "image",
            r"'image' is \(8, 8, 3\) float32 of -?\d to \d; an image is uint8, or .*; gymnasium.wrappers.Transform",
        ),
        (
            "Float",
            "both",
            r"'image' is \(8, 8, 3\) float32 of -?\d to \d; an image is uint8, or .*; gymnasium.wrappers.Transform",
        ),
        (
            "Float",
            "state",
            r"'image' is \(8, 8, 3\) float32 of -1 to 1; an image is uint8, or floats of 0 to 1 or 0 to 255",
        ),
        ("Count", "state", r"Count-v0: its observations hold no vectors; --env.obs image sees the images"),
        (
            "Empty",
            "auto",
            r"Empty-v0: observation 'state' is Box\(.*\(0,\), float32\), which holds no number$",
        ),
        ("EmptyWithin", "state", r"observation 'hand' is Dict\('tip': .*\), which holds no number"),
        ("EmptyImage", "auto", r"observation 'image' is \(0, 8, 3\) uint8, which holds no pixel"),
        ("Taken", "image", r"an observation cannot be called 'reward'"),
        ("Twice", "both", r"observations 'a-b' and 'a/b' would both be called 'a-b'"),
        (
            "Many",
            "auto",
            r"Many-v0: it is a VectorEnv; register a single environment; hdfast makes its own .*num-envs",
        ),
        ("ManyAlone", "auto", r"ManyAlone-v0: it is a VectorEnv; register a single"),
        ("ClimbingImage", "image", r"an observation cannot be called '../../x'; expected letters, digits"),
        (
            "LostCont",
            "both",
            r"no image cannot be called 'cont'; the agent has a loss of that name; "
            r"rename it, or leave it out with gymnasium.wrappers.FilterObservation$",
        ),
        ("LostDyn", "state", r"no image cannot be called 'dyn'; the agent has a loss of that name"),
        ("LostRep", "both", r"no image cannot be called 'rep'; the agent has a loss of that name"),
        ("LostImage", "both", r"no image cannot be called 'image'; the agent has a loss of that name"),
        (
            "MultiMany",
            "image",
            r"its actions are MultiDiscrete\(\[\[ 5 5\] \[41 1\]\]\), 1,025 combinations; expected up to 1,024$",
        ),
        (
            "ManySwitches",
            "image",
            r"its actions are MultiBinary\(11\), 2,048 combinations; expected up to 1,024$",
        ),
        (
            "Words",
            "image",
            r"its actions are Text\(.*\); expected Discrete, MultiDiscrete, MultiBinary, or a Box",
        ),
        ("Whole", "image", r"its actions are Box\(.*int32\); expected"),
        *(
            (
                name,
                "image",
                r"no bounds: Box\(.*inf, .*; gymnasium.wrappers.TransformAction\(env, f, Box\(low, high\)\) gives",
            )
            for name in ("Unbounded", "ClippedHalf", "ClippedDoubled")
        ),
        ("Still", "image", r"its actions leave no choice: Box\(0.0, 0.0, \(2,\)"),
        ("Bodiless", "image", r"its actions leave no choice: Box\(.*\(0,\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*WARN:UserWarning")  # gymnasium warns of the same
def test_what_the_agent_cannot_take_is_refused_with_what_is_right(name, obs, message):
    with pytest.raises(ConfigError, match=message) as raised:
        make(name, obs=obs)
    assert "\n" not in str(raised.value)
    for wrapper in re.findall(r"gymnasium\.wrappers\.(\w+)", str(raised.value)):
        assert hasattr(gymnasium.wrappers, wrapper)


def test_one_odd_image_among_others_can_be_left_out_as_its_refusal_says(monkeypatch):
    space = spaces.Dict({"eye": gym_envs.pixels(8, 8, 3), "depth": gym_envs.unit(8, 8, 1, high=10)})
    filtered = lambda: gymnasium.wrappers.FilterObservation(gym_envs.Count(space), ["eye"])  # noqa: E731
    for made, name in ((lambda: gym_envs.Count(space), "Odd-v0"), (filtered, "Fine-v0")):
        monkeypatch.setitem(gymnasium.registry, name, EnvSpec(name, made, max_episode_steps=9))
    right = r"0 to 10; .* makes one; or leave it out with gymnasium.wrappers.FilterObservation$"
    with pytest.raises(ConfigError, match=right):
        make("Odd")
    with make("Fine") as env:
        assert [*env.obs_specs] == ["eye"]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            "CartPol-v1",
            r"'CartPol-v1' is registered with gymnasium; did you mean 'CartPole-v1'.*; those of a pack",
        ),
        (
            "Zzzz-v0",
            r"no environment 'Zzzz-v0' .*; those of a package are named with its module before a colon, such as "
            r"ale_py:ALE/Pong-v5 or my_envs:Maze-v0$",
        ),
        (
            "MiniGrid-Empty-5x5-v0",
            r"is registered with gymnasium; those of a package are named with its module",
        ),
        (
            "Qwkz/Xjyqq-v0",
            r"no environment 'Qwkz/Xjyqq-v0' .*; those of a package are named with its module",
        ),
        (
            "json:Nothing-v0",
            r"no environment 'Nothing-v0' is registered with gymnasium; importing json registers none$",
        ),
        ("tests.gym_envs:CartPole-v1x", r"no environment 'CartPole-v1x' .*'tests.gym_envs:(?!.*:CartPole)"),
        ("tests.gym_envs:Coumt-v0", r"no environment 'Coumt-v0' .*did you mean 'tests.gym_envs:Count-v0'"),
        (
            "tests.no_such:Count-v0",
            r"no module 'tests.no_such' to import for .*; install it, .* the folder that holds tests.py or tests/$",
        ),
        (
            "tests.gym_envs.py:Count-v0",
            r"no module 'tests.gym_envs.py' to import for .*; leave out .py: tests.gym_envs:Count-v0$",
        ),
        (
            "no_such.py:Count-v0",
            r"no module 'no_such' to import for no_such.py:Count-v0; install it, or start",
        ),
        ("a b", r"no task 'a b' in suite gym; a task is what gymnasium.make takes, such as"),
    ],
)
def test_a_wrong_name_is_answered_before_it_becomes_a_directory(task, message, tmp_path):
    with pytest.raises(UnknownName, match=message) as raised:
        loop_cases.train(tiny(tmp_path, suite="gym", task=task))
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_module_that_imports_what_is_missing_names_it(tmp_path, monkeypatch):
    (tmp_path / "needs.py").write_text("import no_such_package_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(envs.MissingLibraryError, match="needs needs no_such_package_at_all; pip install"):
        envs.check("gym", "needs:Any-v0")
    (tmp_path / "slips.py").write_text("import tests.no_such\n")  # a package of that name is somebody else's
    with pytest.raises(
        EnvError, match=r"^slips: it raised ModuleNotFoundError: No module named 'tests.no_such'"
    ):
        envs.check("gym", "slips:Any-v0")


def test_no_observation_can_be_called_as_a_column_of_replay():
    assert {*gym_spaces._TAKEN} == {*replay_specs({}, DiscreteActions(2)), STARTS}
