"""A run goes on from wherever it was stopped: killed, interrupted, with a damaged checkpoint, in another place.

A process that is killed leaves its directory as it is at that moment, so a copy of the directory taken in the
midst of a run is a killed run; the last test kills real processes.
"""

import itertools
import json
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch

from hdfast import loop, session, suites, train
from hdfast.replay import Replay
from hdfast.runtime import checkpoint
from hdfast.runtime.errors import CheckpointError, Interrupted, RunError
from hdfast.runtime.logger import Logger
from hdfast.runtime.rundir import RunDir
from tests import loop_cases
from tests.loop_cases import (
    assert_one_history,
    differing,
    door,
    flags,
    lines,
    one_thread,  # noqa: F401
    path_of,
    saved,
    script,
    stop_in,
    tiny,
)


def open_session(config):
    """The session of a run that is not running, with its directory."""
    task = suites.get(config.suite).task(config.task)
    rundir = RunDir.open(config.logdir, config.suite, task.name, config.seed, config.to_dict())
    return loop.Session(
        config, suites.get(config.suite), task, rundir, torch.device("cpu"), loop.StopRequest()
    ), rundir


def contents(session):
    """Everything a session has learnt and seen, as tensors; the rows of the replay included."""
    replay = session.replay
    state = {f"learner.{k}": v.clone() for k, v in session.learner.state_dict().items()}
    state |= {f"replay.{k}": v.clone() for k, v in replay.state_dict().items()}
    state["policy.generator"] = session.policy.generator.get_state()
    rows = min(replay.rows_added, replay.ring)
    starts = torch.arange(replay.num_envs) * replay.ring + (replay.rows_added - rows) % replay.ring
    state |= {f"rows.{k}": v for k, v in replay.gather(starts, rows).items()} if rows else {}
    counters = (session.agent_steps, session.learning_from, session.evaluated_at, session.evaluation)
    return state, counters


def test_what_is_restored_is_what_was_saved(tmp_path, monkeypatch):
    config = tiny(tmp_path, train={"ratio": 8.0}, replay={"capacity": 30})  # the ring has wrapped around
    before = []
    save = loop.Session._save

    def spy(self):
        save(self)
        before.append(contents(self))

    monkeypatch.setattr(loop.Session, "_save", spy)
    stop_in(monkeypatch, 21)
    with pytest.raises(Interrupted):
        loop_cases.train(config)
    state, counters = before[-1]
    assert counters[:2] == (32, 10)  # during the first of the two updates after 32 agent steps
    session, rundir = open_session(config)
    with session, rundir:
        again, counters_again = contents(session)
        assert again.keys() == state.keys()
        assert {k for k in state if not torch.equal(state[k], again[k])} == set()
        assert counters_again == counters
        assert int(again["learner.updates"]) == 21
        assert again["rows.image"].shape[0] == 15
        # it draws what the other would have drawn
        drawn = session.replay.sample(2, 4)["starts"], session.learner.uniform(3)
    session, rundir = open_session(config)
    with session, rundir:
        for a, b in zip(
            drawn, (session.replay.sample(2, 4)["starts"], session.learner.uniform(3)), strict=True
        ):
            assert torch.equal(a, b)


def killed(monkeypatch, where, config, calls):
    """Copies of the run's directory, taken before and after these calls (from 0) of `where` = (owner, function)."""
    copies, number = [], itertools.count()
    owner, name = where
    inner = getattr(owner, name)

    def spied(*args, **kwargs):
        if next(number) not in calls:
            return inner(*args, **kwargs)
        copy()
        try:
            return inner(*args, **kwargs)
        finally:
            copy()

    def copy():
        copies.append(config.logdir.with_name(f"{name}{len(copies)}"))
        shutil.copytree(config.logdir, copies[-1])

    monkeypatch.setattr(owner, name, spied)
    return copies


@pytest.mark.parametrize(
    ("where", "calls"),
    [
        ((loop.Session, "_evaluate"), (0, 1, 2)),
        ((Logger, "sync"), (0, 2, 6)),
        ((Replay, "flush"), (0, 3, 6)),
        ((checkpoint, "numbered"), (2, 4, 8)),  # the checkpoint is written, the oldest not yet removed
        ((RunDir, "mark_finished"), (0,)),
    ],
    ids=["evaluate", "sync", "flush", "checkpoint", "finish"],
)
def test_killed_at_any_moment_it_resumes_with_one_history(tmp_path, monkeypatch, where, calls):
    settings = {"eval": {"every": 15}, "checkpoint": {"seconds": 3}}
    script(monkeypatch)
    # A step takes a second by this clock: there is a checkpoint at every third and one at the end, seven together.
    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    config = tiny(tmp_path / "runs", **settings)
    with monkeypatch.context() as patch:
        copies = killed(patch, where, config, calls)
        loop_cases.train(config)
    assert len(copies) == 2 * len(calls)
    assert_one_history(config)
    for copy in copies:
        again = tiny(copy, **settings)
        loop_cases.train(again)
        assert_one_history(again)


