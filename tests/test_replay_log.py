"""The log: what comes back after a kill, a torn or damaged file, a disk that is full.

`python tests/test_replay_log.py DIRECTORY` is the program that one of the tests kills.
"""

import errno
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import zlib
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hdfast.envs import ArraySpec
from hdfast.replay import Replay, ReplayError, chunk, log

NUM_ENVS = 2
SPECS = {
    "image": ArraySpec((8, 8, 3), np.uint8),
    "state": ArraySpec((3,), np.float64),
    "action": ArraySpec((2,), np.float32),
    "reward": ArraySpec((), np.float32),
    **{key: ArraySpec((), np.bool_) for key in ("is_first", "is_last", "is_terminal")},
}


def make_row(agent_step: int) -> dict[str, np.ndarray]:
    """The row of this agent step, always the same one; it varies slowly, but for some random bits."""
    rng = np.random.default_rng(agent_step)
    image = np.full((NUM_ENVS, 8, 8, 3), agent_step // 5 % 256, np.uint8)
    image[:, agent_step % 8] = rng.integers(256, size=(8, 3), dtype=np.uint8)
    return {
        "image": image,
        "state": rng.integers(2**63, size=(NUM_ENVS, 3)).view(np.float64),
        "action": rng.normal(size=(NUM_ENVS, 2)).astype(np.float32),
        "reward": np.full(NUM_ENVS, agent_step, np.float32),
        **{key: rng.random(NUM_ENVS) < 0.2 for key in ("is_first", "is_last", "is_terminal")},
    }


def new_replay(directory: Path, *, ring: int = 20, checkpoints: int = 2) -> Replay:
    kwargs = {"directory": directory / "replay", "seed": 5, "checkpoints": checkpoints}
    return Replay(SPECS, num_envs=NUM_ENVS, capacity=NUM_ENVS * ring, **kwargs)


def extend(replay: Replay, rows: int) -> Replay:
    for agent_step in range(replay.rows_added, replay.rows_added + rows):
        replay.add(make_row(agent_step))
    return replay


def loaded(directory: Path, state: dict[str, torch.Tensor], *, ring: int = 20) -> Replay:
    replay = new_replay(directory, ring=ring)
    replay.load_state_dict(state)
    return replay


def check_content(replay: Replay, rows: int) -> None:
    """The ring holds the newest rows up to `rows`, bit for bit."""
    assert replay.rows_added == int(replay._rows_added) == rows
    for agent_step in range(max(rows - replay.ring, 0), rows):
        for key, array in make_row(agent_step).items():
            found = replay._by_env[key][:, agent_step % replay.ring]
            assert found.tobytes() == array.tobytes(), (agent_step, key)


def chunks(directory: Path) -> list[Path]:
    return sorted((directory / "replay").iterdir())


def no_room(*args) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def nbytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in chunks(directory))


@pytest.fixture
def small_blocks(monkeypatch):
    """Records of 4 rows, chunks of about 20 rows."""
    monkeypatch.setattr(log, "BLOCK_BYTES", 4 * new_packed_nbytes())
    monkeypatch.setattr(log, "CHUNK_BYTES", 2500)


def new_packed_nbytes() -> int:
    return Replay(SPECS, num_envs=NUM_ENVS, capacity=NUM_ENVS)._layout.packed_nbytes


@pytest.mark.parametrize("rows", [0, 1, 4, 19, 20, 21, 57, 200])
def test_everything_comes_back_bit_for_bit(rows, tmp_path, small_blocks):
    first = extend(new_replay(tmp_path), rows)
    if rows:
        first.sample(3, 1)
    state = first.state_dict()
    second = loaded(tmp_path, {key: value.clone() for key, value in state.items()})
    check_content(second, rows)
    assert torch.equal(second.generator.get_state(), first.generator.get_state())
    first.close()
    for agent_step in range(rows, rows + 30):  # and the second goes on as the first would have
        second.add(make_row(agent_step))
    again = loaded(tmp_path, second.state_dict())
    check_content(again, rows + 30)
    assert torch.equal(again.sample(16, 5)["image"], second.sample(16, 5)["image"])


def test_default_block_and_chunk_sizes(tmp_path):
    """One megabyte and more of rows: several records in one chunk."""
    first = extend(new_replay(tmp_path, ring=3000), 3000)
    state = first.state_dict()
    assert len(chunks(tmp_path)) == 1
    assert chunks(tmp_path)[0].read_bytes().count(chunk.RECORD_MAGIC) == 2
    check_content(loaded(tmp_path, state, ring=3000), 3000)


