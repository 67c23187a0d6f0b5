"""Several runs at a time, each a process of its own."""

import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from hdfast import jobs
from hdfast.runtime import tethered
from hdfast.runtime.errors import Interrupted, OutputFullError, RunError
from hdfast.runtime.signals import StopRequest
from tests.loop_cases import (
    one_thread,  # noqa: F401
    start,
)


def pieces(tmp_path, *bodies):
    """Jobs that run pieces of Python in place of training."""
    return [
        jobs.Job(f"job {i}", (sys.executable, "-c", body), tmp_path / f"{i}" / "train.log")
        for i, body in enumerate(bodies)
    ]


def test_so_many_run_at_a_time_and_failures_are_listed(tmp_path):
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
    made = pieces(tmp_path, *(f"raise SystemExit({code})" for code in codes), *killed)
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    for i, files in enumerate([(here, there), (there, here)]):
        command = (*made[i].command[:2], f"{meet}\n{made[i].command[2]}", *files)
        made[i] = dataclasses.replace(made[i], command=command)
    running, said = [0], []

    class Watching(jobs.LocalPool):
        def start(self, job, slot):
            running.append(running[-1] + 1)
            return super().start(job, slot)

        def poll(self, handle):
            code = super().poll(handle)
            if code is not None:
                running.append(running[-1] - 1)
            return code

    with StopRequest() as stop:
        failed = jobs.run(Watching(2), made, 2, stop, said.append)
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


def test_each_job_gets_its_device_and_its_share_of_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    body = """
import os, sys
alone = os.getpgrp() == os.getpid()  # Ctrl-C at the terminal reaches the sweep alone, which passes it on
print(sys.argv[1:], os.environ['OMP_NUM_THREADS'], alone)
"""
    made = pieces(tmp_path, *[body] * 6)
    with StopRequest() as stop:
        assert jobs.run(jobs.LocalPool(3, ["cuda:0", "cuda:1"]), made[:3], 3, stop, lambda line: None) == {}
    told = [job.log.read_text().splitlines()[-1] for job in made[:3]]
    assert told == [f"['--device', 'cuda:{i}'] 2 True" for i in (0, 1, 0)]
    with StopRequest() as stop:  # narrow networks gain nothing from more threads
        jobs.run(jobs.LocalPool(3, threads=1), made[4:5], 3, stop, lambda line: None)
        jobs.run(jobs.LocalPool(9), made[5:], 9, stop, lambda line: None)  # less than a core for each
    assert [job.log.read_text().splitlines()[-1] for job in made[4:]] == ["[] 1 True"] * 2
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # asked for
    with StopRequest() as stop:
        jobs.run(jobs.LocalPool(3, threads=1), made[3:4], 3, stop, lambda line: None)
    assert made[3].log.read_text().splitlines()[-1] == "[] 5 True"


def test_a_log_begins_with_the_command_and_goes_on_where_it_ended(tmp_path, monkeypatch):
    """What is typed at the terminal is not for a job: one that reads it finds its end."""
    (made,) = pieces(tmp_path, "import sys; print(repr(sys.stdin.read()))")
    before, popen = [], subprocess.Popen

    def begin(*args, **options):
        before.append(made.log.read_text().splitlines())
        return popen(*args, **options)

    monkeypatch.setattr(subprocess, "Popen", begin)
    (ours, typed), terminal = os.pipe(), os.dup(0)
    os.write(typed, b"typed\n")
    os.close(typed)
    os.dup2(ours, 0)
    try:
        with StopRequest() as stop:
            for _ in range(2):
                jobs.run(jobs.LocalPool(1), [made], 1, stop, lambda line: None)
    finally:
        os.dup2(terminal, 0)
        os.close(terminal)
        os.close(ours)
    said = made.log.read_text().splitlines()
    assert said[1::2] == ["''"] * 2
    assert before == [said[:1], said[:3]]
    assert said[0] == said[2] == f"$ {shlex.join(made.command)}"


def test_no_job_is_begun_once_a_stop_is_requested(tmp_path):
    began = []

    class Stopping:
        def start(self, job, slot):
            began.append(job.name)
            if len(began) == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        def poll(self, handle):
            return 0

        def stop(self, handle):
            pass

    with StopRequest() as stop, pytest.raises(Interrupted):
        jobs.run(Stopping(), pieces(tmp_path, "", "", ""), 2, stop, lambda line: None)
    assert began == ["job 0"]


