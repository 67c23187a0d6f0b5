"""The batched interface itself: the order of calls, and what is checked before a source gets it."""

import importlib.util
import subprocess
import sys
import weakref

import numpy as np
import pytest

from hdfast import envs, suites
from hdfast.envs import base
from hdfast.runtime.errors import MissingLibraryError

N = 3


class Recorder(base.BatchEnv):
    """An environment that only records its calls."""

    source = "test"

    def __init__(self, actions):
        super().__init__("Recorder", num_envs=N, obs_specs={}, actions=actions, action_repeat=1)
        self.sent = []

    def _row(self):
        zero = np.zeros(N, np.float32)
        return base.EnvStep(obs={}, reward=zero, is_first=zero > 0, is_last=zero > 0, is_terminal=zero > 0)

    def _reset(self):
        return self._row()

    def _send(self, action):
        self.sent.append(action)

    def _recv(self):
        return self._row()

    def _close(self):
        self.sent.append("closed")


RIGHT = {
    base.DiscreteActions(4): np.array([0, 3, 1], np.int32),
    base.ContinuousActions(2): np.array([[-1, 1], [0, 0.5], [1, -1]], np.float32),
}
NAN = np.array([[0, 0], [np.nan, 0], [0, 0]], np.float32)
INF = np.array([[0, 0], [np.inf, 0], [0, 0]], np.float32)


@pytest.mark.parametrize(
    ("actions", "wrong", "error", "message"),
    [
        (base.DiscreteActions(4), [0, 1, 2], TypeError, "is a list, expected a numpy array"),
        (base.DiscreteActions(4), np.zeros(3, np.int64), TypeError, "dtype int64, expected int32"),
        (base.DiscreteActions(4), np.zeros(3, np.float32), TypeError, "dtype float32, expected int32"),
        (base.DiscreteActions(4), np.zeros(3, bool), TypeError, "dtype bool, expected int32"),
        (base.DiscreteActions(4), np.zeros(2, np.int32), ValueError, r"shape \(2,\), expected \(3,\)"),
        (base.DiscreteActions(4), np.zeros((3, 1), np.int32), ValueError, r"shape \(3, 1\), expected \(3,\)"),
        (base.DiscreteActions(4), np.array(0, np.int32), ValueError, r"shape \(\), expected \(3,\)"),
        (base.DiscreteActions(4), np.array([0, 4, 1], np.int32), ValueError, r"\[0, 4\], expected 0 to 3"),
        (base.DiscreteActions(4), np.array([0, -1, 1], np.int32), ValueError, r"\[-1, 1\], expected 0 to 3"),
        (base.ContinuousActions(2), np.zeros((3, 2)), TypeError, "dtype float64, expected float32"),
        (base.ContinuousActions(2), np.zeros((3, 3), np.float32), ValueError, r"expected \(3, 2\)"),
        (base.ContinuousActions(2), np.zeros((1, 2), np.float32), ValueError, r"expected \(3, 2\)"),
        (base.ContinuousActions(2), NAN, ValueError, "1 values that are not finite"),
        (base.ContinuousActions(2), INF, ValueError, "1 values that are not finite"),
        (base.ContinuousActions(2), np.full((3, 2), 1.01, np.float32), ValueError, "expected -1 to 1"),
        (base.ContinuousActions(2), np.full((3, 2), -1.01, np.float32), ValueError, "expected -1 to 1"),
    ],
)
def test_wrong_actions_never_reach_the_source(actions, wrong, error, message):
    env = Recorder(actions)
    env.reset()
    with pytest.raises(error, match=f"Recorder: action .*{message}"):
        env.send(wrong)
    assert env.sent == []
    env.step(RIGHT[actions])  # the environment can still be used
    assert len(env.sent) == 1
    assert env.sent[0] is RIGHT[actions]


@pytest.mark.parametrize("actions", RIGHT)
def test_sampled_actions_are_right_ones(actions):
    env = Recorder(actions)
    env.reset()
    for seed in range(50):
        env.step(actions.sample(np.random.default_rng(seed), N))
    drawn = np.unique(np.concatenate(env.sent))
    if isinstance(actions, base.DiscreteActions):
        assert drawn.tolist() == [0, 1, 2, 3]
    else:
        assert drawn.min() < -0.9
        assert drawn.max() > 0.9


