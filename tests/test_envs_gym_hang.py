"""Users' own environments that never return: the run can be stopped, and none of their processes outlives it."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from hdfast.envs import gym_thread, gym_view
from hdfast.runtime import checkpoint
from hdfast.runtime.errors import Interrupted
from hdfast.runtime.signals import StopRequest
from tests import loop_cases
from tests.gym_cases import make
from tests.loop_cases import flags

PROGRAM = """
from hdfast import train
from hdfast.envs import gym_thread
from hdfast.runtime import entry
gym_thread.GRACE_SECONDS = {grace}
entry.main(train.main)
"""
SAYS = "stopping with a checkpoint; a second Ctrl-C stops it at once, without one"
STOPPED = "error: stopped by SIGINT; the same command resumes it"


def hanging(where, tmp_path, *, num_envs=2, threads=0, grace=1.0):
    """A run in a session of its own, whose environments hang by the time it is returned."""
    task = ["--suite", "gym", "--task", f"tests.gym_envs:Hangs{where.title()}-v0"]
    counts = ["--env.num-envs", str(num_envs), "--env.threads", str(threads)]
    argv = [*flags()[2:], *task, *counts, "--logdir", str(tmp_path)]
    program = ("-c", PROGRAM.format(grace=grace))
    process = loop_cases.start(argv, program=program, start_new_session=True)
    assert process.stderr.readline() == f"hangs in {where}\n"
    return process


def processes_of(process):
    """Processes of a process's session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(session) == process.pid and state != "Z":
            found.append(path.parent.name)
    return found


def left_of(process, seconds=10):
    """Processes of a session that are left after it has had time to end."""
    end = time.monotonic() + seconds
    while (left := processes_of(process)) and time.monotonic() < end:
        time.sleep(0.05)
    return left


@pytest.mark.parametrize(
    ("count", "seconds"),
    [  # the fork server included; the environments included
        (3, 0.5),
        (5, 0.3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((3, 0), (5, 0), (5, 1))),
    ],
)
def test_ctrl_c_of_a_terminal_while_the_processes_begin(tmp_path, count, seconds):
    argv = [*flags()[2:], "--suite", "gym", "--task", "tests.gym_envs:Count-v0", "--logdir", str(tmp_path)]
    process = loop_cases.start([*argv, "--agent-steps", "100000"], start_new_session=True)
    while len(processes_of(process)) < count:
        assert process.poll() is None
        time.sleep(0.005)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, f"{STOPPED}\n")
    assert not left_of(process)


def test_what_an_environment_starts_can_be_ended_by_signals():
    with make("Masked", 2, obs="state") as env:
        assert env.reset().obs["state"].tolist() == [[0], [0]]


def test_a_requested_stop_is_told_before_the_end_of_a_process():
    with StopRequest() as stop, make("Broken", 2, stop=stop.check) as env:
        env.reset()
        for _ in range(2):
            env.step(np.zeros(2, np.int32))
        stop.signum = signal.SIGINT
        with pytest.raises(Interrupted):
            env.step(np.array([2, 1], np.int32))


def test_a_script_without_a_guard_is_told_to_write_it(tmp_path):
    script = tmp_path / "script.py"
    task = ["--suite", "gym", "--task", "tests.gym_envs:Count-v0"]
    argv = [*flags()[2:], *task, "--logdir", str(tmp_path / "runs")]
    script.write_text(f"from hdfast import config, loop\nloop.run(config.parse({argv!r}))\n")
    process = loop_cases.start([], program=(str(script),), start_new_session=True)
    _, err = process.communicate(timeout=60)
    *_, last = said = err.splitlines()
    assert process.returncode == 1
    right = (
        "error: a run begins where a process of its environments imports the script; "
        'write `if __name__ == "__main__":` before what the script does'
    )
    assert {line for line in said if line.startswith("error: ")} == {right}
    assert "ConfigError: tests.gym_envs:Count-v0: the processes of its environments do not begin" in last
    assert "`if __name__ == '__main__':`" in last
    assert sum(line.startswith("Traceback") for line in said) == 1
    assert not left_of(process)


