"""The log: what is read back, cut off, refused and deleted."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from hdfast.envs import ArraySpec
from hdfast.replay import Replay, ReplayError, chunk
from hdfast.runtime.errors import DiskFullError
from tests.replay_log_cases import (
    NUM_ENVS,
    SPECS,
    check_content,
    chunks,
    extend,
    loaded,
    make_blocks_small,
    make_row,
    nbytes,
    new_replay,
    no_room,
)


@pytest.fixture
def small_blocks(monkeypatch):
    """Records of 4 rows, chunks of about 20 rows."""
    make_blocks_small(monkeypatch.setattr)


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
    for agent_step in range(rows, rows + 30):  # the second goes on as the first would have
        second.add(make_row(agent_step))
    again = loaded(tmp_path, second.state_dict())
    check_content(again, rows + 30)
    assert torch.equal(again.sample(16, 5)["image"], second.sample(16, 5)["image"])


@pytest.mark.parametrize("rows", [3, 37])
def test_a_larger_ring_takes_what_a_smaller_one_held(rows, tmp_path, small_blocks):
    state = extend(new_replay(tmp_path, ring=37), rows).state_dict()
    second = loaded(tmp_path, state, ring=90)
    for agent_step in range(rows, 80):
        second.add(make_row(agent_step))
    check_content(second, 80)
    check_content(loaded(tmp_path, second.state_dict(), ring=90), 80)


@pytest.mark.parametrize("rows", [0, 3, 20])
def test_a_smaller_ring_takes_what_it_has_room_for(rows, tmp_path, small_blocks):
    state = extend(new_replay(tmp_path, ring=37), rows).state_dict()
    second = extend(loaded(tmp_path, state, ring=20), 50)
    check_content(second, rows + 50)
    check_content(loaded(tmp_path, second.state_dict(), ring=20), rows + 50)


def test_another_ring_is_refused_where_one_has_gone_round(tmp_path, small_blocks):
    for rows, saved, ring in ((21, 20, 19), (21, 20, 21), (20, 20, 19), (21, 37, 20)):
        folder = tmp_path / f"{rows} {saved} {ring}"
        folder.mkdir()
        state = extend(new_replay(folder, ring=saved), rows).state_dict()
        told = f"the checkpoint has {saved} rows per environment, this run {ring}"
        with pytest.raises(ReplayError, match=told):
            loaded(folder, state, ring=ring)
        check_content(loaded(folder, state, ring=saved), rows)


def test_default_block_and_chunk_sizes(tmp_path):
    """More than a megabyte of rows: several records in one chunk."""
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
    """For every length of the last file: all that the checkpoint needs is read, or an error leaves it untouched."""
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


def test_a_record_that_begins_like_none_is_damage_however_long_it_claims_to_be(tmp_path):
    """Not a torn one, after which the rows would be cut or passed over."""
    replay = extend(new_replay(tmp_path), 3)
    replay.flush()
    state = extend(replay, 3).state_dict()
    replay.close()
    (chunk,) = chunks(tmp_path)
    data = bytearray(chunk.read_bytes())
    begin = data.rindex(b"HDFR")
    data[begin : begin + 12] = b"\xff" * 12
    chunk.write_bytes(data)
    with pytest.raises(ReplayError, match=f"the replay is damaged at byte {begin}"):
        loaded(tmp_path, state)


def test_a_replay_holds_one_file_until_it_is_closed(tmp_path, small_blocks):
    def held() -> int:
        links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        return sum(link.startswith(str(tmp_path)) for link in links)

    replay = extend(new_replay(tmp_path), 50)
    state = replay.state_dict()
    assert len(chunks(tmp_path)) > 1
    replay.load_state_dict(state)
    assert held() == 0
    extend(replay, 50)
    assert held() == 1
    replay.close()
    assert held() == 0


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

    other = new_replay(tmp_path / "other")  # the same except for its first row, which is no longer needed
    other.add(make_row(1000))
    extend(other, 69).close()
    assert [path.name for path in chunks(tmp_path / "other")] == [path.name for path in paths]
    with pytest.raises(ReplayError, match="not the replay that this checkpoint was saved with"):
        loaded(tmp_path / "other", state)
    mixed = tmp_path / "other" / "replay" / paths[-1].name
    mixed.write_bytes(paths[-1].read_bytes())
    with pytest.raises(ReplayError, match="the replay is damaged before this chunk"):
        loaded(tmp_path / "other", state)
    with pytest.raises(ReplayError, match=r"at row 0, the checkpoint at 70; restore it .* by --init-from$"):
        loaded(tmp_path / "nowhere", state)
    with pytest.raises(
        ReplayError, match="20 rows per environment, this run 30; give the earlier --replay settings"
    ):
        loaded(tmp_path, state, ring=30)


def test_the_state_of_another_kind_of_device_is_taken(tmp_path):
    """The card may have had less memory, or may be gone; the rows are the same."""
    state = extend(new_replay(tmp_path), 12).state_dict()
    check_content(loaded(tmp_path, state | {"generator": torch.zeros(16, dtype=torch.uint8)}), 12)


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
    told = r"holds rows of another environment: \S+ float64 \S+, now float32 .*; go on with the earlier env.* --seed$"
    with pytest.raises(ReplayError, match=told):
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
    """The states to be kept and two more can be loaded, and disk use does not grow with the length of the run."""
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


def test_the_first_row_that_a_state_needs_is_in_the_first_chunk(tmp_path, small_blocks):
    """With a state at every row, including the first and the last of a chunk."""
    replay, places = new_replay(tmp_path), set()
    for row in range(1, 150):
        extend(replay, 1).state_dict()
        begins = [int(path.stem.removeprefix("rows-")) for path in chunks(tmp_path)]
        needed = max(row - 3 - replay.ring, 0)  # by the oldest of two states that are kept and two more
        assert begins[0] <= needed
        assert all(needed < begin for begin in begins[1:])
        places |= {needed - begins[0], *(begin - needed for begin in begins[1:])}
    assert {0, 1} <= places


def test_a_resumed_run_deletes_nothing_before_it_has_saved_again(tmp_path, small_blocks):
    replay = new_replay(tmp_path)
    states = [extend(replay, 25).state_dict() for _ in range(6)]
    replay = loaded(tmp_path, states[-1])
    kept = chunks(tmp_path)
    for _ in range(2):
        extend(replay, 25).state_dict()
        assert chunks(tmp_path)[: len(kept)] == kept
    check_content(loaded(tmp_path, states[-2]), 125)


def test_a_new_start_deletes_the_rows_of_the_attempt_before(tmp_path, capsys):
    extend(new_replay(tmp_path), 30).close()
    (tmp_path / "replay" / "notes.txt").write_text("not ours")
    replay = new_replay(tmp_path)
    assert len(chunks(tmp_path)) == 2, "making a replay deletes nothing"
    extend(replay, 2)
    assert [path.name for path in chunks(tmp_path)] == ["notes.txt"]
    assert "deleting rows that no checkpoint was loaded for" in capsys.readouterr().err
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
        with pytest.raises(DiskFullError):
            extend(replay, 5).flush()
    replay.load_state_dict(state)
    check_content(loaded(tmp_path, extend(replay, 9).state_dict()), 42)


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
