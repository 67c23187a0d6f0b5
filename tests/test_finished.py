"""Finished runs: skipped, gone on with, and never begun anew by mistake."""

import json
import os
import signal

import pytest

from hdfast import loop, session
from hdfast.runtime.errors import CheckpointError, ConfigError, EnvError, Interrupted
from tests import loop_cases
from tests.loop_cases import (
    assert_one_history,
    lines,
    one_thread,  # noqa: F401
    path_of,
    script,
    stop_in,
    tiny,
)


def test_a_finished_run_is_skipped_untouched(tmp_path, monkeypatch, capfd):
    config = tiny(tmp_path)
    summary = loop_cases.train(config)
    files = {p: p.stat().st_mtime_ns for p in path_of(config).rglob("*") if p.is_file() and p.name != "lock"}
    monkeypatch.setattr(loop, "Session", None)  # nothing is built
    capfd.readouterr()
    assert loop_cases.train(config) == json.loads(json.dumps(summary))
    assert capfd.readouterr().out == f"{path_of(config)}: finished already\n"
    assert {p: p.stat().st_mtime_ns for p in files} == files
    assert loop_cases.train(tiny(tmp_path, agent_steps=20)) == json.loads(
        json.dumps(summary)
    )  # it does so much
    assert capfd.readouterr().out == f"{path_of(config)}: finished already, at agent step 40\n"
    assert {p: p.stat().st_mtime_ns for p in files} == files
    with pytest.raises(ConfigError, match="another config"):
        loop_cases.train(tiny(tmp_path, agent_steps=20, rssm={"deter": 8}))


def test_a_finished_run_whose_checkpoints_are_gone_is_not_begun_anew(tmp_path):
    config = tiny(tmp_path)
    summary = json.loads(json.dumps(loop_cases.train(config)))
    for file in (path_of(config) / "checkpoints").iterdir():
        file.unlink()
    files = {p: p.stat().st_mtime_ns for p in path_of(config).rglob("*") if p.is_file() and p.name != "lock"}
    assert loop_cases.train(config) == loop_cases.train(tiny(tmp_path, agent_steps=20)) == summary
    with pytest.raises(
        CheckpointError, match="it is finished, but its checkpoints are gone; restore them, or"
    ):
        loop_cases.train(tiny(tmp_path, agent_steps=60))
    with pytest.raises(ConfigError, match="another config"):
        loop_cases.train(tiny(tmp_path, rssm={"deter": 8}))
    assert {p: p.stat().st_mtime_ns for p in files} == files


def test_a_finished_run_goes_on_when_it_is_given_more_steps(tmp_path, monkeypatch, capfd):
    """Like one of that length from the start, except for the episodes that were cut off."""
    script(monkeypatch)
    config, longer = tiny(tmp_path / "a", agent_steps=24), tiny(tmp_path / "a")
    first = loop_cases.train(config)
    assert first["updates"] == 7
    with pytest.raises(ConfigError, match="another config"):
        loop_cases.train(tiny(tmp_path / "a", rssm={"deter": 8}))
    assert (path_of(config) / "finished.json").exists()
    capfd.readouterr()
    loop_cases.train(longer)
    assert "going on at agent step 24" in capfd.readouterr().out
    assert_one_history(longer)
    told = [line["agent_steps"] for line in lines(longer, "scores", kind="evaluation")]
    assert told == [24, 40]
    record = json.loads((path_of(config) / "config.json").read_text())
    assert record["config"]["agent_steps"] == 40
    assert record["resumed"][-1]["changed"] == ["agent_steps: 24 -> 40"]
    assert record["created"]["device"]["device"] == record["resumed"][-1]["device"]["device"] == "cpu"
    assert loop_cases.train(config) == json.loads((path_of(config) / "finished.json").read_text())["summary"]


def test_more_steps_change_nothing_before_the_first_of_them(tmp_path, monkeypatch):
    """They may be a mistake: what is finished stays so until there is more."""
    script(monkeypatch)
    config, longer = tiny(tmp_path, agent_steps=24), tiny(tmp_path)
    summary = json.loads(json.dumps(loop_cases.train(config)))
    before = {name: (path_of(config) / name).read_text() for name in ("config.json", "finished.json")}

    def fails(*args, **kwargs):
        raise EnvError("it is not there")

    def stops(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return make(*args, **kwargs)

    make = session.make_envs
    for how, error in ((fails, EnvError), (stops, Interrupted)):
        with monkeypatch.context() as patch:
            patch.setattr(session, "make_envs", how)
            with pytest.raises(error):
                loop_cases.train(longer)
        assert {name: (path_of(config) / name).read_text() for name in before} == before
        assert loop_cases.train(config) == summary
    with monkeypatch.context() as patch:
        stop_in(patch, 2)
        with pytest.raises(Interrupted):
            loop_cases.train(longer)
    assert not (path_of(config) / "finished.json").exists()
    with pytest.raises(ConfigError, match="another config"):
        loop_cases.train(config)
    assert loop_cases.train(longer)["updates"] == 15
    assert_one_history(longer)