def test_a_signal_is_passed_on_once_and_the_jobs_waited_for(tmp_path):
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
    made = pieces(tmp_path, body, body, body)
    said = []
    with StopRequest() as stop:

        class Stopping(jobs.LocalPool):
            def poll(self, handle):
                if not stop and all("ready" in job.log.read_text() for job in made[:2]):
                    os.kill(os.getpid(), signal.SIGINT)
                return super().poll(handle)

        with pytest.raises(Interrupted) as error:
            jobs.run(Stopping(2), made, 2, stop, said.append)
    assert error.value.exit_code == 130
    assert "stopping 2 runs, each with a checkpoint" in said
    assert [job.log.read_text().splitlines()[-1] for job in made[:2]] == ["saved", "saved"]
    assert not made[2].log.exists()  # never begun


def test_jobs_whose_pool_is_killed_save_themselves_and_end(tmp_path):
    body = """
import signal, sys, time
def save(signum, frame):
    print("saved by", signal.Signals(signum).name, flush=True)
    sys.exit(129)
signal.signal(signal.SIGHUP, save)
print("ready", flush=True)
time.sleep(60)
"""
    (made,) = pieces(tmp_path, body)
    code = f"""
import signal
from pathlib import Path
from hdfast import jobs
from hdfast.runtime.signals import StopRequest
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
job = jobs.Job("job", {made.command!r}, Path({str(made.log)!r}))
with StopRequest() as stop:
    jobs.run(jobs.LocalPool(1), [job], 1, stop, print)
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


def test_a_command_does_not_begin_when_who_began_it_is_gone():
    """It may end while Python starts; here another process is named, as if it had."""
    command = [sys.executable, "-I", tethered.__file__, "1", sys.executable, "-c", "print('ran')"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGHUP, "")


def test_a_command_begins_as_it_would_by_itself():
    """With the same signals ignored, of which Python has some of its own, but for SIGHUP, which `nohup` ignores.

    Those of the C library itself do not count.
    """
    counted = sum(1 << (signum - 1) for signum in signal.valid_signals() - {signal.SIGHUP})
    show = ["grep", "SigIgn", "/proc/self/status"]
    tied = [sys.executable, "-I", tethered.__file__, str(os.getpid()), *show]
    told = [subprocess.run(one, capture_output=True, text=True, check=True).stdout for one in (show, tied)]
    alone, held = (int(line.split()[1], 16) for line in told)
    assert held & counted == alone & counted
    assert not held & 1 << (signal.SIGHUP - 1)


@pytest.mark.parametrize("error", [BrokenPipeError(), OutputFullError("no room")], ids=["closed", "full"])
def test_jobs_are_stopped_when_what_is_said_cannot_be_written(tmp_path, error):
    made = pieces(tmp_path, *["import time; time.sleep(60)"] * 2)
    said = []

    def say(line):
        said.append(line)
        raise error

    with StopRequest() as stop, pytest.raises(type(error)):
        jobs.run(jobs.LocalPool(2), made, 2, stop, say)
    assert [line.partition(" after ")[0] for line in said] == [
        f"[1/2] job 0: started, output in {made[0].log}",
        "stopping 1 run, each with a checkpoint",
        "[1/2] job 0: ended by SIGTERM",
    ]


def test_jobs_are_stopped_when_one_cannot_be_started(tmp_path):
    (tmp_path / "1").touch()  # in place of a directory
    made = pieces(tmp_path, "import time; time.sleep(60)", "pass")
    said = []
    with StopRequest() as stop, pytest.raises(RunError, match="cannot write the log"):
        jobs.run(jobs.LocalPool(2), made, 2, stop, said.append)
    assert said[1:] == ["stopping 1 run, each with a checkpoint", said[2]]
    assert said[2].startswith("[1/2] job 0: ended by SIGTERM after")


@pytest.mark.slow
def test_jobs_on_ray(tmp_path):
    ray = pytest.importorskip("ray", reason="the extra `cluster` is not installed")
    made = pieces(tmp_path, "print('ran')", "raise SystemExit(3)")
    pool = jobs.RayPool("local")
    try:
        with StopRequest() as stop:
            assert jobs.run(pool, made, 2, stop, lambda line: None) == {"job 1": 3}
        assert made[0].log.read_text().splitlines()[1] == "ran"
        body = "import time; print('ready', flush=True); time.sleep(120)"
        (job,) = pieces(tmp_path / "stop", body)
        with StopRequest() as stop:

            class Stopping:
                start, stop = staticmethod(pool.start), staticmethod(pool.stop)

                def poll(self, handle):
                    if not stop and job.log.exists() and "ready" in job.log.read_text():
                        os.kill(os.getpid(), signal.SIGTERM)
                    return pool.poll(handle)

            began = time.monotonic()
            with pytest.raises(Interrupted):
                jobs.run(Stopping(), [job], 1, stop, lambda line: None)
            assert time.monotonic() - began < 60
    finally:
        ray.shutdown()
