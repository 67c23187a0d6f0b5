"""Several runs at a time, each a process of its own."""

import dataclasses
import json
import os
import re
import signal
import sys
import time

import pytest

from hdfast import suites, sweep
from hdfast.runtime.errors import Interrupted, MissingLibraryError, OutputFullError
from hdfast.runtime.signals import StopRequest
from tests import loop_cases
from tests.loop_cases import (
    door,
    flags,
    one_thread,  # noqa: F401
    start,
)


def jobs(tmp_path, *bodies):
    """Sweep jobs that run pieces of Python in place of training."""
    return [
        sweep.Job(f"job {i}", (sys.executable, "-c", body), tmp_path / f"{i}" / "train.log")
        for i, body in enumerate(bodies)
    ]


def test_sweep_makes_a_job_of_every_task_and_seed(tmp_path):
    suite = suites.get("atari100k")
    made = sweep.jobs_of(suite, suite.tasks[:2], range(3, 5), ["--size", "tiny"], tmp_path)
    assert [job.name for job in made] == ["Alien seed 3", "Amidar seed 3", "Alien seed 4", "Amidar seed 4"]
    flags_of_train = ("--suite", "atari100k", "--task", "Amidar", "--seed", "3", "--size", "tiny")
    assert made[1].command == (sys.executable, "-m", "hdfast.train", *flags_of_train)
    assert made[1].log == tmp_path / "atari100k" / "Amidar" / "seed3" / "train.log"


def test_sweep_runs_so_many_at_a_time_and_lists_failures(tmp_path):
    meet = """
import pathlib, sys, time
mine, other = map(pathlib.Path, sys.argv[1:3])
mine.touch()
for _ in range(6000):  # one of the two could end well without the other running, both could not
    if other.exists():
        break
    time.sleep(0.01)
else:
    sys.exit("alone for a minute")
"""
    codes = [0, 4, 0, 0, 2]
    killed = [f"import os; os.kill(os.getpid(), {signum})" for signum in (9, 40)]
    made = jobs(tmp_path, *(f"raise SystemExit({code})" for code in codes), *killed)
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    for i, files in enumerate([(here, there), (there, here)]):
        command = (*made[i].command[:2], f"{meet}\n{made[i].command[2]}", *files)
        made[i] = dataclasses.replace(made[i], command=command)
    running, said = [0], []

    class Watching(sweep.LocalPool):
        def start(self, job, slot):
            running.append(running[-1] + 1)
            return super().start(job, slot)

        def poll(self, handle):
            code = super().poll(handle)
            if code is not None:
                running.append(running[-1] - 1)
            return code

    with StopRequest() as stop:
        failed = sweep.run(Watching(2), made, 2, stop, said.append)
    assert failed == {"job 1": 4, "job 4": 2, "job 5": -9, "job 6": -40}
    assert max(running) == 2
    assert len(said) == 14
    assert said[0] == f"[1/7] job 0: started, output in {tmp_path / '0' / 'train.log'}"
    assert sorted(line.rpartition(" after ")[0] for line in said if " after " in line) == [
        "[1/7] job 0: done",
        "[2/7] job 1: exit code 4",
        "[3/7] job 2: done",
        "[4/7] job 3: done",
        "[5/7] job 4: exit code 2",
        "[6/7] job 5: ended by SIGKILL",
        "[7/7] job 6: ended by signal 40",
    ]
    assert made[0].log.read_text().startswith("$ ")


def test_sweep_gives_each_run_its_device_and_its_share_of_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    body = """
import os, sys
alone = os.getpgrp() == os.getpid()  # Ctrl-C at the terminal reaches the sweep alone, which passes it on
print(sys.argv[1:], os.environ['OMP_NUM_THREADS'], alone)
"""
    made = jobs(tmp_path, *[body] * 5)
    with StopRequest() as stop:
        assert sweep.run(sweep.LocalPool(3, ["cuda:0", "cuda:1"]), made[:3], 3, stop, lambda line: None) == {}
    told = [job.log.read_text().splitlines()[-1] for job in made[:3]]
    assert told == [f"['--device', 'cuda:{i}'] 2 True" for i in (0, 1, 0)]
    with StopRequest() as stop:  # narrow networks gain nothing from more threads
        sweep.run(sweep.LocalPool(3, threads=1), made[4:], 3, stop, lambda line: None)
    assert made[4].log.read_text().splitlines()[-1] == "[] 1 True"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # asked for
    with StopRequest() as stop:
        sweep.run(sweep.LocalPool(3, threads=1), made[3:4], 3, stop, lambda line: None)
    assert made[3].log.read_text().splitlines()[-1] == "[] 5 True"


