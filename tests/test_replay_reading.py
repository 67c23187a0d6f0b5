"""The reader of a run's episodes: what it gives, of runs and of logs, whole, torn, dropped and damaged.

Axes: N environments, T rows of an episode.
"""

import errno
import inspect
import io
import json
import os
import re
import signal
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

import hdfast
from hdfast.agent import open_loop as open_loop_module
from hdfast.agent.learner import Learner
from hdfast.agent.open_loop import open_loop
from hdfast.envs.base import ArraySpec, ContinuousActions
from hdfast.replay import Replay, ReplayError, episodes
from hdfast.runtime.errors import ConfigError, Interrupted, RunError
from hdfast.runtime.rundir import RunDir
from hdfast.trained import load
from tests.loop_cases import (
    differing,
    lines,
    one_thread,  # noqa: F401
    path_of,
    saved,
    script,
    stop_in,
    tiny,
    train,
)
from tests.replay_log_cases import NUM_ENVS, chunks, extend, loaded, make_blocks_small, make_row, new_replay

FLAGS = ("is_first", "is_last", "is_terminal")


@pytest.fixture
def run(tmp_path):
    """The directory of a run without rows."""
    (tmp_path / "config.json").write_text(json.dumps({"config": {}, "created": {}, "resumed": []}))
    return tmp_path


@pytest.fixture
def small_blocks(monkeypatch):
    """Records of 4 rows, chunks of about 20 rows."""
    make_blocks_small(monkeypatch.setattr)


def expected(rows):
    """The episodes of rows (N, ...), cut row by row, in the order in which they end."""
    found, held = [], [[] for _ in range(9)]
    for row in rows:
        envs = range(len(row["reward"]))
        for env in envs:
            if held[env] and row["is_first"][env]:
                found.append(held[env])
                held[env] = []
        for env in envs:
            held[env].append({key: array[env] for key, array in row.items()})
            if row["is_last"][env]:
                found.append(held[env])
                held[env] = []
    found += filter(None, held)
    return [{key: np.stack([row[key] for row in episode]) for key in episode[0]} for episode in found]


def check(found, rows):
    found, wanted = list(found), expected(rows)
    assert [len(episode["reward"]) for episode in found] == [len(episode["reward"]) for episode in wanted]
    for episode, other in zip(found, wanted, strict=True):
        assert episode.keys() == other.keys()
        for key, array in episode.items():
            assert array.dtype == other[key].dtype, key
            assert array.tobytes() == other[key].tobytes(), key
            assert array.flags.writeable
            assert array.flags.owndata


def content(directory):
    """All that is below a directory, with its times."""
    paths = sorted(directory.rglob("*"))
    return [(path, path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None) for path in paths]


def scripted_rows(made):
    """The rows that scripted environments returned and got an action for."""
    return [
        {
            **step.obs,
            "action": action,
            "reward": step.reward,
            **{key: getattr(step, key) for key in FLAGS},
        }
        for env in made
        for step, action in zip(env.rows, env.sent, strict=False)
    ]


@pytest.fixture(scope="module")
def catch(tmp_path_factory):
    """A finished run of Catch."""
    config = tiny(tmp_path_factory.mktemp("catch"))
    train(config)
    return config


def test_a_run_of_catch(catch):
    before = content(path_of(catch))
    found = list(episodes(str(path_of(catch))))
    scores = lines(catch, "scores", kind="episode")
    assert [episode["reward"].sum() for episode in found] == [line["score"] for line in scores]
    assert [len(episode["reward"]) - 1 for episode in found] == [line["length"] for line in scores]
    for episode in found:
        count = len(episode["reward"])
        assert list(episode) == ["image", "action", "reward", "is_first", "is_last", "is_terminal"]
        assert episode["image"].shape == (count, 16, 16, 3)
        assert {key: str(array.dtype) for key, array in episode.items()} == {
            "image": "uint8",
            "action": "int32",
            "reward": "float32",
            **dict.fromkeys(FLAGS, "bool"),
        }
        assert episode["is_first"].tolist() == [True] + [False] * (count - 1)
        assert episode["is_last"].tolist() == [False] * (count - 1) + [True]
    assert content(path_of(catch)) == before