def test_a_run_killed_at_its_last_line_of_metrics_has_that_line(tmp_path, monkeypatch):
    """It is written before the checkpoint of that step, or again after the one before."""
    script(monkeypatch)
    settings = {"log": {"every": 15}, "checkpoint": {"seconds": 0}}
    config = tiny(tmp_path / "runs", **settings)
    with monkeypatch.context() as patch:
        copies = killed(patch, (loop.Session, "_log"), config, range(3))
        loop_cases.train(config)
    for run in (config, *(tiny(copy, **settings) for copy in copies)):
        loop_cases.train(run)
        assert [line["agent_steps"] for line in lines(run, "metrics")] == [16, 30, 40]
    assert len(copies) == 6


def test_an_interrupted_run_has_the_rows_and_updates_of_one_that_was_not(tmp_path, monkeypatch):
    """With scripted environments only the episodes that were cut off differ."""
    env = script(monkeypatch)
    config = tiny(tmp_path)
    with monkeypatch.context() as patch:
        stop_in(patch, 6)
        with pytest.raises(Interrupted):
            loop_cases.train(config)
    assert saved(config).meta["agent_steps"] == 22
    assert [line["agent_steps"] for line in lines(config, "metrics")] == [20]
    loop_cases.train(config)
    assert_one_history(config)
    assert [len(e.sent) for e in env["train"]] == [11, 9]
    record = json.loads((path_of(config) / "config.json").read_text())
    assert len(record["resumed"]) == 1