def test_sweep_passes_a_signal_on_once_and_waits(tmp_path):
    body = """
import signal, sys, time
def save(signum, frame):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(0.5)
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""
    made = jobs(tmp_path, body, body, body)
    said = []
    with StopRequest() as stop:

        class Stopping(sweep.LocalPool):
            def poll(self, handle):
                if not stop and all("ready" in job.log.read_text() for job in made[:2]):
                    os.kill(os.getpid(), signal.SIGINT)
                return super().poll(handle)

        with pytest.raises(Interrupted) as error:
            sweep.run(Stopping(2), made, 2, stop, said.append)
    assert error.value.exit_code == 130
    assert "stopping 2 runs, each with a checkpoint" in said
    assert [job.log.read_text().splitlines()[-1] for job in made[:2]] == ["saved", "saved"]
    assert not made[2].log.exists()  # never begun


def test_the_runs_of_a_sweep_that_is_killed_save_themselves_and_end(tmp_path):
    body = """
import signal, sys, time
def save(signum, frame):
    print("saved by", signal.Signals(signum).name, flush=True)
    sys.exit(129)
signal.signal(signal.SIGHUP, save)
print("ready", flush=True)
time.sleep(60)
"""
    (made,) = jobs(tmp_path, body)
    code = f"""
import signal
from pathlib import Path
from hdfast import sweep
from hdfast.runtime.signals import StopRequest
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
job = sweep.Job("job", {made.command!r}, Path({str(made.log)!r}))
with StopRequest() as stop:
    sweep.run(sweep.LocalPool(1), [job], 1, stop, print)