def test_rows_after_the_checkpoint_are_cut_from_the_disk(tmp_path, small_blocks):
    replay = extend(new_replay(tmp_path), 45)
    state = replay.state_dict()
    files = {path: path.read_bytes() for path in chunks(tmp_path)}
    extend(replay, 50).close()
    assert len(chunks(tmp_path)) > len(files)
    check_content(loaded(tmp_path, state), 45)
    assert {path: path.read_bytes() for path in chunks(tmp_path)} == files


def test_a_log_torn_anywhere_is_cut_or_refused(tmp_path, small_blocks):
    """For every length of the last file: whole at the checkpoint, or an error and nothing touched."""
    replay = extend(new_replay(tmp_path), 26)
    state = replay.state_dict()
    extend(replay, 7).flush()
    last = chunks(tmp_path)[-1]
    whole, end = last.read_bytes(), 0
    assert len(chunks(tmp_path)) == 2
    check_content(loaded(tmp_path, state), 26)
    end = last.stat().st_size
    assert 0 < end < len(whole)
    for length in [*range(0, len(whole), 41), end - 1, end, end + 1]:
        last.write_bytes(whole[:length])
        if length >= end:
            check_content(loaded(tmp_path, state), 26)
            assert last.read_bytes() == whole[:end]
        else:
            with pytest.raises(ReplayError, match=r"ends at row \d+, the checkpoint at 26|damaged at byte 0"):
                loaded(tmp_path, state)
            assert last.read_bytes() == whole[:length]


def test_a_flipped_bit_is_found_wherever_it_matters(tmp_path, small_blocks):
    replay = extend(new_replay(tmp_path), 26)
    state = replay.state_dict()
    ends = {path: path.stat().st_size for path in chunks(tmp_path)}
    extend(replay, 9).close()
    assert len(ends) == 2
    for path, end in ends.items():
        whole = path.read_bytes()
        for position in range(0, len(whole), 29):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << position % 8
            path.write_bytes(damaged)
            if position < end:
                with pytest.raises(ReplayError) as caught:
                    loaded(tmp_path, state)
                assert "\n" not in str(caught.value)
                assert str(tmp_path) in str(caught.value)
                assert path.read_bytes() == damaged, "nothing may be cut from a log that is not whole"
            else:
                check_content(loaded(tmp_path, state), 26)
        path.write_bytes(whole)


def test_missing_chunks_and_other_logs_are_refused(tmp_path, small_blocks):
    replay = extend(new_replay(tmp_path), 70)
    state = replay.state_dict()
    replay.close()
    paths = chunks(tmp_path)
    assert len(paths) >= 4
    aside = tmp_path / "aside"
    for missing, message in [
        (paths[-1], "the replay ends at row"),
        (paths[-2], "the replay is damaged before this chunk"),
    ]:
        missing.rename(aside)
        with pytest.raises(ReplayError, match=message):
            loaded(tmp_path, state)
        aside.rename(missing)
    for path in paths[:-1]:
        path.rename(path.with_suffix(".aside"))
    with pytest.raises(ReplayError, match="the replay begins at row"):
        loaded(tmp_path, state)
    for path in paths[:-1]:
        path.with_suffix(".aside").rename(path)
    check_content(loaded(tmp_path, state), 70)

    other = new_replay(tmp_path / "other")  # the same but for its first row, which is no longer needed
    other.add(make_row(1000))
    extend(other, 69).close()
    assert [path.name for path in chunks(tmp_path / "other")] == [path.name for path in paths]
    with pytest.raises(ReplayError, match="not the replay that this checkpoint was saved with"):
        loaded(tmp_path / "other", state)
    mixed = tmp_path / "other" / "replay" / paths[-1].name
    mixed.write_bytes(paths[-1].read_bytes())
    with pytest.raises(ReplayError, match="the replay is damaged before this chunk"):
        loaded(tmp_path / "other", state)
    with pytest.raises(ReplayError, match="the replay ends at row 0, the checkpoint at 70"):
        loaded(tmp_path / "nowhere", state)
    with pytest.raises(ReplayError, match="has 20 rows per environment, this run 30"):
        loaded(tmp_path, state, ring=30)
    with pytest.raises(ReplayError, match="another kind of device"):
        loaded(tmp_path, state | {"generator": torch.zeros(16, dtype=torch.uint8)})


def test_a_count_that_no_state_has_named_is_refused(tmp_path):
    replay = extend(new_replay(tmp_path), 12)
    state = replay.state_dict()
    with pytest.raises(ReplayError, match="not the replay that this checkpoint was saved with"):
        loaded(tmp_path, state | {"rows_added": torch.tensor(10)})
    check_content(loaded(tmp_path, state), 12)


