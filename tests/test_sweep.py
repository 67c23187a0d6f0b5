"""A sweep of tasks, seeds and settings: its jobs, its messages, its table."""

import json
import re
import sys

import pytest

from hdfast import jobs, suites, sweep
from hdfast.runtime.errors import MissingLibraryError
from tests import loop_cases
from tests.loop_cases import (
    door,
    flags,
    one_thread,  # noqa: F401
)
from tests.test_report import finish


def test_sweep_makes_a_job_of_every_task_and_seed(tmp_path):
    suite = suites.get("atari100k")
    made = sweep.jobs_of(suite, suite.tasks[:2], range(3, 5), ["--size", "tiny"], tmp_path)
    assert [job.name for job in made] == ["Alien seed 3", "Amidar seed 3", "Alien seed 4", "Amidar seed 4"]
    flags_of_train = ("--suite", "atari100k", "--task", "Amidar", "--seed", "3", "--size", "tiny")
    assert made[1].command == (sys.executable, "-m", "hdfast.train", *flags_of_train)
    assert made[1].log == tmp_path / "atari100k" / "Amidar" / "seed3" / "train.log"


def test_the_door_of_sweep(tmp_path, monkeypatch, capfd):
    """Real training processes: two seeds that work, then a run with an invalid flag, reported at the end."""
    train_flags = [*flags(agent_steps=12)[2:], "--logdir", str(tmp_path)]
    monkeypatch.setenv("PYTHONPATH", loop_cases.PYTHONPATH)
    pools, pool = [], sweep.LocalPool

    def spied(at_a_time, devices, *, threads):
        pools.append((at_a_time, threads))
        return pool(at_a_time, devices, threads=threads)

    monkeypatch.setattr(sweep, "LocalPool", spied)
    argv = ["--suite", "demo", "--seeds", "2", "--seed", "4", "--jobs", "16", "--", *train_flags]
    code, out, err = door(sweep.main, argv, monkeypatch, capfd)
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith("[1/2] Catch seed 4: started, output in")
    row = next(line for line in out.splitlines() if line.strip().startswith("Catch")).split()
    assert row[:2] == ["Catch", "2"]
    for seed in (4, 5):
        log = tmp_path / "demo" / "Catch" / f"seed{seed}" / "train.log"
        assert "agent_steps=12/12 done=100.0%" in log.read_text()
        assert json.loads((log.parent / "config.json").read_text())["config"]["seed"] == seed
    assert pools == [(2, 1)]  # there are no more runs, and the demo is narrow
    argv = ["--suite", "demo", "--seeds", "1", "--", *train_flags, "--device", "cuda:7"]
    code, out, err = door(sweep.main, argv, monkeypatch, capfd)
    assert (code, out) == (2, "")  # before a run begins
    assert err.startswith("error: --device: ")
    argv = ["--suite", "demo", "--seed", "4", "--seeds", "1", "--", *train_flags, "--rssm.unimix", "0.02"]
    code, out, err = door(sweep.main, argv, monkeypatch, capfd)
    assert code == 1  # the line that says what is wrong, and the first difference below it
    assert err.splitlines()[0] == "error: 1 of 1 runs failed"
    failed = err.splitlines()[1].strip()
    assert failed.startswith("Catch seed 4: exit code 2: error: ")
    assert re.search(r"seed4: this run has another config.* \(rssm\.unimix: .*\)$", failed), err


@pytest.mark.parametrize(
    ("log", "told"),
    [
        (None, ""),
        ("", ""),
        ("$ train\nstep 1\nstep 2\n\n", "step 2"),
        ("$ train\nerror: full\n$ train\nstep 1\n", "step 1"),  # of a session before this one
        ("$ train\nerror: full\n$ train\nstep 1\n$ train\nstep 2\n", "step 2"),
        ("$ train\nerror: a loss\nerror: the disk\nend\n", "error: the disk"),
        (
            "$ train\nerror: another config\n  units: 1 -> 2\n  depth: 3 -> 4\n",
            "error: another config (units: 1 -> 2)",
        ),
    ],
    ids=["no file", "empty", "no error", "two sessions", "three sessions", "two errors", "details"],
)
def test_the_last_words_of_a_run_that_failed(log, told, tmp_path):
    file = tmp_path / "train.log"
    if log is not None:
        file.write_text(log)
    assert sweep._last_line(file) == told


def test_the_table_of_a_sweep_shows_its_own_tasks(tmp_path, monkeypatch, capfd):
    """Commas between tasks may be followed by a space, or by nothing."""
    ran = []
    monkeypatch.setattr(sweep, "run", lambda pool, jobs, *_: ran.extend(job.name for job in jobs) or {})
    for task in ("Alien", "Boxing", "Pong"):
        finish(tmp_path, task, 0, 1.0)
    argv = ["--tasks", "Pong,", "Boxing", "--seeds", "1", "--", "--logdir", str(tmp_path)]
    code, out, err = door(sweep.main, argv, monkeypatch, capfd)
    assert (code, err, ran) == (0, "", ["Pong seed 0", "Boxing seed 0"])
    assert [name for name in ("Alien", "Boxing", "Pong", "Qbert") if name in out] == ["Boxing", "Pong"]


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
        (["--agent_steps=5"], 2, "--agent_steps is a flag of hdfast.train; put it behind --"),
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
        jobs.RayPool("auto")