"""

    def told(what):
        end = time.monotonic() + 60
        while not (made.log.exists() and made.log.read_text().endswith(what)):
            assert time.monotonic() < end, what
            time.sleep(0.05)

    with start([], program=("-c", code)) as process:
        told("ready\n")
        process.kill()
    told("saved by SIGHUP\n")


@pytest.mark.parametrize("error", [BrokenPipeError(), OutputFullError("no room")], ids=["closed", "full"])
def test_sweep_stops_its_runs_when_what_it_says_cannot_be_written(tmp_path, error):
    made = jobs(tmp_path, *["import time; time.sleep(60)"] * 2)
    said = []

    def say(line):
        said.append(line)
        raise error

    with StopRequest() as stop, pytest.raises(type(error)):
        sweep.run(sweep.LocalPool(2), made, 2, stop, say)
    assert [line.partition(" after ")[0] for line in said] == [
        f"[1/2] job 0: started, output in {made[0].log}",
        "stopping 1 run, each with a checkpoint",
        "[1/2] job 0: ended by SIGTERM",
    ]


def test_sweep_stops_its_runs_when_one_cannot_be_started(tmp_path):
    (tmp_path / "1").touch()  # in place of a directory
    made = jobs(tmp_path, "import time; time.sleep(60)", "pass")
    said = []
    with StopRequest() as stop, pytest.raises(sweep.RunError, match="cannot write the log"):
        sweep.run(sweep.LocalPool(2), made, 2, stop, said.append)
    assert said[1:] == ["stopping 1 run, each with a checkpoint", said[2]]
    assert said[2].startswith("[1/2] job 0: ended by SIGTERM after")


def test_the_door_of_sweep(tmp_path, monkeypatch, capfd):
    """Real training processes: two seeds that work, then a run with an invalid flag, reported at the end."""
    train_flags = [*flags(agent_steps=12)[2:], "--logdir", str(tmp_path)]
    monkeypatch.setenv("PYTHONPATH", loop_cases.PYTHONPATH)
    pools, pool = [], sweep.LocalPool
    monkeypatch.setattr(
        sweep, "LocalPool", lambda *args, threads: pools.append(threads) or pool(*args, threads=threads)
    )
    argv = ["--suite", "demo", "--seeds", "2", "--seed", "4", "--jobs", "2", "--", *train_flags]
    code, out, err = door(sweep.main, argv, monkeypatch, capfd)
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith("[1/2] Catch seed 4: started, output in")
    row = next(line for line in out.splitlines() if line.strip().startswith("Catch")).split()
    assert row[:2] == ["Catch", "2"]
    for seed in (4, 5):
        log = tmp_path / "demo" / "Catch" / f"seed{seed}" / "train.log"
        assert "agent_steps=12/12 done=100.0%" in log.read_text()
        assert json.loads((log.parent / "config.json").read_text())["config"]["seed"] == seed
    assert pools == [1]  # the demo is narrow
    argv = ["--suite", "demo", "--seeds", "1", "--", *train_flags, "--device", "cuda:7"]
    code, out, err = door(sweep.main, argv, monkeypatch, capfd)
    assert (code, out) == (2, "")  # before a run begins
    assert err.startswith("error: --device: ")
    argv = ["--suite", "demo", "--seed", "4", "--seeds", "1", "--", *train_flags, "--rssm.unimix", "0.02"]
    code, out, err = door(sweep.main, argv, monkeypatch, capfd)
    assert code == 1  # the line that says what is wrong, and the first difference below it
    assert err.splitlines()[0] == "error: 1 of 1 runs failed"
    assert re.search(r"seed4: this run has another config.* \(rssm\.unimix: .*\)$", err.splitlines()[1]), err


def test_sweep_tells_what_is_wrong_in_one_line(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "ray", None)
    for argv, code, text in (
        (["--suit", "demo"], 2, "there is no option --suit; did you mean '--suite'"),
        (["--suite", "dmo"], 2, "no suite 'dmo'; did you mean 'demo'"),
        (["--suite", "demo", "--tasks", "Pong"], 2, "no task 'Pong' in suite demo"),
        (["--task", "Pong,Pnog"], 2, "no task 'Pnog' in suite atari100k"),
        (
            ["--suite", "gym", "--tasks", "CartPole-v9"],
            2,
            "no environment 'CartPole-v9' is registered with gymnasium; did",
        ),
        (["--suite", "demo", "--jobs", "0"], 2, "argument --jobs: 0 is out of range"),
        (["--agent-steps", "5"], 2, "--agent-steps is a flag of hdfast.train; put it behind --"),
        (["--log.no-tensorboard"], 2, "--log.no-tensorboard is a flag of hdfast.train; put it behind --"),
        (["--config=x.json"], 2, "--config is a flag of hdfast.train; put it behind --"),
        (["--", "--task", "Pong"], 2, "--task cannot come after --"),
        (["--suite", "demo", "--", "--logdir", ""], 2, "--logdir needs a value, got an empty one"),
        (["--seed", "2147483647", "--seeds", "2"], 2, "--seed 2147483647 --seeds 2 ends at seed"),
        (["--", "--rssm.detr", "3"], 2, "there is no option --rssm.detr; did you mean '--rssm.deter'"),
        (["--suite", "demo", "--devices", "cpu", "tpu"], 2, "--device: no device 'tpu'; did you mean 'cpu'"),
        (["--ray", "auto", "--devices", "cuda:0"], 2, "--devices has no effect with --ray; ray hands out"),
        (["--ray", "auto"], 6, "--ray needs ray; pip install 'ray>=2.40,<3'"),
    ):
        got, out, err = door(sweep.main, argv, monkeypatch, capfd)
        assert (got, out) == (code, "")
        assert err.startswith(f"error: {text}")
        assert err.count("\n") == 1
    with pytest.raises(MissingLibraryError):
        sweep.RayPool("auto")


@pytest.mark.slow
def test_sweep_on_ray(tmp_path):
    ray = pytest.importorskip("ray", reason="the extra `cluster` is not installed")
    made = jobs(tmp_path, "print('ran')", "raise SystemExit(3)")
    pool = sweep.RayPool("local")
    try:
        with StopRequest() as stop:
            assert sweep.run(pool, made, 2, stop, lambda line: None) == {"job 1": 3}
        assert made[0].log.read_text().splitlines()[1] == "ran"
        body = "import time; print('ready', flush=True); time.sleep(120)"
        (job,) = jobs(tmp_path / "stop", body)
        with StopRequest() as stop:

            class Stopping:
                start, stop = staticmethod(pool.start), staticmethod(pool.stop)

                def poll(self, handle):
                    if not stop and job.log.exists() and "ready" in job.log.read_text():
                        os.kill(os.getpid(), signal.SIGTERM)
                    return pool.poll(handle)

            began = time.monotonic()
            with pytest.raises(Interrupted):
                sweep.run(Stopping(), [job], 1, stop, lambda line: None)
            assert time.monotonic() - began < 60
    finally:
        ray.shutdown()
