"""How users' own environments are made: with which arguments, and when their episodes end.

Axes: N environments.
"""

import ctypes
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from hdfast import envs
from hdfast.envs import gym, gym_view
from hdfast.evaluate import evaluate
from hdfast.runtime.errors import ConfigError, EnvError
from hdfast.runtime.signals import StopRequest
from tests import loop_cases
from tests.gym_cases import make
from tests.loop_cases import PYTHONPATH, one_thread, path_of, tiny  # noqa: F401


def end_of(env, most=20):
    """After how many agent steps the first episode ends, and whether its end is terminal."""
    with env:
        env.reset()
        for count in range(1, most + 1):
            row = env.step(np.zeros(env.num_envs, np.int32))
            if row.is_last.any():
                assert row.is_last.all()
                return count, bool(row.is_terminal.all())
    return None


@pytest.mark.parametrize(("num_envs", "threads"), [(1, 0), (2, 0), (2, 1)])
def test_arguments_reach_every_environment(num_envs, threads):
    assert end_of(make("Count", num_envs, threads=threads)) == (5, True)
    assert end_of(make("Count", num_envs, threads=threads, kwargs='{"length":3}')) == (3, True)


def test_arguments_reach_what_is_drawn_too():
    kwargs = '{"length":2,"render_mode":"rgb_array"}'
    assert end_of(make("Drawn", obs="both", kwargs=kwargs)) == (2, True)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ('{"lenght":3}', "Count.__init__() got an unexpected keyword argument 'lenght'"),
        ('{"id":"Tall-v0"}', "make() got multiple values for argument 'id'"),
    ],
)
def test_arguments_that_an_environment_does_not_take_are_one_line(kwargs, text):
    for num_envs in (1, 2):
        with pytest.raises(ConfigError) as error:
            make("Count", num_envs, kwargs=kwargs)
        said = re.sub(r"\. Did you mean '\w+'\?", "", str(error.value))  # from Python 3.13 on
        assert said == f"Count-v0: it raised TypeError: {text}; --env.kwargs gave it {kwargs}"
        assert error.value.details == ()


def test_a_type_error_of_an_environment_without_arguments_is_its_own(monkeypatch):
    envs.check("gym", "tests.gym_envs:Count-v0")
    wrong = dataclasses.replace(gymnasium.spec("Count-v0"), kwargs={"lenght": 3})
    monkeypatch.setitem(gymnasium.registry, "Count-v0", wrong)
    with pytest.raises(EnvError, match=r"it raised TypeError: .*'lenght'") as error:
        make("Count")
    assert "--env.kwargs" not in str(error.value)