def test_calls_out_of_order_are_errors():
    action = RIGHT[base.DiscreteActions(4)]
    env = Recorder(base.DiscreteActions(4))
    with pytest.raises(RuntimeError, match=r"send\(\) before reset\(\)"):
        env.send(action)
    env.reset()
    with pytest.raises(RuntimeError, match=r"recv\(\) without send\(\)"):
        env.recv()
    env.send(action)
    with pytest.raises(RuntimeError, match=r"send\(\) twice"):
        env.send(action)
    with pytest.raises(RuntimeError, match=r"call recv\(\) first"):
        env.reset()
    env.recv()
    env.reset()
    env.close()
    env.close()
    assert env.sent[0] is action
    assert env.sent[1:] == ["closed"]
    for call in (env.reset, env.recv, lambda: env.send(action), lambda: env.step(action)):
        with pytest.raises(RuntimeError, match="Recorder: this environment is closed"):
            call()


def test_leaving_a_with_block_closes():
    with Recorder(base.DiscreteActions(4)) as env:
        env.reset()
    assert env.sent == ["closed"]


def test_seeds_of_environments_do_not_overlap():
    eight = base.env_seeds(0, 8)
    assert base.env_seeds(0, 3) == eight[:3]
    every = [seed for first in range(100) for seed in base.env_seeds(first, 8)]
    assert len(set(every)) == len(every)
    assert all(0 <= seed < 2**31 for seed in every)
    with pytest.raises(ValueError, match="seed is -1"):
        base.env_seeds(-1, 2)


def test_importing_envs_imports_no_source():
    code = (
        "import sys, hdfast.suites, hdfast.envs.atari, hdfast.envs.ale, hdfast.envs.catch\n"
        "heavy = {'envpool', 'ale_py', 'gymnasium', 'mujoco', 'torch'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("suite", "task", "settings", "message"),
    [
        ("atari10k", "Pong", {}, r"no suite 'atari10k'; did you mean 'atari100k'\?"),
        ("atari100k", "Pogn", {}, r"no task 'Pogn' in suite atari100k; did you mean 'Pong'"),
        ("atari100k", "Pong", {"source": "envpol"}, r"--env.source cannot be 'envpol'.*'envpool'"),
        ("demo", "Catch", {"source": "ale"}, r"--env.source cannot be 'ale' in suite demo"),
        ("atari100k", "Pong", {"obs": "state"}, r"--env.obs cannot be 'state' in suite atari100k.*'image'"),
        (
            "atari100k",
            "Pong",
            {"render": "fast"},
            r"--env.render cannot be 'fast' in suite atari100k.*'full'",
        ),
    ],
)
def test_wrong_names_are_answered_with_the_nearest(suite, task, settings, message):
    with pytest.raises(suites.UnknownName, match=message):
        envs.make(suite, task, num_envs=1, seed=0, **settings)


@pytest.mark.parametrize("wrong", [{"num_envs": 0}, {"threads": -1}, {"seed": -1}])
def test_wrong_numbers_are_errors(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is|threads -1"):
        envs.make("demo", "Catch", **{"num_envs": 1, "seed": 0, **wrong})


@pytest.fixture
def without(monkeypatch):
    """Makes packages look as if they were not installed."""

    def hide(*packages):
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name in packages else find(name, *rest)
        )

    return hide


def test_auto_takes_ale_where_envpool_is_missing(without):
    without("envpool")
    with envs.make("atari100k", "Pong", num_envs=1, seed=0) as env:
        assert env.source == "ale"


