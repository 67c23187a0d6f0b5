import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
from pathlib import Path

import pytest
import torch

import hdfast
from hdfast.runtime import rundir
from hdfast.runtime.errors import ConfigError, DiskFullError, RunError
from hdfast.runtime.record import difference, read
from hdfast.runtime.rundir import RunDir

CONFIG = {"seed": 3, "device": "cpu", "log": {"every": 500}, "rssm": {"deter": 512, "layers": (1, 2)}}


def open_run(logdir, config=CONFIG, **options):
    return RunDir.open(logdir, "atari100k", "Pong", 3, config, **options)


def state(run):
    """What it was when it was opened, by what it holds then."""
    if run.summary is not None:
        return "finished"
    return "resumed" if read(run.path).resumed else "new"


def test_a_new_run_has_its_folders_and_its_config_with_where_it_comes_from(tmp_path):
    with open_run(tmp_path, device={"name": "a chip"}) as run:
        assert state(run) == "new"
        assert run.path == tmp_path / "atari100k" / "Pong" / "seed3"
        for folder in (run.checkpoints, run.replay, run.path / "tensorboard", run.path / "videos"):
            assert folder.is_dir()
        record = read(run.path)  # no lock needed
    assert record.config == {**CONFIG, "rssm": {"deter": 512, "layers": [1, 2]}}
    assert (record.summary, record.resumed) == (None, [])
    assert record.created["hdfast"] == hdfast.__version__
    assert record.created["torch"] == torch.__version__
    assert record.created["device"] == {"name": "a chip"}
    assert {"commit", "host", "python", "command", "time"} <= record.created.keys()


def test_the_same_config_resumes_and_a_finished_run_stays_finished(tmp_path):
    with open_run(tmp_path):
        pass
    with open_run(tmp_path) as run:
        assert state(run) == "resumed"
        run.mark_finished({"score": float("nan"), "agent_steps": 7})
    with open_run(tmp_path) as run:
        assert run.summary == {"score": "NaN", "agent_steps": 7}
    assert len(read(run.path).resumed) == 1


def test_another_config_is_refused_with_the_difference(tmp_path):
    with open_run(tmp_path) as run:
        before = (run.path / "config.json").read_bytes()
        (run.checkpoints / "0000000001.safetensors").touch()
    other = {"seed": 3, "device": "cuda", "log": {"every": 1}, "rssm": {"deter": 1024}, "new": None}
    with pytest.raises(
        ConfigError, match="seed3: this run has another config; give the saved values"
    ) as error:
        open_run(tmp_path, other, ignore={"log"})
    assert error.value.details == (
        'device: "cpu" -> "cuda"',
        "rssm.deter: 512 -> 1024",
        "rssm.layers: [1, 2] -> (absent)",
        "new: (absent) -> null",
    )
    assert (run.path / "config.json").read_bytes() == before
    with open_run(tmp_path) as run:  # the one refused has not kept the lock
        assert state(run) == "resumed"


def test_before_its_first_checkpoint_a_run_takes_another_config(tmp_path):
    with open_run(tmp_path, {"seed": 3, "env": "none"}):
        pass  # it could not start
    with open_run(tmp_path) as run:
        assert state(run) == "new"
        record = read(run.path)
    assert (record.config["device"], record.resumed) == ("cpu", [])
    assert "env" not in record.config


def test_a_first_checkpoint_that_was_not_finished_is_none(tmp_path):
    with open_run(tmp_path, {"seed": 3}) as run:
        (run.checkpoints / "0000000001.safetensors.partial").touch()
    with open_run(tmp_path) as run:
        assert state(run) == "new"