def test_other_specs_and_versions_are_refused(tmp_path):
    state = extend(new_replay(tmp_path), 5).state_dict()
    other = SPECS | {"state": ArraySpec((3,), np.float32)}
    replay = Replay(other, num_envs=NUM_ENVS, capacity=40, directory=tmp_path / "replay")
    with pytest.raises(ReplayError, match=r"holds rows of .*<f8.*, this run has .*<f4"):
        replay.load_state_dict(state)
    assert replay.rows_added == 0

    (path,) = chunks(tmp_path)
    _, nbytes, _ = chunk.CHUNK_HEADER.unpack_from(data := path.read_bytes())
    text = data[chunk.CHUNK_HEADER.size :][:nbytes].replace(b'"version": 1', b'"version": 2')
    header = chunk.CHUNK_HEADER.pack(chunk.CHUNK_MAGIC, nbytes, zlib.crc32(text))
    path.write_bytes(header + text + data[len(header) + nbytes :])
    with pytest.raises(ReplayError, match="version 2, this hdfast reads version 1"):
        loaded(tmp_path, state)


def test_the_record_is_as_documented(tmp_path):
    """Read by hand: header, crc chained from the one before, zlib, XOR, keys in order of item size."""
    replay = extend(new_replay(tmp_path), 3)
    replay.flush()
    extend(replay, 1)
    state = replay.state_dict()
    data = chunks(tmp_path)[0].read_bytes()
    assert chunks(tmp_path)[0].name == "rows-000000000000.log"
    position, crc, rows = 16 + struct.unpack_from("<I", data, 8)[0], 0, []
    while position < len(data):
        magic, nbytes, count = struct.unpack_from("<4sII", data, position)
        assert magic == b"HDFR"
        payload = data[position + 16 :][:nbytes]
        crc = zlib.crc32(data[position:][:12] + payload, crc)
        assert struct.unpack_from("<I", data, position + 12) == (crc,)
        deltas = np.frombuffer(zlib.decompress(payload, wbits=-15), np.uint8).reshape(count, -1)
        for delta in deltas:
            rows.append(delta ^ rows[-1] if rows else delta)
        position += 16 + nbytes
    assert crc == int(state["log_crc"])
    assert len(rows) == 4
    for agent_step, packed in enumerate(rows):
        row = make_row(agent_step)
        keys = ("state", "action", "reward", "image", "is_first", "is_last", "is_terminal")
        expected = b"".join(row[key].tobytes() for key in keys)
        assert packed.tobytes() == expected.ljust(-(-len(expected) // 16) * 16, b"\0")


@pytest.mark.parametrize("checkpoints", [1, 2, 5])
def test_rows_that_no_checkpoint_can_need_are_deleted(checkpoints, tmp_path, small_blocks):
    """The states asked for and two more stay loadable, and the disk does not grow with the length of the run."""
    replay, states, sizes = new_replay(tmp_path, checkpoints=checkpoints), [], []
    for _ in range(30):
        extend(replay, 25)
        states.append(replay.state_dict())
        sizes.append(nbytes(tmp_path))
    assert max(sizes) < 1.5 * sizes[checkpoints + 2]
    replay.close()
    with pytest.raises(ReplayError, match="begins at row"):
        loaded(tmp_path, states[-checkpoints - 6])
    for back in range(1, checkpoints + 3):
        check_content(loaded(tmp_path, states[-back]), 25 * (31 - back))


def test_a_resumed_run_deletes_nothing_before_it_has_saved_again(tmp_path, small_blocks):
    replay = new_replay(tmp_path)
    states = [extend(replay, 25).state_dict() for _ in range(6)]
    replay = loaded(tmp_path, states[-1])
    kept = chunks(tmp_path)
    for _ in range(2):
        extend(replay, 25).state_dict()
        assert chunks(tmp_path)[: len(kept)] == kept
    check_content(loaded(tmp_path, states[-2]), 125)


def test_a_new_start_deletes_the_rows_of_the_attempt_before(tmp_path, caplog):
    extend(new_replay(tmp_path), 30).close()
    (tmp_path / "replay" / "notes.txt").write_text("not ours")
    replay = new_replay(tmp_path)
    assert len(chunks(tmp_path)) == 2, "making a replay deletes nothing"
    extend(replay, 2)
    assert [path.name for path in chunks(tmp_path)] == ["notes.txt"]
    assert "deleting rows that no checkpoint was loaded for" in caplog.text
    check_content(loaded(tmp_path, replay.state_dict()), 2)


def test_one_replay_can_go_back_to_its_own_state(tmp_path, small_blocks):
    replay = extend(new_replay(tmp_path), 33)
    state = replay.state_dict()
    extend(replay, 41)
    replay.load_state_dict(state)
    check_content(replay, 33)
    check_content(loaded(tmp_path, extend(replay, 9).state_dict()), 42)


def test_going_back_forgets_what_could_not_be_written(tmp_path, monkeypatch):
    replay = extend(new_replay(tmp_path), 33)
    state = replay.state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", no_room)
        with pytest.raises(ReplayError):
            extend(replay, 5).flush()
    replay.load_state_dict(state)
    check_content(loaded(tmp_path, extend(replay, 9).state_dict()), 42)


def test_going_back_forgets_prefetched_batches(tmp_path):
    replay = Replay(SPECS, num_envs=NUM_ENVS, capacity=40, directory=tmp_path / "replay", place="host")
    extend(replay, 33).stage(16, 4)
    state = replay.state_dict()
    batches = []
    for _ in range(2):
        replay.load_state_dict(state)
        replay.stage(16, 4)
        batches.append({key: rows.clone() for key, rows in replay.sample(16, 4).items()})
        extend(replay, 10).stage(16, 4)
    for key, rows in batches[0].items():
        assert rows.numpy().tobytes() == batches[1][key].numpy().tobytes(), key
    replay.close()


def test_after_a_failed_load_nothing_is_there_to_sample(tmp_path):
    replay = extend(new_replay(tmp_path), 33)
    state = replay.state_dict()
    (tmp_path / "replay").rename(tmp_path / "aside")
    with pytest.raises(ReplayError, match="ends at row 0, the checkpoint at 33"):
        replay.load_state_dict(state)
    assert replay.rows_added == int(replay._rows_added) == 0
    assert not replay.ready(1)


def test_states_without_new_rows_make_no_old_one_unloadable(tmp_path, small_blocks):
    replay = new_replay(tmp_path)
    states = [extend(replay, 25).state_dict() for _ in range(5)]
    for _ in range(10):
        assert replay.state_dict().keys() == states[-1].keys()
    check_content(loaded(tmp_path, states[-1]), 125)
    check_content(loaded(tmp_path, states[-4]), 50)


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


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_one_clear_error_and_loses_nothing(tmp_path, small_blocks, monkeypatch, error):
    """The disk takes 100 more bytes, then has room again; the second time a torn tail stays behind."""
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
            with pytest.raises(ReplayError, match=re.escape(os.strerror(error))) as caught:
                extend(replay, 10)
            assert caught.value.errno == error
            assert str(chunks(tmp_path)[-1]) in str(caught.value)
            assert replay.rows_added == before + 4, "the row at which the disk failed was added"
            with pytest.raises(ReplayError):
                replay.flush()
            with pytest.raises(ReplayError):
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
        with pytest.raises(ReplayError, match="File too large") as caught:
            replay.flush()
        assert caught.value.errno == errno.EFBIG
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
        with pytest.raises(ReplayError, match="Input/output error"):
            replay.flush()
    with pytest.raises(ReplayError, match="the disk failed before"):
        replay.state_dict()
    with pytest.raises(ReplayError, match="the disk failed before"):
        replay.close()


def test_directories_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ReplayError, match=r"cannot create the replay in .*file/replay: Not a directory"):
        new_replay(tmp_path / "file")
    real = os.open

    def refuses(path, flags, *args):
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, flags, *args)

    replay = extend(new_replay(tmp_path), 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuses)
        with pytest.raises(
            ReplayError, match=r"cannot create the replay in .*rows-0+\.log: Permission denied"
        ):
            replay.flush()
    check_content(loaded(tmp_path, replay.state_dict()), 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission(tmp_path):
    replay = extend(new_replay(tmp_path), 1)
    (tmp_path / "replay").chmod(0o500)
    with pytest.raises(ReplayError, match="Permission denied"):
        replay.flush()


def test_kill_before_any_change_of_the_disk(tmp_path):
    command = [sys.executable, __file__, str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert output.returncode == 0, output.stdout + output.stderr
    rows, nbytes_cut = zip(*(map(int, line.split()) for line in output.stdout.splitlines()), strict=True)
    assert len(rows) > 50
    assert list(rows) == sorted(rows)
    assert rows[-1] > 200, "the runs that were killed did not go on"
    assert sum(nbytes > 0 for nbytes in nbytes_cut) > 30, "hardly a kill left anything behind the position"


CHANGES = ("mkdir", "open", "pwrite", "fsync", "ftruncate", "truncate", "unlink", "replace")


def _die_before_change(number: int) -> None:
    """From now on this process counts its calls that may change the disk and dies by kill -9 before that one."""
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
    """Fork `_add_rows` on what the last one left, killed before its first, second, ... change, until one is through.

    Prints what comes back after each: its rows, and the bytes behind them that were cut off.
    """
    log.BLOCK_BYTES, log.CHUNK_BYTES = 4 * new_packed_nbytes(), 2500
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