def test_an_environment_may_make_another_that_its_module_registers(tmp_path):
    """A lambda reaches the other processes by value, without its module, whose warning is told once."""
    (tmp_path / "makes_another.py").write_text(
        "import warnings\nimport gymnasium\nimport tests.gym_envs\n"
        "warnings.warn('an old module')\n"
        "gymnasium.register('Outer-v0', lambda: gymnasium.make('Count-v0'), max_episode_steps=9)\n"
    )
    script = (
        "from hdfast import envs\n"
        "from hdfast.runtime.errors import tell_warnings\n"
        "tell_warnings()\n"
        "with envs.make('gym', 'makes_another:Outer-v0', num_envs=2, seed=0) as env:\n"
        "    assert env.reset().obs['image'].shape == (2, 16, 16, 3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((PYTHONPATH, str(tmp_path)))},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "warning: an old module\n")


class Starts(gymnasium.Env):
    """Starts a program and a process, and ends them. Observes whether the program ignores SIGINT."""

    observation_space = gymnasium.spaces.Box(0, 1, (1,))
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of forking where there are threads
            process = os.fork()
        if process == 0:
            signal.alarm(20)
            time.sleep(60)
            os._exit(1)
        os.kill(process, signal.SIGTERM)
        assert os.waitpid(process, 0) == (process, signal.SIGTERM)
        with subprocess.Popen(["sleep", "60"]) as program:
            ignored = re.search(r"SigIgn:\s(\w+)", Path(f"/proc/{program.pid}/status").read_text())
            program.terminate()
            assert program.wait(20) == -signal.SIGTERM
        return np.float32([int(ignored[1], 16) >> (signal.SIGINT - 1) & 1]), {}

    def step(self, action):
        return np.zeros(1, np.float32), 0.0, False, False, {}


@pytest.mark.parametrize("num_envs", [1, 2])
def test_what_an_environment_starts_can_be_terminated(monkeypatch, num_envs):
    """Ctrl-C is for the learner alone, but a process that ignored SIGTERM would make others ignore it, too."""
    spec = gymnasium.envs.registration.EnvSpec("Starts-v0", entry_point=Starts, max_episode_steps=3)
    monkeypatch.setitem(gymnasium.registry, "Starts-v0", spec)
    with StopRequest(), envs.make("gym", "Starts-v0", num_envs=num_envs, seed=0, obs="state") as env:
        ignored = env.reset().obs["state"]
    if num_envs > 1:
        assert ignored.tolist() == [[1]] * num_envs


def test_a_run_with_other_arguments_is_another_run(tmp_path):
    task = {"suite": "gym", "task": "tests.gym_envs:Count-v0"}
    env = {"threads": 1, "kwargs": '{"length": 3}', "time_limit": 9}
    config = tiny(tmp_path, **task, env=env)
    assert loop_cases.train(config)["length"] == 3
    config = dataclasses.replace(config, task="tests.gym_envs-Count-v0")  # its folder
    stored = json.loads((path_of(config) / "config.json").read_text())["config"]["env"]
    assert (stored["kwargs"], stored["time_limit"]) == ('{"length":3}', 9)
    played = evaluate(path_of(config), episodes=2, device="cpu")
    assert played["length"] == 3
    assert "env_kwargs" not in played
    other = evaluate(path_of(config), episodes=2, device="cpu", env_kwargs='{"length": 5}')
    assert other["length"] == 5
    assert other["env_kwargs"] == {"length": 5}
    rest = evaluate(path_of(config), episodes=2, device="cpu", env_kwargs='{"observation": null}')
    assert rest["length"] == 3  # the run's stays
    with pytest.raises(ConfigError, match=r"^--env\.kwargs 5 is no JSON object"):
        evaluate(path_of(config), episodes=2, device="cpu", env_kwargs="5")
    for changed, line in (
        ({"kwargs": '{"length": 4}'}, r'env.kwargs: "{\"length\":3}" -> "{\"length\":4}"'),
        ({"time_limit": 2}, "env.time_limit: 9 -> 2"),
    ):
        with pytest.raises(ConfigError, match="another config") as error:
            loop_cases.train(tiny(tmp_path, **task, env={**env, **changed}))
        assert error.value.details == (line,)


@pytest.mark.parametrize(
    ("name", "time_limit", "end"),
    [
        ("Endless", 0, None),
        ("Endless", 4, (4, False)),
        ("Limited", 0, (3, False)),
        ("Limited", 4, (4, False)),  # in place of the registered limit
        ("LimitedInside", 0, (4, False)),
        ("LimitedInside", 3, (3, False)),
        ("Skipping", 0, (3, False)),
        ("Skipping", 2, (2, False)),  # each of its steps is two of these
        ("Count", 5, (5, True)),
        ("Count", 4, (4, False)),
    ],
)
def test_a_time_limit_is_of_agent_steps_and_never_terminal(name, time_limit, end):
    assert end_of(make(name, time_limit=time_limit)) == end


@pytest.mark.parametrize("num_envs", [1, 2])
def test_an_environment_without_a_time_limit_is_told_once(num_envs, capfd):
    gym_view._tell.cache_clear()
    for settings in ({"time_limit": 4}, {}, {}):
        make("Endless", num_envs, **settings).close()
    for name in ("Limited", "LimitedInside"):
        make(name, num_envs).close()
    what = "gymnasium knows of no time limit; if an episode may not end, --env.time-limit ends it"
    assert capfd.readouterr().err == f"warning: Endless-v0: {what}\n"


def test_mujoco_draws_without_a_display(monkeypatch):
    """The package mujoco looks for a display unless MUJOCO_GL says otherwise."""
    pytest.importorskip("mujoco")
    try:
        ctypes.CDLL("libEGL.so.1")
    except OSError:
        pytest.skip("needs libEGL")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"):
        monkeypatch.delenv(name, raising=False)
    script = (
        "from hdfast import envs\n"
        "with envs.make('gym', 'HalfCheetah-v5', num_envs=1, seed=0, obs='image') as env:\n"
        "    image = env.reset().obs['image']\n"
        "assert image.shape == (1, 64, 64, 3) and image.std() > 10, image\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "value"), [("DISPLAY", ":0"), ("WAYLAND_DISPLAY", "wayland-0"), ("MUJOCO_GL", "osmesa")]
)
def test_how_mujoco_draws_is_left_to_a_display_or_the_user(name, value, monkeypatch):
    for other in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"):
        monkeypatch.setenv(other, "")
        monkeypatch.delenv(other)
    monkeypatch.setenv(name, value)
    gym.find("CartPole-v1")
    assert os.environ.get("MUJOCO_GL") == (value if name == "MUJOCO_GL" else None)