def test_a_run_grows_in_what_may_be_more(tmp_path):
    def opened(steps):
        return open_run(tmp_path, {"seed": 3, "steps": steps}, growing={"steps"})

    with opened(10) as run:
        (run.checkpoints / "0000000001.safetensors").touch()
        run.mark_finished({"score": 1.0})
    with opened(10) as run:
        assert state(run) == "finished"
    with opened(20) as run:
        before = read(run.path)
        run.grow()
        record = read(run.path)
        run.grow()  # it has
    assert (run.summary, record.summary) == (None, None)
    assert (before.config, before.summary) == ({"seed": 3, "steps": 10}, {"score": 1.0})
    assert record.config == {"seed": 3, "steps": 20}
    assert record.resumed[-1]["changed"] == ["steps: 10 -> 20"]
    with pytest.raises(ConfigError, match="another config") as error:
        opened(10)
    assert error.value.details == ("steps: 20 -> 10",)
    with opened(30) as run:
        run.mark_finished({"score": 2.0})  # what was added left nothing to do
    record = read(run.path)
    assert (record.config["steps"], record.summary) == (30, {"score": 2.0})


@pytest.mark.parametrize("where", [(rundir, "write_json"), (Path, "unlink")], ids=["config", "finished"])
def test_a_run_that_is_killed_as_it_grows_is_not_finished(tmp_path, monkeypatch, where):
    """Killed before either of its two changes on disk."""

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with open_run(tmp_path, {"seed": 3, "steps": 10}) as run:
        (run.checkpoints / "0000000001.safetensors").touch()
        run.mark_finished({"score": 1.0})
    longer = {"config": {"seed": 3, "steps": 20}, "growing": {"steps"}}
    with open_run(tmp_path, **longer) as run, monkeypatch.context() as patch:
        patch.setattr(*where, killed)
        with pytest.raises(KeyboardInterrupt):
            run.grow()
    with open_run(tmp_path, **longer) as run:
        assert run.summary is None
        run.grow()
    record = read(run.path)
    assert (record.config, record.summary) == ({"seed": 3, "steps": 20}, None)


def test_how_a_session_computes_is_compared_with_the_last(tmp_path):
    with open_run(tmp_path) as run:
        assert run.note_backends({"precision": "float32", "ops": {"a": "native"}}) == []
        assert run.note_backends({"precision": "float32", "ops": {"a": "native"}, "new": 1}) == []
        assert run.note_backends({"precision": "bfloat16", "ops": {"a": "native"}, "new": 1}) == [
            'precision: "float32" -> "bfloat16"'
        ]
        (run.path / "backends.json").write_text("[")
        assert run.note_backends({"precision": "float32"}) == []
    assert json.loads((run.path / "backends.json").read_text()) == {"precision": "float32"}


def test_a_field_that_is_newer_than_the_run_was_at_its_default(tmp_path):
    with open_run(tmp_path) as run:
        (run.checkpoints / "0000000001.safetensors").touch()
    defaults = {"seed": 0, "fast": False, "rssm": {"deter": 1, "blocks": 8}, "mix": {"a": 1}}
    newer = {**CONFIG, "fast": False, "rssm": {**CONFIG["rssm"], "blocks": 8}, "mix": {"a": 1}}
    with open_run(tmp_path, newer, defaults=defaults) as run:
        assert state(run) == "resumed"
        record = read(run.path)
    assert record.config == {**CONFIG, "rssm": {"deter": 512, "layers": [1, 2]}}  # as it was saved
    assert record.resumed[0]["changed"] == []
    with pytest.raises(ConfigError, match="this run has another config") as error:
        open_run(tmp_path, {**newer, "fast": True, "mix": {"a": 2}}, defaults=defaults)
    assert error.value.details == ("fast: false -> true", "mix.a: 1 -> 2")
    with pytest.raises(ConfigError, match="this run has another config") as error:  # the other way round
        open_run(tmp_path, {"seed": 3, "device": "cpu", "rssm": {"deter": 512}}, defaults={"seed": 0})
    assert error.value.details == ("log.every: 500 -> (absent)", "rssm.layers: [1, 2] -> (absent)")