@pytest.mark.parametrize(("num_envs", "threads"), [(2, 0), (2, 1)])  # with and without processes
def test_a_signal_stops_a_run_whose_environment_hangs(tmp_path, num_envs, threads):
    process = hanging("step", tmp_path, num_envs=num_envs, threads=threads)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err.splitlines()[-1]) == (130, STOPPED)
    assert out.splitlines().count(SAYS) == 1
    path = tmp_path / "gym" / "tests.gym_envs-HangsStep-v0" / "seed0"
    assert checkpoint.load_latest(path / "checkpoints").meta["agent_steps"] == 6
    assert not left_of(process)


@pytest.mark.parametrize("threads", [0, 1])
def test_a_second_signal_stops_it_at_once(tmp_path, threads):
    process = hanging("step", tmp_path, threads=threads, grace=1000)
    process.send_signal(signal.SIGINT)
    while SAYS not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.splitlines()[-1]) == (130, "error: stopped by SIGINT")
    assert not left_of(process)


@pytest.mark.parametrize("signums", [[signal.SIGKILL], [signal.SIGTERM, signal.SIGTERM]])
def test_processes_of_environments_end_with_the_run_however_it_ends(tmp_path, signums):
    process = hanging("step", tmp_path)
    for signum in signums:
        process.send_signal(signum)
        time.sleep(0.3)
    assert process.wait(60) == -signums[-1]
    assert not left_of(process)
    process.communicate()


def outlive(path):
    """For a process of its own: notices the end of its parent only long afterwards."""
    Path(path, "began").touch()
    while multiprocessing.parent_process().is_alive():
        time.sleep(0.01)
    gym_view._end_with_parent()
    Path(path, "lives").touch()


def test_a_process_whose_run_ends_before_it_has_begun_ends_too(tmp_path):
    program = f"""
import multiprocessing, os, pathlib
from tests.test_envs_gym_hang import outlive
multiprocessing.get_context("forkserver").Process(target=outlive, args=({str(tmp_path)!r},)).start()
while not pathlib.Path({str(tmp_path)!r}, "began").exists():
    pass
os._exit(0)
"""
    process = loop_cases.start([], program=("-c", program), start_new_session=True)
    assert process.wait(60) == 0
    assert not left_of(process)
    assert [path.name for path in tmp_path.iterdir()] == ["began"]
    process.communicate()


@pytest.mark.parametrize("where", ["init", "close"])
def test_an_environment_that_hangs_where_it_is_made_or_closed(tmp_path, where):
    process = hanging(where, tmp_path, num_envs=1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err.splitlines()[-1]) == (130, STOPPED)
    assert SAYS in out
    assert not left_of(process)


@pytest.fixture
def interruptible():
    """Makes Ctrl-C a KeyboardInterrupt even if the tests run in the background of a shell, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_in_a_notebook_comes_back_from_it(monkeypatch):
    """A notebook installs no handler of signals."""
    monkeypatch.setattr(gym_thread, "GRACE_SECONDS", 0.5)
    env = make("HangsStep", 2)
    env.reset()
    for _ in range(2):
        env.step(np.zeros(2, np.int32))
    env.send(np.zeros(2, np.int32))
    threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        env.recv()
    began = time.monotonic()
    env.close()
    assert 0.5 <= time.monotonic() - began < 5
    assert not any(process.is_alive() for process in env._vector.processes)


def test_an_environment_that_is_slow_to_answer_a_stop_is_given_its_time():
    with StopRequest() as stop, make("Broken", stop=stop.check) as env:
        env.reset()
        for _ in range(2):
            env.step(np.zeros(1, np.int32))
        stop.signum = signal.SIGINT
        assert env.step(np.full(1, 2, np.int32)).reward == pytest.approx([3.02])  # after half a second
        with pytest.raises(Interrupted):
            stop.check()


def test_python_ends_where_nobody_has_closed_them():
    program = (
        "import multiprocessing\nfrom hdfast import envs\n"
        "env = envs.make('gym', 'tests.gym_envs:Count-v0', num_envs=2, seed=0)\nenv.reset()\n"
        "print(len(multiprocessing.active_children()))"
    )
    process = loop_cases.start([], program=("-c", program), start_new_session=True)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "2\n", "")
    assert not left_of(process)