@pytest.mark.parametrize("options", [{}, {"actions": ContinuousActions(2), "state": True}], ids=str)
def test_scripted_rows_of_several_environments(tmp_path, monkeypatch, options):
    made = script(monkeypatch, **options)
    config = tiny(tmp_path, env={"num_envs": 3}, agent_steps=60)
    train(config)
    rows = scripted_rows(made["train"])
    assert len(rows) == 20
    check(episodes(path_of(config)), rows)
    found = list(episodes(path_of(config)))
    whole = [episode for episode in found if episode["is_last"][-1]]
    assert [len(episode["reward"]) for episode in whole].count(4) == 5  # of the first environment
    assert found[: len(whole)] == whole  # those under way come last
    assert 0 < len(found) - len(whole) <= 3
    assert {bool(episode["is_terminal"][-1]) for episode in whole} == {True, False}


def test_a_stop_cuts_episodes_off_and_a_kill_s_rows_are_there_until_it_is_resumed(tmp_path, monkeypatch):
    made = script(monkeypatch)
    config = tiny(tmp_path)
    with monkeypatch.context() as patch:
        stop_in(patch, 6)
        with pytest.raises(Interrupted):
            train(config)
    check(episodes(path_of(config)), first := scripted_rows(made["train"]))
    assert len(first) == 11
    specs = {key: ArraySpec(array.shape[1:], array.dtype) for key, array in first[0].items()}
    killed = Replay(specs, directory=path_of(config) / "replay", num_envs=2, capacity=40)
    killed.load_state_dict(saved(config).part("replay."))
    killed.add(first[0])
    killed.close()
    check(episodes(path_of(config)), [*first, first[0]])
    train(config)
    rows = scripted_rows(made["train"])
    assert len(rows) == 20
    check(episodes(path_of(config)), rows)
    cut = [e for e in list(episodes(path_of(config)))[:-2] if not e["is_last"][-1]]
    assert len(cut) == 2
    assert all(episode["is_first"][0] for episode in cut)


def test_a_run_in_training_is_read_and_goes_on_as_if_it_were_not(tmp_path, monkeypatch):
    config, other = tiny(tmp_path / "one", checkpoint={"seconds": 0}), tiny(tmp_path / "two")
    step, seen = Learner.step, []

    def reading(self, sample):
        before = content(path_of(config) / "replay")
        seen.append(sum(len(episode["reward"]) for episode in episodes(path_of(config))))
        assert content(path_of(config) / "replay") == before
        step(self, sample)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", reading)
        train(config)
    train(other)
    assert differing(saved(config), saved(other)) <= {"replay.log_crc"}  # of other blocks
    assert seen == sorted(seen)
    assert len(set(seen)) > 3
    assert seen[-1] == 38


@pytest.mark.parametrize("count", [1, 4, 5, 57, 200])
def test_episodes_across_blocks_and_files(count, run, small_blocks):
    extend(new_replay(run, ring=300), count).close()
    assert (len(chunks(run)) > 5) == (count == 200)
    check(episodes(run), map(make_row, range(count)))


