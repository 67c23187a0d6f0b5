import json
import math
import os
import resource
import shutil
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from hdfast.runtime import tensorboard
from hdfast.runtime.errors import DiskFullError, MissingLibraryError, RunError
from hdfast.runtime.logger import Logger, cut, to_host
from tests.loop_cases import open_files


def lines(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def events(directory):
    return EventAccumulator(
        str(directory / "tensorboard"), size_guidance={"scalars": 0, "images": 0}
    ).Reload()


def curve(directory, tag):
    return [(event.step, event.value) for event in events(directory).Scalars(tag)]


def test_lines_and_curves(tmp_path, monkeypatch):
    now = [5.0]
    monkeypatch.setattr("hdfast.runtime.logger.time", SimpleNamespace(monotonic=lambda: now[0]))
    with Logger(tmp_path, action_repeat=4, seconds=100.0) as logger:
        now[0] += 1.25
        returned = logger.log(500, 20, {"loss/image": torch.tensor(0.1), "loss/kl": 2.5})
        logger.score("episode", agent_steps=510, score=-20.0, length=800, env=1)
        logger.score("evaluation", agent_steps=600, score=-19.5, length=810.5, scores=[-20.0, -19.0])
        logger.score("episode", agent_steps=610, score=1.0, length=9, success=True)
        logger.score("evaluation", agent_steps=700, score=1.0, length=9, success=0.75)
        assert logger.seconds == 101.25
    assert returned == {"loss/image": 0.1, "loss/kl": 2.5}
    (metric,) = lines(tmp_path / "metrics.jsonl")
    assert metric.pop("seconds") == 101.25
    assert metric == {"agent_steps": 500, "frames": 2000, "updates": 20, "loss/image": 0.1, "loss/kl": 2.5}
    episode, evaluation, *_ = lines(tmp_path / "scores.jsonl")
    assert {**episode, "seconds": 0} == {
        "kind": "episode",
        "agent_steps": 510,
        "frames": 2040,
        "seconds": 0,
        "score": -20.0,
        "length": 800,
        "env": 1,
    }
    assert evaluation["scores"] == [-20.0, -19.0]
    assert curve(tmp_path, "loss/kl") == [(500, 2.5)]
    assert curve(tmp_path, "updates") == [(500, 20.0)]
    assert curve(tmp_path, "score/evaluation") == [(600, -19.5), (700, 1.0)]
    assert curve(tmp_path, "length/episode") == [(510, 800.0), (610, 9.0)]
    assert curve(tmp_path, "success/episode") == [(610, 1.0)]
    assert curve(tmp_path, "success/evaluation") == [(700, 0.75)]


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    logger = Logger(tmp_path, action_repeat=1)
    logger.log(1, 0, {"x": 1.0})
    logger.score("episode", agent_steps=1, score=1.0, length=1)
    assert len(lines(tmp_path / "metrics.jsonl")) == len(lines(tmp_path / "scores.jsonl")) == 1
    assert curve(tmp_path, "x") == [(1, 1.0)]
    logger.sync()
    logger.close()
    logger.close()


def test_non_finite_numbers_are_json_and_can_be_read_back(tmp_path):
    with Logger(tmp_path, action_repeat=1) as logger:
        logger.log(1, 0, {"a": torch.tensor(float("nan")), "b": float("-inf"), "c": np.float32(np.inf)})
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert (line["a"], line["b"], line["c"]) == ("NaN", "-Infinity", "Infinity")
    assert math.isnan(float(line["a"]))
    assert math.isnan(curve(tmp_path, "a")[0][1])


def test_to_host_keeps_order_kinds_and_short_decimals():
    metrics = {
        "python": 1.5,
        "float32": torch.tensor([0.1]),
        "count": torch.tensor(2**40),
        "bfloat16": torch.tensor(0.1, dtype=torch.bfloat16),
        "float64": torch.tensor(0.1, dtype=torch.float64),
        "grad": torch.tensor(3.0, requires_grad=True),
    }
    values = to_host(metrics)
    assert list(values.items()) == [
        ("python", 1.5),
        ("float32", 0.1),
        ("count", 2**40),
        ("bfloat16", 0.100097656),
        ("float64", 0.1),
        ("grad", 3.0),
    ]
    assert isinstance(values["count"], int)


def test_to_host_copies_once(monkeypatch):
    copies = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: copies.append(self.shape) or tolist(self))
    monkeypatch.setattr(torch.Tensor, "item", None)
    to_host({str(i): torch.tensor(float(i)) for i in range(50)})
    assert copies == [(50,)]


def test_a_metric_cannot_take_the_name_of_a_column(tmp_path):
    with (
        Logger(tmp_path, action_repeat=1, tensorboard=False) as logger,
        pytest.raises(ValueError, match="cannot be named \\['seconds', 'updates'\\]"),
    ):
        logger.log(1, 0, {"updates": 1.0, "seconds": 2.0, "fine": 3.0})
    assert lines(tmp_path / "metrics.jsonl") == []
    assert not (tmp_path / "tensorboard").exists()