def test_fields_that_may_differ_are_recorded_when_they_do(tmp_path):
    with open_run(tmp_path):
        pass
    moved = {**CONFIG, "device": "cuda", "log": {"every": 1}}
    with open_run(tmp_path, moved, ignore={"device", "log.every"}) as run:
        record = read(run.path)
    assert record.config["device"] == "cpu"
    assert record.resumed[0]["changed"] == ['device: "cpu" -> "cuda"', "log.every: 500 -> 1"]


def test_difference_compares_numbers_by_value_and_ignores_whole_branches():
    assert difference({"a": 1, "b": {}}, {"a": 1, "b": {}}) == []
    assert difference({"a": 1, "b": 0.5}, {"a": 1.0, "b": 0.5}) == []
    assert difference({"a": 1, "b": 1}, {"a": 1.5, "b": True}) == ["a: 1 -> 1.5", "b: 1 -> true"]
    assert difference({"a": "NaN"}, {"a": "NaN"}) == []
    assert difference({"a": {"b": 1}}, {"a": 1}) == ["a.b: 1 -> (absent)", "a: (absent) -> 1"]
    assert difference({"log": {"x": {"y": 1}}, "logs": 1}, {"log": {"x": {"y": 2}}, "logs": 2}, {"log"}) == [
        "logs: 1 -> 2"
    ]


def test_two_cannot_hold_one_run(tmp_path):
    with (
        open_run(tmp_path),
        pytest.raises(
            RunError, match=rf"seed3: this run is in use by process {os.getpid()} on \S+ since \S+; wait"
        ),
    ):
        open_run(tmp_path)
    with open_run(tmp_path), RunDir.open(tmp_path, "atari100k", "Pong", 4, CONFIG):
        pass


