"""The log on a disk that is full, fails or is read-only, and in a process that is killed.

`python -m tests.test_replay_disk DIRECTORY` is the program that one of the tests kills.
"""

import errno
import os
import re
import resource
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from hdfast.replay import ReplayError
from hdfast.runtime.errors import DiskFullError, RunError
from tests.replay_log_cases import (
    check_content,
    chunks,
    extend,
    loaded,
    make_blocks_small,
    nbytes,
    new_replay,
)


def test_flush_is_durable_and_costs_nothing_when_nothing_is_new(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")) or real(file)
    )
    replay = extend(new_replay(tmp_path), 3)
    assert synced == [str(tmp_path)]  # the new directory's entry
    replay.flush()
    assert synced[1:] == [str(chunks(tmp_path)[0]), str(tmp_path / "replay")]
    replay.flush()
    replay.state_dict()
    assert len(synced) == 3
    replay.close()
    replay.close()
    assert len(synced) == 3


def test_every_chunk_is_durable_after_a_flush_and_every_cut_after_a_load(tmp_path, monkeypatch):
    """What a power failure may take: files written, and directories changed, since they were last synced."""
    make_blocks_small(monkeypatch.setattr)
    directory, at_risk = str(tmp_path / "replay"), set()
    write, open_, sync, unlink = os.pwrite, os.open, os.fsync, Path.unlink

    def path_of(file):
        return os.readlink(f"/proc/self/fd/{file}")

    def opened(path, flags, *mode):
        at_risk.update({directory} if flags & os.O_CREAT else ())
        return open_(path, flags, *mode)

    monkeypatch.setattr(os, "pwrite", lambda file, *data: at_risk.add(path_of(file)) or write(file, *data))
    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", lambda file: at_risk.discard(path_of(file)) or sync(file))
    monkeypatch.setattr(Path, "unlink", lambda path: at_risk.add(directory) or unlink(path))
    replay = extend(new_replay(tmp_path, ring=100), 30)
    state = replay.state_dict()
    extend(replay, 50)
    assert len(chunks(tmp_path)) > 3
    assert at_risk
    replay.flush()
    assert not at_risk
    replay.close()
    before = {str(path): path.stat().st_size for path in chunks(tmp_path)}
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(path_of(file)) or sync(file))
    loaded(tmp_path, state, ring=100).close()
    after = {str(path): path.stat().st_size for path in chunks(tmp_path)}
    assert len(after) < len(before)
    (cut,) = (path for path, size in after.items() if size < before[path])
    assert synced[-2:] == [cut, directory]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_one_clear_error_and_loses_nothing(tmp_path, monkeypatch, error):
    """The disk takes 100 more bytes and then has room again; the second time a torn tail remains."""
    make_blocks_small(monkeypatch.setattr)
    replay = extend(new_replay(tmp_path), 22)
    state, size = replay.state_dict(), nbytes(tmp_path)
    for cut_fails in (False, True):
        room = [100]

        def full(file, data, offset, real=os.pwrite, room=room):
            if not room[0]:
                raise OSError(error, os.strerror(error))
            written = real(file, data[: room[0]], offset)
            room[0] -= written
            return written

        def cannot(*args):
            raise OSError(error, os.strerror(error))

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            if cut_fails:
                patch.setattr(os, "ftruncate", cannot)
            before = replay.rows_added
            kind = RunError if error == errno.EIO else DiskFullError
            with pytest.raises(kind, match=re.escape(os.strerror(error))) as caught:
                extend(replay, 10)
            assert str(chunks(tmp_path)[-1]) in str(caught.value)
            assert replay.rows_added == before + 4, "the row at which the disk failed was added"
            with pytest.raises(kind):
                replay.flush()
            with pytest.raises(kind):
                replay.state_dict()
        assert nbytes(tmp_path) == size + (100 if cut_fails else 0)
        copy = tmp_path / f"copy-{cut_fails}"
        (copy / "replay").mkdir(parents=True)
        for path in chunks(tmp_path):
            (copy / "replay" / path.name).write_bytes(path.read_bytes())
        check_content(loaded(copy, state), int(state["rows_added"]))
        check_content(replay, replay.rows_added)
        state = extend(replay, 3).state_dict()  # there is room again
        size = nbytes(tmp_path)
        check_content(loaded(tmp_path, state), replay.rows_added)


def test_a_file_size_limit_cuts_a_real_write_short(tmp_path):
    replay = extend(new_replay(tmp_path), 10)
    state = replay.state_dict()
    size = chunks(tmp_path)[0].stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    extend(replay, 10)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 500, hard))
    try:
        with pytest.raises(DiskFullError, match="cannot write the replay: File too large; make room"):
            replay.flush()
        assert chunks(tmp_path)[0].stat().st_size == size
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    later = replay.state_dict()
    check_content(loaded(tmp_path, later), 20)
    check_content(loaded(tmp_path, state), 10)


