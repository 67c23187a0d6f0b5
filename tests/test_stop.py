"""A run that is asked to stop: by a signal, by its terminal, or by the reader of its output."""

import errno
import io
import os
import signal
import sys
import threading

import pytest

from hdfast import session, train
from hdfast.runtime.errors import EnvError, Interrupted, OutputFullError
from hdfast.runtime.signals import StopRequest
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

RUN_TRAIN = "from hdfast import train\nfrom hdfast.runtime import entry\nentry.main(train.main)"


@pytest.fixture(autouse=True, scope="module")
def _hears_of_its_terminal():
    """Children notice SIGHUP even if pytest was started with nohup, whose effect they would inherit."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_stops_at_the_next_step_with_a_checkpoint(tmp_path, monkeypatch, capfd, signum, code):
    config = tiny(tmp_path, train={"ratio": 40.0})  # five updates an agent step
    argv = [*flags(train={"ratio": 40.0}), "--logdir", str(tmp_path)]
    with monkeypatch.context() as patch:
        updates = stop_in(patch, 11, signum)
        got, out, err = door(train.main, argv, monkeypatch, capfd)
    assert (got, err) == (
        code,
        f"error: stopped by {signal.Signals(signum).name}; the same command resumes it\n",
    )
    assert len(updates) == 11  # it does not even finish the ten updates of its step
    assert saved(config).meta["agent_steps"] == 14
    assert int(saved(config).tensors["learner.updates"]) == 11
    assert not (path_of(config) / "finished.json").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    got, out, err = door(train.main, argv, monkeypatch, capfd)
    assert (got, err) == (0, "")
    assert "going on at agent step 14" in out
    assert_one_history(config, updates=150)


@pytest.mark.parametrize(("update", "at"), [(45, 20), (148, 40)], ids=["a step that logs", "the last step"])
def test_the_step_that_a_signal_came_in_is_ended_by_the_next_session(tmp_path, monkeypatch, update, at):
    script(monkeypatch)
    videos = []
    monkeypatch.setattr(session.Session, "_video", lambda self: videos.append(self.agent_steps))
    config = tiny(tmp_path, train={"ratio": 40.0}, log={"video_every": 20})
    with monkeypatch.context() as patch:
        stop_in(patch, update)
        with pytest.raises(Interrupted):
            loop_cases.train(config)
    assert saved(config).meta["agent_steps"] == at
    assert int(saved(config).tensors["learner.updates"]) == update
    assert loop_cases.train(config)["updates"] == 150
    assert_one_history(config, updates=150)
    assert [line["agent_steps"] for line in lines(config, "metrics")] == [20, 40]
    assert videos == [20, 40]


def test_more_steps_that_were_a_slip_are_taken_back(tmp_path, monkeypatch):
    """The run was saved before the first of these steps, with the replay of a longer run, and goes on as it was."""
    script(monkeypatch)
    config, make = tiny(tmp_path), session.make_envs

    def stops(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return make(*args, **options)

    with monkeypatch.context() as patch:
        stop_in(patch, 6)
        with pytest.raises(Interrupted):
            loop_cases.train(config)
        patch.setattr(session, "make_envs", stops)
        with pytest.raises(Interrupted):
            loop_cases.train(tiny(tmp_path, agent_steps=60))
    assert int(saved(config).tensors["replay.ring"]) == 30
    assert loop_cases.train(config)["updates"] == 15
    assert_one_history(config)


def test_a_run_in_a_thread_hears_of_no_signal(tmp_path):
    """Only the main thread can have handlers."""
    summaries, config = [], tiny(tmp_path, agent_steps=8)
    thread = threading.Thread(target=lambda: summaries.append(loop_cases.train(config)))
    thread.start()
    thread.join()
    assert summaries[0]["episodes"] == config.eval.episodes


def test_what_a_signal_says_and_a_second_does():
    said = []
    with StopRequest() as stop:
        stop.say = said.append
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted):
            stop.check()
        os.kill(os.getpid(), signal.SIGHUP)  # further signals change nothing
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):  # whoever caught the first one gets it again
            stop.check()
    assert said == ["stopping with a checkpoint; a second Ctrl-C stops it at once, without one"]
    with StopRequest() as stop:
        stop.say = said.append
        os.kill(os.getpid(), signal.SIGHUP)
    assert (bool(stop), len(said)) == (True, 1)  # its terminal is gone


@pytest.mark.parametrize("error", [BrokenPipeError, RuntimeError("reentrant call")])
def test_a_signal_that_cannot_be_told_of_is_remembered(error):
    def say(text):
        raise error

    with StopRequest() as stop:
        stop.say = say
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop


def test_a_terminal_that_closes_leaves_a_checkpoint(tmp_path):
    """The kernel sends SIGHUP, the shell another, and printing is an error from then on."""
    config = tiny(tmp_path, agent_steps=10_000)
    argv = [*flags(agent_steps=10_000), "--logdir", str(tmp_path)]
    ours, theirs = os.openpty()
    login = ("-c", "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n" + RUN_TRAIN)
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = loop_cases.start(argv, program=login, streams=streams, start_new_session=True)
    os.close(theirs)
    said = b""
    while b"updates/s" not in said:
        said += os.read(ours, 4096)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 129
    assert 0 < saved(config).meta["agent_steps"] < 10_000


def test_nohup_keeps_a_run_from_hearing_of_its_terminal(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop_in(monkeypatch, 6, signal.SIGHUP)
        loop_cases.train(tiny(tmp_path))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert_one_history(tiny(tmp_path))


def test_a_reader_of_the_output_that_goes_leaves_a_checkpoint(tmp_path):
    config = tiny(tmp_path, agent_steps=10_000)
    process = loop_cases.start([*flags(agent_steps=10_000, eval={"every": 20}), "--logdir", str(tmp_path)])
    assert any("phase=evaluate" in line for line in process.stdout)
    process.stdout.close()  # as `| head -1`, or as `| tee log` after Ctrl-C
    assert (process.stderr.read(), process.wait(60)) == ("", 141)
    assert 0 < saved(config).meta["agent_steps"] < 10_000


def test_an_output_on_a_full_disk_leaves_a_checkpoint(tmp_path, monkeypatch, capsys):
    class Filling(io.StringIO):
        def flush(self):
            if "phase=evaluate" in self.getvalue():
                raise OSError(errno.ENOSPC, "No space left on device")

    config = tiny(tmp_path, agent_steps=10_000, eval={"every": 20})
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Filling())
        with pytest.raises(OutputFullError, match="cannot be written: No space left on device; make room"):
            loop_cases.train(config)
    assert 0 < saved(config).meta["agent_steps"] < 10_000


def test_an_environment_that_raises_costs_no_step(tmp_path, monkeypatch):
    recv = loop_cases.Scripted._recv

    def broken(self):
        if len(self.sent) == 15:
            raise EnvError("it raised ZeroDivisionError", where="Maze-v0")
        return recv(self)

    script(monkeypatch)
    config = tiny(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(loop_cases.Scripted, "_recv", broken)
        with pytest.raises(EnvError, match="Maze-v0"):
            loop_cases.train(config)
    assert saved(config).meta["agent_steps"] == 30
    loop_cases.train(config)
    assert saved(config).meta["agent_steps"] == 40


def test_a_signal_before_the_first_step(tmp_path, monkeypatch):
    whole, config = tiny(tmp_path / "whole"), tiny(tmp_path / "stopped")
    make = session.make_envs

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return make(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(session, "make_envs", interrupted)
        with pytest.raises(Interrupted):
            loop_cases.train(config)
    assert saved(config).meta["agent_steps"] == 0
    for each in (whole, config):
        loop_cases.train(each)
    assert differing(saved(whole), saved(config)) == set()  # nothing was lost, nothing drawn twice


def test_a_signal_during_evaluation(tmp_path, monkeypatch):
    config = tiny(tmp_path, eval={"every": 15, "episodes": 50})
    play = session.evaluation.play

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return play(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(session.evaluation, "play", interrupted)
        with pytest.raises(Interrupted):
            loop_cases.train(config)
    assert saved(config).meta["agent_steps"] == 16
    assert lines(config, "scores", kind="evaluation") == []
    loop_cases.train(config)
    # What was missed is made up for.
    assert [x["agent_steps"] for x in lines(config, "scores", kind="evaluation")] == [16, 30, 40]
    assert_one_history(config)