def test_a_torn_end_is_not_there_yet(run, small_blocks):
    extend(new_replay(run, ring=300), 30).close()
    last = chunks(run)[-1]
    begin, data = int(last.stem.removeprefix("rows-")), last.read_bytes()
    counts = []
    for end in [*range(0, len(data), 5), len(data)]:
        last.write_bytes(data[:end])
        found = list(episodes(run))
        counts.append(sum(len(episode["reward"]) for episode in found) // NUM_ENVS)
        if counts[-1] not in counts[:-1]:
            check(found, map(make_row, range(counts[-1])))
    assert counts[0] == begin
    assert counts == sorted(counts)
    assert set(counts) == {begin, *range(begin + 4, 30, 4), 30}


def test_a_run_drops_its_oldest_rows(run, small_blocks):
    replay = new_replay(run, ring=20)
    for _ in range(10):
        extend(replay, 20).state_dict()
    replay.close()
    begin = int(chunks(run)[0].stem.removeprefix("rows-"))
    assert 0 < begin <= 180
    check(episodes(run), map(make_row, range(begin, 200)))


def test_rows_that_are_dropped_while_they_are_read(run, small_blocks):
    extend(new_replay(run, ring=300), 200).close()
    reading = episodes(run)
    found = [next(reading)]
    files = chunks(run)
    begins = [int(path.stem.removeprefix("rows-")) for path in files]
    for path in files[:3]:
        path.unlink()
    found += reading
    wanted = expected(map(make_row, range(begins[1]))) + expected(map(make_row, range(begins[3], 200)))
    assert [e["reward"].tolist() for e in found] == [e["reward"].tolist() for e in wanted]


@pytest.mark.parametrize("reads", [0, 2, 5], ids=["header", "layout", "rows"])
def test_a_disk_that_fails_while_it_is_read_is_one_clear_error(reads, run, monkeypatch):
    extend(new_replay(run), 3).close()
    (path,), left, opened = chunks(run), iter(range(reads)), Path.open

    class Failing(io.FileIO):
        def read(self, *size):
            if next(left, None) is None:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().read(*size)

    monkeypatch.setattr(Path, "open", lambda at, *a, **k: Failing(at) if at == path else opened(at, *a, **k))
    with pytest.raises(RunError, match=f"^{path}: cannot read the replay: Input/output error$"):
        list(episodes(run))


def test_a_file_that_vanishes_between_others_is_an_error_and_no_gap(run, small_blocks):
    extend(new_replay(run, ring=300), 200).close()
    reading = episodes(run)
    next(reading)
    gone = chunks(run)[4]
    gone.unlink()
    with pytest.raises(ReplayError, match=f"^{gone}: the file is gone"):
        list(reading)


def test_a_run_that_is_resumed_from_an_earlier_checkpoint_while_it_is_read(run, small_blocks):
    replay = extend(new_replay(run, ring=300), 50)
    state = replay.state_dict()
    extend(replay, 100).close()
    reading = episodes(run)
    next(reading)
    loaded(run, state, ring=300).close()
    with pytest.raises(ReplayError, match=r"rows-0+\d+\.log: the file is gone: .*; read the run again"):
        list(reading)
    check(episodes(run), map(make_row, range(50)))


def test_damage_is_told_after_what_comes_before_it(run, small_blocks):
    extend(new_replay(run, ring=300), 100).close()
    files = chunks(run)
    data = files[2].read_bytes()
    changed = bytearray(data)
    changed[-1] ^= 1
    files[2].write_bytes(changed)
    reading, found = episodes(run), []
    with pytest.raises(ReplayError, match=rf"^{files[2]}: the replay is damaged at byte \d+; [^\n]*$"):
        found.extend(reading)
    before = expected(map(make_row, range(int(files[2].stem.removeprefix("rows-")))))
    assert sum(episode["is_last"][-1] for episode in found) >= sum(e["is_last"][-1] for e in before)
    files[2].write_bytes(data[:10])  # torn, but not the last
    with pytest.raises(ReplayError, match="damaged at byte 0"):
        list(episodes(run))
    files[2].write_bytes(data[:-1])
    with pytest.raises(ReplayError, match=f"^{files[3]}: the replay is damaged before this chunk"):
        list(episodes(run))
    files[2].unlink()
    with pytest.raises(ReplayError, match=f"^{files[3]}: the replay is damaged before this chunk"):
        list(episodes(run))
    files[0].write_bytes(b"something else entirely")
    with pytest.raises(ReplayError, match=f"^{files[0]}: the replay is damaged at byte 0"):
        list(episodes(run))


def test_what_cannot_be_read_is_told_at_once_in_one_line(catch, run):
    here = re.escape(str(run))
    with pytest.raises(RunError, match=f"^{here}/none: there is no run here"):
        episodes(run / "none")
    with pytest.raises(RunError, match=f"^{here}/replay: there are no rows here; [^\n]*$"):
        episodes(run)
    (run / "replay").mkdir()
    with pytest.raises(RunError, match=f"there is no run here .*; try {here}$"):
        episodes(run / "replay")
    with pytest.raises(ConfigError, match=f"this is not a run, it holds 1; try .*{path_of(catch).name}"):
        episodes(catch.logdir)


def test_memory_holds_little_of_a_large_replay(run):
    flag = ArraySpec((), np.dtype(bool))
    specs = {"image": ArraySpec((64, 64, 3), np.uint8), "action": ArraySpec((2,), np.float32)}
    specs |= {"reward": ArraySpec((), np.float32), **dict.fromkeys(FLAGS, flag)}
    replay = Replay(specs, num_envs=2, capacity=20, directory=run / "replay")
    row = {key: np.zeros((2, *spec.shape), spec.dtype) for key, spec in specs.items()}
    for number in range(2000):  # 49 MB
        row["is_first"][:], row["image"][:] = number % 20 == 0, number % 256
        replay.add(row)
    replay.close()
    tracemalloc.start()
    try:
        count = sum(1 for _ in episodes(run))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 200
    assert peak < 8e6


def test_the_replay_of_a_run_that_another_process_holds_is_not_opened(tmp_path, monkeypatch):
    run = tmp_path / "demo/Catch/seed0"
    with RunDir.open(tmp_path, "demo", "Catch", 0, {"a": 1}):
        state = extend(new_replay(run), 5).state_dict()  # the holder itself may
        extend(loaded(run, state), 5).close()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            RunDir.open(tmp_path, "demo", "Catch", 0, {"a": 1})
            os.write(writer, b"1")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    assert os.read(reader, 1) == b"1"
    before = content(run)
    try:
        told = (
            rf"^{run}: this run is in use by process {child} on \S+ since \S+; hdfast\.replay\.episodes reads"
        )
        with pytest.raises(RunError, match=told):
            new_replay(run)
        monkeypatch.setattr(os, "getpid", lambda: child)  # as a process of another container may be called
        with pytest.raises(RunError, match=told):
            new_replay(run)
        check(episodes(run), map(make_row, range(10)))
        assert content(run) == before
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
    new_replay(run).close()  # the killed one's lock is gone
    with RunDir.open(tmp_path, "demo", "Catch", 0, {"a": 1}):
        pass


def test_open_loop_of_an_episode_as_documented(catch):
    code = re.search(r"::\n\n((?: {4}.*\n)+)", inspect.getdoc(open_loop))[1]
    code = re.sub(r"^ +", "", code, flags=re.MULTILINE).replace("runs/demo/Catch/seed0", str(path_of(catch)))
    with load(path_of(catch), device="cpu") as trained:
        seen = {"hdfast": hdfast, "torch": torch, "trained": trained, "open_loop": open_loop}
        exec(code, seen)
        learner, batch = seen["learner"], seen["batch"]
        assert seen["images"].shape == (10, 16, 16, 3)
        all_seen = open_loop(learner, batch, context=10)["image"]
        assert torch.equal(seen["images"][:5], all_seen[:5, 0])
        assert torch.equal(open_loop(learner, batch, context=99)["image"], all_seen)
        fewer = open_loop(learner, batch, context=2)["image"][:, 0]
        assert torch.equal(fewer[:2], seen["images"][:2])
        assert not torch.equal(fewer[2:5], seen["images"][2:5])
    assert open_loop_module.CONTEXT == 5


def test_the_readme_s_returns(catch):
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(from hdfast\.replay import .*?)```", text, re.DOTALL)
    seen = {}
    exec(code.replace("runs/demo/Catch/seed0", str(path_of(catch))), seen)
    assert seen["returns"] == [line["score"] for line in lines(catch, "scores", kind="episode")]
