"""Runs that take a second: a tiny agent on Catch or on a scripted environment, in this process or in another.

Axes: N environments.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdfast import loop, session, suites
from hdfast.agent.learner import Learner
from hdfast.config import Config, default_config, validate
from hdfast.envs.base import ArraySpec, BatchEnv, DiscreteActions, EnvStep
from hdfast.overrides import apply_overrides
from hdfast.runtime import checkpoint, entry
from hdfast.runtime.checkpoint import Checkpoint
from tests.agent_cases import on_one_thread

PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
PYTHONPATH = os.pathsep.join(
    filter(None, sys.path)
)  # other processes import from the same places as this one

# Learning begins at 10 agent steps (two environments, windows of four rows); then one update every two.
TINY: dict[str, Any] = {
    "device": "cpu",
    "precision": "float32",
    "agent_steps": 40,
    "env": {"num_envs": 2},
    "replay": {"capacity": 1000, "batch": 2, "length": 4},
    "train": {"ratio": 4.0, "prefill": 4},
    "rssm": {"deter": 16, "units": 16, "stoch": 2, "classes": 4},
    "network": {"units": 16, "layers": 1, "depth": 4, "mlp_layers": 1, "mlp_units": 16, "bins": 15},
    "behavior": {"horizon": 2},
    "eval": {"every": 0, "episodes": 2, "num_envs": 2},
    "log": {"every": 20, "video_every": 0, "tensorboard": False},
    "checkpoint": {"seconds": 1e9},
}


one_thread = pytest.fixture(on_one_thread, autouse=True)  # for each test: a run sets the number


def tiny(logdir: Path, **overrides: Any) -> Config:
    """A config of the demo suite with TINY and nested overrides on top."""
    config = apply_overrides(default_config("demo"), TINY)
    return validate(apply_overrides(config, {"logdir": logdir, "task": "Catch", **overrides}))


def train(config: Config) -> dict[str, Any]:
    """Does the run of a config as `hdfast.train` does."""
    return loop.run(config)


def path_of(config: Config) -> Path:
    return config.logdir / config.suite / config.task / f"seed{config.seed}"


def saved(config: Config) -> Checkpoint:
    """The newest checkpoint."""
    found = checkpoint.load_latest(path_of(config) / "checkpoints")
    assert found is not None
    return found


def open_files(directory: Path) -> list[str]:
    """The files below a directory that this process has open."""
    paths = [os.path.realpath(descriptor) for descriptor in Path("/proc/self/fd").iterdir()]
    return [path for path in paths if Path(path).is_relative_to(directory.resolve())]


def lines(config: Config, name: str, **equal: Any) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl or scores.jsonl in which these columns have these values."""
    rows = [json.loads(line) for line in (path_of(config) / f"{name}.jsonl").read_text().splitlines()]
    return [row for row in rows if all(row[key] == value for key, value in equal.items())]


def differing(a: Checkpoint, b: Checkpoint) -> set[str]:
    """Names of the tensors and meta that are not bit-identical, except times."""
    keys = a.tensors.keys() | b.tensors.keys()
    wrong = {
        k for k in keys if k not in a.tensors or k not in b.tensors or not a.tensors[k].equal(b.tensors[k])
    }
    meta = (a.meta.keys() | b.meta.keys()) - {"seconds"}
    return wrong | {k for k in meta if a.meta.get(k) != b.meta.get(k)}


def assert_one_history(config: Config, updates: int = 15) -> None:
    """Checks that the logs of a finished run read as if it had never been stopped."""
    metrics, scores = lines(config, "metrics"), lines(config, "scores")
    steps = [line["agent_steps"] for line in metrics]
    assert steps == sorted(set(steps))
    assert steps[-1] == 40
    assert [line["updates"] for line in metrics] == sorted(line["updates"] for line in metrics)
    told = [line["agent_steps"] for line in scores]
    assert told == sorted(told)
    seconds = [line["seconds"] for line in metrics]
    assert seconds == sorted(seconds)
    evaluations = [line["agent_steps"] for line in scores if line["kind"] == "evaluation"]
    assert evaluations == sorted(set(evaluations))
    assert evaluations[-1] == 40
    for episode in (line for line in scores if line["kind"] == "episode"):
        assert 0 < episode["length"] < 10
    final = saved(config)
    assert final.meta["agent_steps"] == 40
    assert int(final.tensors["learner.updates"]) == updates
    assert int(final.tensors["replay.rows_added"]) == 20
    assert json.loads((path_of(config) / "finished.json").read_text())["summary"]["updates"] == updates