def test_after_a_failed_sync_no_state_is_given_out(tmp_path, monkeypatch):
    replay = extend(new_replay(tmp_path), 5)

    def fails(file):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(RunError, match=r"cannot write the replay: Input/output error$"):
            replay.flush()
    with pytest.raises(ReplayError, match="the disk failed before"):
        replay.state_dict()
    with pytest.raises(ReplayError, match="the disk failed before"):
        replay.close()


def test_directories_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/replay: cannot create the replay: Not a directory"):
        new_replay(tmp_path / "file")
    real = os.open

    def refuses(path, flags, *args):
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, flags, *args)

    replay = extend(new_replay(tmp_path), 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuses)
        with pytest.raises(RunError, match=r"rows-0+\.log: cannot create the replay: Permission denied"):
            replay.flush()
    check_content(loaded(tmp_path, replay.state_dict()), 1)


def test_rows_that_cannot_be_deleted_are_one_clear_error(tmp_path, monkeypatch):
    make_blocks_small(monkeypatch.setattr)
    replay = new_replay(tmp_path)
    states = [extend(replay, 25).state_dict() for _ in range(4)]
    oldest = chunks(tmp_path)[0]

    def refuses(path):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), path)

    monkeypatch.setattr(Path, "unlink", refuses)
    told = "cannot delete the replay: Operation not permitted"
    with pytest.raises(RunError, match=f"^{oldest}: {told}"):
        extend(replay, 25).state_dict()
    replay.close()
    newest = chunks(tmp_path)[-1]
    with pytest.raises(RunError, match=f"^{newest}: {told}"):
        loaded(tmp_path, states[-1])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission(tmp_path):
    replay = extend(new_replay(tmp_path), 1)
    (tmp_path / "replay").chmod(0o500)
    with pytest.raises(RunError, match="Permission denied"):
        replay.flush()


def test_kill_before_any_change_of_the_disk(tmp_path):
    command = [sys.executable, "-m", __name__, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    output = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert output.returncode == 0, output.stdout + output.stderr
    rows, nbytes_cut = zip(*(map(int, line.split()) for line in output.stdout.splitlines()), strict=True)
    assert len(rows) > 50
    assert list(rows) == sorted(rows)
    assert rows[-1] > 200, "the runs that were killed did not go on"
    assert sum(nbytes > 0 for nbytes in nbytes_cut) > 30, "hardly a kill left anything behind the position"


CHANGES = ("mkdir", "open", "pwrite", "fsync", "ftruncate", "truncate", "unlink", "replace")


def _die_before_change(number: int) -> None:
    """From now on, counts this process's calls that may change the disk, and kills it (-9) before one of them."""
    changes = count(1)

    def watch(frame: Any, event: str, function: Any) -> None:
        if event == "c_call" and function.__name__ in CHANGES and next(changes) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(watch)


def _add_rows(directory: Path) -> None:
    """Resume, then add rows and save a state every few of them, as a run does."""
    checkpoint = directory / "state.safetensors"
    replay = new_replay(directory)
    if checkpoint.exists():
        replay.load_state_dict(load_file(checkpoint))
    for rows in (2, 13, 8):
        extend(replay, rows)
        replay.flush()
        save_file(replay.state_dict(), directory / "new")
        os.replace(directory / "new", checkpoint)


def _kill_and_check(directory: Path) -> None:
    """Fork `_add_rows` on what the previous one left, killed before its 1st, 2nd, ... change, until one completes.

    Prints what comes back after each: its rows, and the bytes behind them that were cut off.
    """
    make_blocks_small()
    pwrite = os.pwrite
    os.pwrite = lambda file, data, offset: pwrite(file, data[:150], offset)  # a record takes several writes
    for number in count(1):
        if (child := os.fork()) == 0:
            _die_before_change(number)
            _add_rows(directory)
            os._exit(0)
        survived = os.WIFEXITED(os.waitpid(child, 0)[1])
        checkpoint = directory / "state.safetensors"
        state = load_file(checkpoint) if checkpoint.exists() else new_replay(directory).state_dict()
        before = nbytes(directory)
        replay = loaded(directory, state)
        check_content(replay, int(state["rows_added"]))
        print(replay.rows_added, before - nbytes(directory), flush=True)
        if survived:
            break


if __name__ == "__main__":
    _kill_and_check(Path(sys.argv[1]))