def test_missing_packages_name_the_command(without):
    without("envpool", "ale_py")
    with pytest.raises(MissingLibraryError, match="Atari needs envpool or ale-py; pip install envpool"):
        envs.make("atari100k", "Pong", num_envs=1, seed=0)
    with pytest.raises(MissingLibraryError, match="needs envpool; pip install envpool"):
        envs.make("atari100k", "Pong", num_envs=1, seed=0, source="envpool")
    with pytest.raises(MissingLibraryError, match="Pong needs ale_py; pip install ale-py"):
        envs.make("atari100k", "Pong", num_envs=1, seed=0, source="ale")
    with pytest.raises(MissingLibraryError, match="Catch-v0 needs envpool; pip install envpool"):
        envs.make("demo", "Catch", num_envs=1, seed=0)


def test_a_package_that_keeps_an_exception_keeps_nothing_of_its_importer(tmp_path, monkeypatch):
    """As envpool does if a library of one of its games is missing."""
    text = "try:\n    import not_there_at_all\nexcept ImportError as error:\n    kept = error\n"
    (tmp_path / "keeps_an_exception.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)

    class Large:
        pass

    def importer():
        large = Large()
        base.load("keeps_an_exception", needed_by="a test", install="")
        return weakref.ref(large)

    assert importer()() is None
    monkeypatch.delitem(sys.modules, "keeps_an_exception")


@pytest.mark.parametrize("source", ["auto", "envpool", "ale"])
def test_a_package_that_does_not_load_says_why(monkeypatch, source):
    def broken(name):
        raise ImportError("libGL.so.1: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(MissingLibraryError, match=r"does not load: libGL.so.1: cannot open") as raised:
        envs.make("atari100k", "Pong", num_envs=1, seed=0, source=source)
    assert raised.value.exit_code == 6


def seeing(**specs):
    """An environment that shows these."""
    env = Recorder(base.DiscreteActions(2))
    env.obs_specs = {name: base.ArraySpec(*spec) for name, spec in specs.items()}
    return env


ARM, IMAGE, HEIGHT = ((2,), np.float32), ((8, 8, 3), np.uint8), ((1,), np.float32)


def test_an_observation_of_ones_own_may_be_of_any_numbers():
    """A robot's driver gives doubles, lists and numbers; each becomes a row of what the agent sees."""
    env, image = seeing(arm=ARM, height=HEIGHT, image=IMAGE), np.full((8, 8, 3), 7, np.uint8)
    for arm, height in (([1, 2], 3), (np.array([1.0, 2.0]), np.float64(3)), (np.array([1, 2]), [3])):
        row = env.row_of({"arm": arm, "height": height, "image": image, "more": None})
        assert {key: (value.shape, value.dtype) for key, value in row.items()} == {
            "arm": ((1, 2), np.float32),
            "height": ((1, 1), np.float32),
            "image": ((1, 8, 8, 3), np.uint8),
        }
        assert (row["arm"].tolist(), row["height"].tolist()) == ([[1, 2]], [[3]])


@pytest.mark.parametrize(
    ("specs", "observation", "error", "message"),
    [
        (
            {"arm": ARM},
            [1, np.nan],
            ValueError,
            "Recorder: observation 'arm' has numbers that are not finite",
        ),
        ({"arm": ARM}, [1, 1e39], ValueError, "Recorder: observation 'arm' has numbers that are not finite"),
        (
            {"arm": ARM},
            [1, 2, 3],
            ValueError,
            r"Recorder: observation 'arm' has shape \(3,\), expected \(2,\)$",
        ),
        ({"arm": ARM}, 1, ValueError, r"Recorder: observation 'arm' has shape \(\), expected \(2,\)$"),
        ({"arm": ARM}, ["a", "b"], TypeError, "Recorder: observation 'arm' has dtype <U1, expected float32"),
        ({"arm": ARM}, {"leg": 1}, ValueError, "Recorder: the observation has no 'arm', but leg"),
        (
            {"image": IMAGE},
            np.zeros((8, 8, 3)),
            TypeError,
            "observation 'image' has dtype float64, expected uint8",
        ),
        (
            {"arm": ARM, "height": HEIGHT},
            [1, 2],
            TypeError,
            "Recorder: the observation is of type list, expected arm, height by name",
        ),
    ],
)
def test_an_observation_of_ones_own_that_does_not_fit_is_told(specs, observation, error, message):
    with pytest.raises(error, match=message):
        seeing(**specs).row_of(observation)