def stop_in(monkeypatch: pytest.MonkeyPatch, update: int, signum: int = signal.SIGTERM) -> list[int]:
    """Sends this process a signal in that update; returns a list that gets an entry for every update."""
    step, seen = Learner.step, []

    def interrupted(self: Learner, sample: Any) -> None:
        step(self, sample)
        seen.append(signum)
        if len(seen) == update:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(Learner, "step", interrupted)
    return seen


def flags(**overrides: Any) -> list[str]:
    """TINY and nested overrides as flags of `hdfast.train`."""
    config = apply_overrides(apply_overrides(default_config("demo"), TINY), overrides)
    given = ["--suite", "demo"]
    for section, value in {**TINY, **overrides}.items():
        for key in {**TINY.get(section, {}), **value} if isinstance(value, dict) else [None]:
            entry = getattr(config, section) if key is None else getattr(getattr(config, section), key)
            name = section if key is None else f"{section}.{key}"
            if isinstance(entry, bool):
                head, _, tail = name.rpartition(".")
                given += [f"--{head}.{'' if entry else 'no-'}{tail}".replace("_", "-")]
            else:
                given += [f"--{name}".replace("_", "-"), str(entry)]
    return given


def door(
    main: Callable[[], int | None], argv: list[str], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command's `main`, called with these arguments."""
    monkeypatch.setattr(sys, "argv", ["door", *argv])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        entry.main(main)
    out, err = capfd.readouterr()
    return stop.value.code, out, err


def start(
    argv: list[str],
    *,
    program: Sequence[str] = ("-m", "hdfast.train"),
    streams: Mapping[str, int] = PIPES,
    **options: Any,
) -> subprocess.Popen[str]:
    """Starts `python -m hdfast.train`, or another `program`, as a process with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
    command = [sys.executable, *program, *argv]
    return subprocess.Popen(command, env=environment, text=True, **streams, **options)


class Scripted(BatchEnv):
    """Environment n has episodes of 3 + n rows after the reset row; every second one ends by a time limit.

    A row says where it comes from: every pixel is the row's number (rows since the first reset, modulo 256), and
    the reward is that number plus 1/100 of the first component of the action that led to it. `events` keeps the
    order of calls, `sent` the actions.
    """

    source = "scripted"

    def __init__(
        self, num_envs: int = 2, *, actions: Any = None, state: bool = False, events: list[str] | None = None
    ) -> None:
        image, vector = ArraySpec((8, 8, 3), np.uint8), ArraySpec((2,), np.float32)
        super().__init__(
            "scripted",
            num_envs=num_envs,
            obs_specs={"state": vector} if state else {"image": image},
            actions=actions or DiscreteActions(3),
            action_repeat=1,
        )
        self.events = [] if events is None else events
        self.sent: list[np.ndarray] = []
        self.rows: list[EnvStep] = []
        self._lengths = 3 + np.arange(num_envs)
        self._number = 0

    def _reset(self) -> EnvStep:
        self._age = np.zeros(self.num_envs, np.int64)
        self._episode = np.zeros(self.num_envs, np.int64)
        return self._row(np.zeros(self.num_envs, np.float32))

    def _send(self, action: np.ndarray) -> None:
        self.events.append("send")
        self.sent.append(action.copy())

    def _recv(self) -> EnvStep:
        self.events.append("recv")
        over = self._age == self._lengths
        self._age = np.where(over, 0, self._age + 1)
        self._episode += over
        self._number += 1
        first = self.sent[-1].reshape(self.num_envs, -1)[:, 0]
        reward = np.where(over, 0, self._number + first / 100)
        return self._row(reward.astype(np.float32))

    def _row(self, reward: np.ndarray) -> EnvStep:
        is_last = self._age == self._lengths
        number = np.full(self.num_envs, self._number % 256)
        image = np.broadcast_to(number[:, None, None, None], (self.num_envs, 8, 8, 3)).astype(np.uint8)
        state = np.stack([number, self._age], 1).astype(np.float32)
        step = EnvStep(
            obs={"state": state} if "state" in self.obs_specs else {"image": image},
            reward=reward,
            is_first=self._age == 0,
            is_last=is_last,
            is_terminal=is_last & (self._episode % 2 == 0),
            info={"success": is_last},
        )
        self.rows.append(step)
        return step

    def _close(self) -> None:
        self.events.append("close")


def script(monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, list[Scripted]]:
    """Gives every run Scripted environments; returns those made, by stream ("train", "eval")."""
    made: dict[str, list[Scripted]] = {}

    def make(config: Config, task: suites.Task, *, num_envs: int, stream: str, **_: Any) -> Scripted:
        made.setdefault(stream, []).append(Scripted(num_envs, **options))
        return made[stream][-1]

    monkeypatch.setattr(session, "make_envs", make)
    return made