def test_the_environments_of_a_run_that_goes_on_are_new_ones(tmp_path, monkeypatch):
    seeds = []
    make = loop.envs.make
    monkeypatch.setattr(
        loop.envs, "make", lambda *a, seed, **k: seeds.append(seed) or make(*a, seed=seed, **k)
    )
    config = tiny(tmp_path)
    with monkeypatch.context() as patch:
        stop_in(patch, 6)
        with pytest.raises(Interrupted):
            loop_cases.train(config)
    loop_cases.train(config)
    assert len(set(seeds)) == len(seeds) == 3  # train, train again, eval


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "bit":
        data[len(data) // 2] ^= 1
    path.write_bytes(data[: len(data) // 2] if how == "cut" else b"" if how == "empty" else data)


@pytest.mark.parametrize("how", ["bit", "cut", "empty"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, monkeypatch, capfd, how):
    config = tiny(tmp_path, checkpoint={"seconds": 0})
    with monkeypatch.context() as patch:
        stop_in(patch, 6)
        with pytest.raises(Interrupted):
            loop_cases.train(config)
    newest = saved(config).path
    assert newest.name == "0000000022.safetensors"
    damage(newest, how)
    capfd.readouterr()
    loop_cases.train(config)
    out, err = capfd.readouterr()
    assert err.startswith(f"warning: {newest}: checkpoint is damaged (")
    assert len(err.splitlines()) == 1
    assert "going on at agent step 20" in out
    assert_one_history(config)


def test_when_all_checkpoints_are_damaged_nothing_is_overwritten(tmp_path, monkeypatch, capfd):
    config = tiny(tmp_path, checkpoint={"seconds": 0})
    with monkeypatch.context() as patch:
        stop_in(patch, 6)
        with pytest.raises(Interrupted):
            loop_cases.train(config)
    files = sorted((path_of(config) / "checkpoints").iterdir())
    assert len(files) == 2
    for file in files:
        damage(file, "bit")
    replay = {p: p.read_bytes() for p in (path_of(config) / "replay").iterdir()}
    code, _, err = door(
        train.main, [*flags(checkpoint={"seconds": 0}), "--logdir", str(tmp_path)], monkeypatch, capfd
    )
    assert code == CheckpointError.exit_code == 3
    assert "error: " in err
    assert "no checkpoint can be loaded" in err
    assert sorted((path_of(config) / "checkpoints").iterdir()) == files
    assert {p: p.read_bytes() for p in (path_of(config) / "replay").iterdir()} == replay


def test_another_config_is_refused_with_the_difference(tmp_path, monkeypatch, capfd):
    config = tiny(tmp_path)
    with monkeypatch.context() as patch:
        stop_in(patch, 6)
        with pytest.raises(Interrupted):
            loop_cases.train(config)
    before = saved(config)
    argv = [*flags(rssm={"deter": 8}, behavior={"horizon": 3}), "--logdir", str(tmp_path)]
    code, out, err = door(train.main, argv, monkeypatch, capfd)
    first, *details = err.splitlines()
    assert (code, out) == (2, "")
    assert first.startswith(f"error: {path_of(config)}: this run has another config; ")
    assert details == ["  rssm.deter: 16 -> 8", "  behavior.horizon: 2 -> 3"]
    assert differing(saved(config), before) == set()
    # The hint is the cure.
    cure = f"--config {path_of(config)}"
    assert f"give the saved values, as {cure} does" in first
    dry = door(train.main, [*argv, "--dry-run"], monkeypatch, capfd)[2]
    told = "the run is refused (rssm.deter: 16 -> 8, behavior.horizon: 2 -> 3)"
    assert dry == f"warning: {path_of(config)}: it has another config, and {told}\n"
    assert door(train.main, [*cure.split(), "--dry-run"], monkeypatch, capfd)[::2] == (0, "")
    shorter = [*cure.split(), "--agent-steps", "30", "--dry-run"]
    assert "refused (agent_steps: 40 -> 30)" in door(train.main, shorter, monkeypatch, capfd)[2]
    with monkeypatch.context() as patch:
        stop_in(patch, 1)
        code, out, err = door(train.main, cure.split(), monkeypatch, capfd)
    assert code == 143, err
    assert f"{path_of(config)}: going on at agent step" in out
    # Where it runs and how it reports may change; the change is recorded.
    free = {
        "log": {"every": 5},
        "precision": "auto",
        "checkpoint": {"keep": 3},
        "train": {"nonfinite_limit": 3},
    }
    loop_cases.train(tiny(tmp_path, **free))
    record = json.loads((path_of(config) / "config.json").read_text())
    assert "log.every: 20 -> 5" in record["resumed"][-1]["changed"]
    assert_one_history(config)


def test_going_on_in_another_precision_is_told(tmp_path, monkeypatch, capfd):
    config = tiny(tmp_path)
    with monkeypatch.context() as patch:
        stop_in(patch, 6)
        with pytest.raises(Interrupted):
            loop_cases.train(config)
    path = path_of(config) / "backends.json"
    how = json.loads(path.read_text())
    assert (how["precision"], how["environment"]) == ("float32", "envpool")
    capfd.readouterr()
    loop_cases.train(tiny(tmp_path, precision="bfloat16"))
    assert capfd.readouterr().err == (
        f'warning: {path_of(config)}: goes on with another precision: "float32" -> "bfloat16"\n'
    )
    assert json.loads(path.read_text())["precision"] == "bfloat16"


def test_two_processes_cannot_train_one_run(tmp_path):
    config = tiny(tmp_path)
    with (
        RunDir.open(tmp_path, "demo", "Catch", 0, config.to_dict()),
        pytest.raises(RunError, match="in use by process"),
    ):
        loop_cases.train(config)


DIE = """
import os, signal, sys
from hdfast import train
from hdfast.agent.learner import Learner
from hdfast.runtime import entry
owner, name, number = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1))
owner = {"os": os, "Learner": Learner}[owner]
inner, calls = getattr(owner, name), []
def dying(*args):
    calls.append(args)
    if len(calls) == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(*args)
setattr(owner, name, dying)
entry.main(train.main)
"""


def test_kill_9(tmp_path):
    """Real processes die before the given call of a function, each resuming what the previous one left."""
    settings = {"agent_steps": 100, "checkpoint": {"seconds": 0}, "log": {"every": 10}, "eval": {"every": 50}}
    config = tiny(tmp_path, **settings)
    argv = [*flags(**settings), "--logdir", str(tmp_path)]
    lost = f"warning: {path_of(config) / 'replay'}: deleting rows that no checkpoint was loaded for\n"
    for owner, name, number, said, begins in (
        ("os", "pwrite", 2, "", "new run"),  # call 1 writes the lock, call 2 the first rows
        ("os", "replace", 13, lost, "new run"),  # a checkpoint that is complete but for its name
        ("Learner", "step", 20, "", "going on at agent step 20"),
    ):
        process = loop_cases.start(argv, program=("-c", DIE, owner, name, str(number)))
        out, err = process.communicate(timeout=300)
        assert (process.returncode, err) == (-signal.SIGKILL, said)
        assert out.startswith(f"{path_of(config)}: {begins}")
    process = loop_cases.start(argv)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert out.startswith(f"{path_of(config)}: going on at agent step 58")
    assert "Catch" in out
    metrics, scores = lines(config, "metrics"), lines(config, "scores")
    assert [line["agent_steps"] for line in metrics] == list(range(10, 101, 10))  # none missing, none twice
    told = [line["agent_steps"] for line in scores if line["kind"] == "evaluation"]
    assert told == [50, 100]
    assert all(a <= b for a, b in itertools.pairwise(line["agent_steps"] for line in scores))
    final = saved(config)
    assert final.meta["agent_steps"] == 100
    assert int(final.tensors["learner.updates"]) == (100 - 10) // 2
    assert int(final.tensors["replay.rows_added"]) == 50