def test_a_killed_holder_frees_its_run(tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            open_run(tmp_path)
            os.write(writer, b"1")
            signal.pause()
        finally:
            os._exit(1)
    os.read(reader, 1)
    try:
        with pytest.raises(RunError, match=f"in use by process {child} "):
            open_run(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)
    with open_run(tmp_path) as run:
        assert state(run) == "resumed"


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def unable(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unable)
    with open_run(tmp_path) as run:
        assert state(run) == "new"
    assert capsys.readouterr().err.startswith(
        f"warning: {run.path}: cannot lock (No locks available); make sure"
    )


def test_no_room_for_the_lock_s_holder_leaves_no_lock(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(DiskFullError, match="No space left"):
            open_run(tmp_path)
    with open_run(tmp_path) as run:
        assert run.path.exists()


def test_a_logdir_that_is_a_file(tmp_path):
    (tmp_path / "runs").touch()
    with pytest.raises(
        RunError, match=r"^.*/runs: this is a file, not a directory; choose another --logdir$"
    ):
        open_run(tmp_path / "runs")
    (tmp_path / "good" / "atari100k").mkdir(parents=True)
    (tmp_path / "good" / "atari100k" / "Pong").touch()
    with pytest.raises(RunError, match=r"^.*/atari100k/Pong: this is a file"):
        open_run(tmp_path / "good")


@pytest.fixture
def nobody():
    """Acts as a user without rights if the tests run as root."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


def test_an_unwritable_logdir(tmp_path, nobody):
    if os.geteuid() != 65534:
        tmp_path.chmod(0o500)
    with pytest.raises(
        RunError, match="seed3: cannot use the run's directory: Permission denied; choose another"
    ):
        open_run(tmp_path / "runs")


def test_a_full_disk_while_creating_or_finishing_a_run(tmp_path):
    with open_run(tmp_path) as run:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (256, before[1]))
        try:
            with pytest.raises(DiskFullError, match="cannot use the run's directory"):
                open_run(tmp_path / "other", {"long": "x" * 512})
            with pytest.raises(DiskFullError, match="cannot mark the run finished"):
                run.mark_finished({"long": "x" * 512})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (run.path / "finished.json").exists()
    with open_run(tmp_path / "other") as run:
        assert state(run) == "new"


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("config", b"", "Expecting value"),
        ("config", b"{", "Expecting property name"),
        ("config", b"\xff", "'utf-8' codec can't decode"),
        ("config", b"[]", r"it is \[\], expected a dict"),
        ("config", b'{"config": {}}', "created is None, expected a dict"),
        ("config", b'{"config": 3, "created": {}, "resumed": []}', "config is 3, expected a dict"),
        ("config", b'{"config": {}, "created": {}, "resumed": "no"}', "resumed is 'no', expected a list"),
        ("finished", b"", "Expecting value"),
        ("finished", b"7", "it is 7, expected a dict"),
        ("finished", b'{"summary": [1]}', r"summary is \[1\], expected a dict"),
        ("finished", b'{"summary": {}}', "score is None, expected a number"),
        ("finished", b'{"summary": {"score": "high"}}', "score is 'high', expected a number"),
        ("finished", b'{"summary": {"score": 1, "success": true}}', "success is True, expected a number"),
    ],
)
def test_a_damaged_file_is_told(tmp_path, name, text, why):
    with open_run(tmp_path) as run:
        run.mark_finished({"score": 1.0})
        (run.path / f"{name}.json").write_bytes(text)
    for access in (lambda: open_run(tmp_path), lambda: read(run.path)):
        with pytest.raises(RunError, match=rf"{name}.json: the file is damaged \({why}") as error:
            access()
        assert "\n" not in str(error.value)
    assert (run.path / f"{name}.json").read_bytes() == text


def test_a_directory_that_was_made_for_nothing_goes_again(tmp_path):
    logdir = tmp_path / "runs"
    with open_run(logdir) as run:
        run.note_backends({"precision": "float32"})
        run.discard_unbegun()
    assert list(tmp_path.iterdir()) == []
    with open_run(logdir) as run, RunDir.open(logdir, "atari100k", "Pong", 7, CONFIG) as other:
        other.discard_unbegun()
        assert [path.name for path in run.path.parent.iterdir()] == [run.path.name], (
            "but not another run's folder"
        )
    with open_run(tmp_path / "more") as run:
        for begun in (run.replay / "chunk", run.path / "metrics.jsonl"):
            begun.touch()
            run.discard_unbegun()
            assert begun.exists(), "nor one in which a run has begun"
    with open_run(logdir) as run:
        run.discard_unbegun()
        assert run.path.exists(), "nor one that was there before"


def test_checkpoints_without_a_config_are_not_taken_for_a_new_run(tmp_path):
    with open_run(tmp_path) as run:
        (run.checkpoints / "0000000001.safetensors").touch()
        (run.path / "config.json").unlink()
    with pytest.raises(RunError, match=r"there are checkpoints but no config.json"):
        open_run(tmp_path)
    with pytest.raises(RunError, match="there is no run here"):
        read(run.path)


@pytest.mark.parametrize("name", ["../up", "", ".hidden", "a/b", "a b"])
def test_names_that_cannot_be_folders(tmp_path, name):
    with pytest.raises(ConfigError, match="cannot name a folder"):
        RunDir.open(tmp_path, "demo", name, 0, {})
    assert list(tmp_path.iterdir()) == []


def test_the_commit_is_that_of_the_package_and_of_nothing_around_it(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    assert rundir._commit(package) is None  # no repository
    git("init", "-q")
    (package / "__init__.py").write_text("1")
    (tmp_path / "README").write_text("1")
    git("add", "README")
    git("commit", "-qm", "another project around an installed package")
    assert rundir._commit(package) is None
    git("add", ".")
    git("commit", "-qm", "its own project")
    assert rundir._commit(package) == git("rev-parse", "HEAD")
    (package / "__init__.py").write_text("2")
    assert rundir._commit(package) == git("rev-parse", "HEAD") + "-dirty"
    (package / "__init__.py").write_text("1")
    assert json.dumps(rundir.provenance())