def write_history(directory, steps, value, **options):
    with Logger(directory, action_repeat=4, **options) as logger:
        for agent_steps in steps:
            logger.log(agent_steps, agent_steps, {"x": value})
            logger.score("episode", agent_steps=agent_steps, score=value, length=1)


def test_a_resumed_run_has_one_history(tmp_path, monkeypatch):
    write_history(tmp_path, [100, 200, 300, 400], 1.0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"agent_steps": 150, "fra')  # killed while it was writing
    (event_file,) = (tmp_path / "tensorboard").iterdir()
    event_file.rename(event_file.with_name("events.out.tfevents.0000000000.earlier"))
    with open(event_file.with_name("events.out.tfevents.0000000000.earlier"), "ab") as file:
        file.write(b"\x09\x00\x00")
    write_history(tmp_path, [250, 300], 2.0, resumed_at=200, seconds=50.0)
    expected = [(100, 1.0), (200, 1.0), (250, 2.0), (300, 2.0)]
    assert [(line["agent_steps"], line["x"]) for line in lines(tmp_path / "metrics.jsonl")] == expected
    assert [(line["agent_steps"], line["score"]) for line in lines(tmp_path / "scores.jsonl")] == expected
    assert curve(tmp_path, "x") == expected
    assert lines(tmp_path / "metrics.jsonl")[2]["seconds"] >= 50


def test_a_clock_that_was_set_back_does_not_bring_the_past_behind_the_present(tmp_path, monkeypatch):
    for now, steps, value, resumed_at in (
        (2_000_000_000, [100, 200, 300], 1.0, None),
        (1_700_000_000, [250, 300], 2.0, 200),  # TensorBoard reads the files of a directory by name
        (1_700_000_000, [300], 3.0, 250),
    ):
        monkeypatch.setattr(tensorboard.time, "time", lambda now=now: now)
        write_history(tmp_path, steps, value, resumed_at=resumed_at)
    assert curve(tmp_path, "x") == [(100, 1.0), (200, 1.0), (250, 2.0), (300, 3.0)]


def test_an_evaluation_that_comes_again_is_shown_once(tmp_path):
    """And no other value of its step is lost."""
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    with Logger(tmp_path, action_repeat=1) as logger:
        for agent_steps in (100, 200, 300):
            logger.log(agent_steps, 7, {"x": math.inf, "y": torch.tensor(0.1)})
            logger.score("episode", agent_steps=agent_steps, score=1.0, length=1)
            logger.score("episode", agent_steps=agent_steps, score=2.0, length=2)
            logger.video("open_loop_a", agent_steps=agent_steps, frames=frames)
            logger.score("evaluation", agent_steps=agent_steps, score=1.0, length=1)
    shutil.copy(tmp_path / "videos/open_loop_a_0000000200.gif", tmp_path / "videos/evaluate_0000000200.gif")
    (event_file,) = (tmp_path / "tensorboard").iterdir()
    event_file.rename(event_file.with_name("events.out.tfevents.0000000000.earlier"))
    with Logger(tmp_path, action_repeat=1, resumed_at=200, evaluated_at=100) as logger:
        logger.score("evaluation", agent_steps=200, score=3.0, length=9)
    assert curve(tmp_path, "score/evaluation") == [(100, 1.0), (200, 3.0)]
    assert curve(tmp_path, "length/evaluation") == [(100, 1.0), (200, 9.0)]
    assert curve(tmp_path, "score/episode") == [(step, score) for step in (100, 200) for score in (1.0, 2.0)]
    assert curve(tmp_path, "x") == [(100, math.inf), (200, math.inf)]
    assert curve(tmp_path, "y") == [(100, np.float32(0.1)), (200, np.float32(0.1))]
    assert curve(tmp_path, "updates") == [(100, 7.0), (200, 7.0)]
    assert events(tmp_path).Tags()["images"] == ["open_loop_a"]
    assert [event.step for event in events(tmp_path).Images("open_loop_a")] == [100, 200]
    told = [
        (line["agent_steps"], line["score"])
        for line in lines(tmp_path / "scores.jsonl")
        if line["kind"] != "episode"
    ]
    assert told == [(100, 1.0), (200, 3.0)]


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    write_history(tmp_path, [0, 100], 1.0)
    (event_file,) = (tmp_path / "tensorboard").iterdir()
    event_file.rename(event_file.with_name("events.out.tfevents.0000000000.earlier"))
    write_history(tmp_path, [0, 50], 2.0)
    assert [(line["agent_steps"], line["x"]) for line in lines(tmp_path / "metrics.jsonl")] == [
        (0, 2.0),
        (50, 2.0),
    ]
    assert curve(tmp_path, "x") == [(0, 2.0), (50, 2.0)]


def test_cut_leaves_a_log_that_needs_none_untouched_and_tells_of_damaged_lines(tmp_path, capfd):
    path = tmp_path / "x.jsonl"
    cut(path, 5)
    assert not path.exists()
    path.write_text('{"agent_steps": 1}\n{"agent_steps": 5}\n')
    inode = path.stat().st_ino
    cut(path, 5)
    assert path.stat().st_ino == inode
    path.write_text(
        '{"agent_steps": 1}\nnot json\n[]\n{}\n{"agent_steps": "2"}\n{"agent_steps": 6}\n{"agent_steps": 2}'
    )
    cut(path, 5)
    assert path.read_text() == '{"agent_steps": 1}\n'
    assert capfd.readouterr().err == f"warning: {path}: left out what was damaged: line 2, 3, 4, 5\n"
    path.write_text("not json\n" * 9)
    cut(path, 5)
    assert capfd.readouterr().err == f"warning: {path}: left out what was damaged: line 1, 2, 3, 4, 5, ...\n"
    path.write_text('{"agent_steps": 1}\n{"agent_st')
    cut(path, 5)
    assert path.read_text() == '{"agent_steps": 1}\n'
    assert not capfd.readouterr().err


def test_evaluations_that_a_checkpoint_does_not_know_are_cut(tmp_path):
    path = tmp_path / "x.jsonl"
    told = [("episode", 4), ("evaluation", 4), ("episode", 8), ("evaluation", 8), ("episode", 12)]
    rows = [json.dumps({"kind": kind, "agent_steps": steps}) + "\n" for kind, steps in told]
    path.write_text("".join(rows))
    cut(path, 8, 8)
    assert path.read_text() == "".join(rows[:4])
    cut(path, 8, 4)
    assert path.read_text() == "".join(rows[:3])


def test_a_full_disk_is_told_and_the_log_goes_on_from_it(tmp_path):
    logger = Logger(tmp_path, action_repeat=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(DiskFullError, match=r"metrics.jsonl: cannot write the log: File too large; make"):
            deque(logger.log(agent_steps, 0, {}) for agent_steps in range(100))
        curves, told = logger._tensorboard, []
        with pytest.raises(
            DiskFullError, match=r"tfevents\S+: cannot write TensorBoard files: File too large"
        ):
            deque(told.append(curves.scalars(agent_steps, {"x": 1.0})) for agent_steps in range(100))
        logger.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.path.getsize(tmp_path / "metrics.jsonl") == 1000  # the last line is torn
    assert len(curve(tmp_path, "x")) == len(told)  # no torn record was taken for a complete one
    write_history(tmp_path, [1000], 1.0, resumed_at=5)
    assert [line["agent_steps"] for line in lines(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5, 1000]


def test_a_directory_that_is_not_there_is_one_clear_line(tmp_path):
    with pytest.raises(RunError, match=r"metrics.jsonl: cannot write the log: No such file or directory"):
        Logger(tmp_path / "absent", action_repeat=1)


def test_tensorboard_knows_the_settings_of_a_run(tmp_path):
    for resumed_at in (None, 100):
        settings = {"harmony.mode": "off", "train.ratio": 64.0, "seed": 3, "train.tune": True, "task": None}
        with Logger(tmp_path, action_repeat=1, settings=settings, resumed_at=resumed_at):
            pass
    (content,) = events(tmp_path).PluginTagToContent("hparams").values()
    told = HParamsPluginData.FromString(content).session_start_info.hparams
    assert {name: getattr(value, value.WhichOneof("kind")) for name, value in told.items()} == {
        **settings,
        "task": "None",
    }


@pytest.mark.parametrize(("owner", "part"), [(Logger, "_show_again"), (tensorboard.TensorBoard, "_write")])
def test_logs_that_cannot_all_be_opened_are_closed(tmp_path, monkeypatch, owner, part):
    def fail(*args, **kwargs):
        raise RuntimeError("too late")

    monkeypatch.setattr(owner, part, fail)
    with pytest.raises(RuntimeError, match="too late"):  # whose traceback keeps the logger alive
        Logger(tmp_path, action_repeat=1, resumed_at=2, evaluated_at=1)
    assert open_files(tmp_path) == []


def test_a_video_is_a_gif_in_videos_and_among_the_images(tmp_path):
    frames = np.zeros((5, 64, 128, 3), np.uint8)
    frames[np.arange(5), :, np.arange(5) * 16] = 255
    with Logger(tmp_path, action_repeat=4) as logger:
        path = logger.video("open_loop", agent_steps=700, frames=frames)
    assert path == tmp_path / "videos" / "open_loop_0000000700.gif"
    with Image.open(path) as image:
        assert (image.size, image.n_frames) == ((512, 256), 5)
    (event,) = events(tmp_path).Images("open_loop")
    assert (event.step, event.width, event.height) == (700, 512, 256)
    assert event.encoded_image_string == path.read_bytes()


def test_a_missing_tensorboard_names_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboard.compat.proto", None)
    with pytest.raises(MissingLibraryError, match=r"pip install tensorboard, or --log.no-tensorboard$"):
        tensorboard.TensorBoard(tmp_path)
