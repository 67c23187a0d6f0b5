"""What can go wrong around a run: each gives one clear line and its exit code, and nothing saved is lost."""

import contextlib
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hdfast import loop, train
from hdfast.agent.learner import Learner
from hdfast.agent.world_model import WorldModel
from hdfast.envs import base
from hdfast.runtime import checkpoint
from hdfast.runtime.errors import NonFiniteError
from hdfast.session import Session
from hdfast_kernels import dispatch, native
from tests import loop_cases
from tests.loop_cases import (
    differing,
    door,
    flags,
    lines,
    one_thread,  # noqa: F401
    path_of,
    saved,
    tiny,
)


@contextlib.contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    """No file of this process may grow beyond a limit: the errors of a full disk, without needing one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        done = False
    if not done:
        pytest.skip("only root can mount a small disk here; the test with a file size limit covers it")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def one_line(err: str) -> str:
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err.removeprefix("error: ").strip()


def test_a_disk_that_fills_up(small_disk, monkeypatch, capfd):
    config = tiny(small_disk, checkpoint={"seconds": 0}, log={"every": 2})
    argv = [*flags(checkpoint={"seconds": 0}, log={"every": 2}), "--logdir", str(small_disk)]
    ballast, save = small_disk / "ballast", loop.Session._save

    def save_until_full(self):
        save(self)
        if self.agent_steps == 20:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

    with monkeypatch.context() as patch:
        patch.setattr(loop.Session, "_save", save_until_full)
        code, _, err = door(train.main, argv, monkeypatch, capfd)
    text = one_line(err)
    assert code == 4
    assert text.startswith(str(small_disk))
    assert "No space left on device" in text
    assert text.endswith("make room and run it again")
    before = saved(config)
    assert before.meta["agent_steps"] == 20
    code, _, err = door(train.main, argv, monkeypatch, capfd)  # still full
    assert code == 4
    one_line(err)
    assert differing(saved(config), before) == set()
    ballast.unlink()
    code, out, err = door(train.main, argv, monkeypatch, capfd)
    assert (code, err) == (0, "")
    assert "going on at agent step 20" in out
    assert saved(config).meta["agent_steps"] == 40
    assert int(saved(config).tensors["learner.updates"]) == 15
    assert [line["agent_steps"] for line in lines(config, "metrics")] == list(range(2, 41, 2))


def test_a_checkpoint_that_does_not_fit(tmp_path, monkeypatch, capfd):
    config = tiny(tmp_path, checkpoint={"seconds": 0})
    argv = [*flags(checkpoint={"seconds": 0}), "--logdir", str(tmp_path)]
    save = checkpoint.save

    def limited(directory, tensors, meta, *, number, keep):
        with file_size_limit(20_000 if number == 20 else resource.RLIM_INFINITY):
            return save(directory, tensors, meta, number=number, keep=keep)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", limited)
        code, _, err = door(train.main, argv, monkeypatch, capfd)
    assert code == 4
    assert one_line(err).startswith(
        f"{path_of(config) / 'checkpoints' / '0000000020.safetensors'}: cannot write"
    )
    assert saved(config).meta["agent_steps"] == 18
    assert [p.name for p in sorted((path_of(config) / "checkpoints").iterdir())] == [
        "0000000016.safetensors",
        "0000000018.safetensors",
    ]
    code, out, err = door(train.main, argv, monkeypatch, capfd)
    assert (code, err) == (0, "")
    assert "going on at agent step 18" in out
    assert int(saved(config).tensors["learner.updates"]) == 15


@pytest.mark.parametrize(
    ("log", "where"),
    [
        ({"every": 1000}, "replay"),
        ({"every": 2}, "metrics.jsonl"),
        ({"every": 1000, "tensorboard": True}, ""),
    ],
    ids=["replay", "metrics", "tensorboard"],
)
def test_no_room_for_logs_and_rows(tmp_path, monkeypatch, capsys, log, where):
    settings = {"checkpoint": {"seconds": 0}, "log": log}
    config = tiny(tmp_path, **settings)
    argv = [*flags(**settings), "--logdir", str(tmp_path)]
    learn = Learner.step

    def fill(self, sample):
        learn(self, sample)
        if self.updates == 4:  # of agent step 20
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))

    with monkeypatch.context() as patch, file_size_limit(resource.RLIM_INFINITY):
        patch.setattr(Learner, "step", fill)
        code, _, err = door(train.main, argv, monkeypatch, capsys)  # in memory: a file would be limited, too
    assert code == 4, err
    assert where in one_line(err)
    assert err.endswith("make room and run it again\n")
    assert saved(config).meta["agent_steps"] == 18
    code, _, err = door(train.main, argv, monkeypatch, capsys)  # in memory: a file would be limited, too
    assert (code, err) == (0, "")
    assert saved(config).meta["agent_steps"] == 40
    assert int(saved(config).tensors["learner.updates"]) == 15
    rows = [line["agent_steps"] for line in lines(config, "scores")]
    assert rows == sorted(rows)


def test_a_logdir_that_cannot_be(tmp_path, monkeypatch, capfd):
    file = tmp_path / "file"
    file.touch()
    code, _, err = door(train.main, [*flags(), "--logdir", str(file)], monkeypatch, capfd)
    assert (code, one_line(err)) == (1, f"{file}: this is a file, not a directory; choose another --logdir")
    code, _, err = door(train.main, [*flags(), "--logdir", "/proc/runs"], monkeypatch, capfd)  # not even root
    assert code == 1
    assert one_line(err).startswith("/proc/runs/demo/Catch/seed0: cannot use the run's directory: ")
    assert err.endswith("; choose another --logdir\n")


@pytest.mark.parametrize("part", ["model", "actor", "critic"])
def test_losses_that_stay_nan_stop_the_run_with_the_batch_saved(tmp_path, monkeypatch, capfd, part):
    """A parameter is poisoned in the fifth update; the next three are skipped, and the run says so."""
    learn, poisoned, batches = Learner.step, [], []

    def poison(self, sample):
        def spied(batch, length):
            batches.append(sample(batch, length))
            return batches[-1]

        if self.updates == 5:
            module = {
                "model": self.model.reward,
                "actor": self.behavior.actor,
                "critic": self.behavior.critic,
            }[part]
            next(module.parameters()).data[0] = float("nan")
            poisoned.append({k: v.clone() for k, v in self.state_dict().items()})
        learn(self, spied)

    settings = {"train": {"nonfinite_limit": 3}, "checkpoint": {"seconds": 1e9}}
    config = tiny(tmp_path, **settings)
    argv = [*flags(**settings), "--logdir", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", poison)
        code, _, err = door(train.main, argv, monkeypatch, capfd)
    assert code == 5
    folder = path_of(config) / "nonfinite_batch"
    named = "not finite on it: loss/reward; " if part == "model" else ""
    assert one_line(err).startswith(
        f"{path_of(config)}: 3 updates had a loss or gradient that is not finite, the last at update 8; "
        f"its batch is in {folder}; {named}go on with a higher --train.nonfinite-limit, or begin another run with "
    )
    stored = checkpoint.load_latest(folder)
    assert stored.meta == {"agent_steps": 26}
    assert stored.tensors.keys() == batches[-1].keys()
    for key, value in batches[-1].items():
        assert torch.equal(stored.tensors[key], value), key
    # The run is saved, and the skipped updates changed nothing in it.
    state = saved(config).tensors
    assert int(state["learner.skipped"]) == 3
    assert saved(config).meta["agent_steps"] == 26
    before = poisoned[0]
    for name in before:
        if name.startswith(("behavior.actor", "behavior.critic", "optimizer.actor", "optimizer.critic")):
            same = torch.equal(state[f"learner.{name}"].nan_to_num(7.0), before[name].nan_to_num(7.0))
            assert same, name
    # The limit counts from where the run is resumed, and what the message advises is accepted.
    argv = [*argv, "--train.nonfinite-limit", "4", "--precision", "bfloat16"]
    code, _, err = door(train.main, argv, monkeypatch, capfd)
    assert code == 5
    assert "4 updates had a loss" in err
    assert err.endswith("-limit, or with --precision float32\n")
    assert int(saved(config).tensors["learner.skipped"]) == 7


@pytest.mark.parametrize(
    ("device", "rows_added", "told"),
    [
        ("cpu", 11, "the last at update 7; its batch is in {}"),
        ("cuda", 10, "the last by update 7; its batch is in {}"),
        (
            "cuda",
            11,
            "the last by update 7; its batch is in {}, except for rows that newer ones have replaced",
        ),
    ],
)
def test_what_is_left_of_a_batch_that_is_not_finite(device, rows_added, told, tmp_path):
    """On CUDA only a log line asks for it, by when newer rows may have replaced its own."""
    replay = SimpleNamespace(gather=lambda *window: {"reward": torch.ones(3)}, rows_added=rows_added, ring=10)
    learner = SimpleNamespace(
        skipped=4,
        bad_starts=None,
        updates=7,
        device=torch.device(device),
        dtype=torch.float32,
        not_finite=lambda batch: [],
    )
    session = SimpleNamespace(
        config=tiny(tmp_path, train={"nonfinite_limit": 3}), rundir=SimpleNamespace(path=tmp_path),
        learner=learner, replay=replay, skipped_before=0, agent_steps=9,
    )  # fmt: skip
    with pytest.raises(NonFiniteError) as error:
        Session._check_finite(session)
    assert str(error.value).partition("finite, ")[2].partition("; go on")[0] == told.format(
        tmp_path / "nonfinite_batch"
    )


def test_a_nan_that_passes_is_skipped_and_counted(tmp_path, monkeypatch):
    loss, calls = WorldModel.loss, []

    def now_and_then(self, *args):
        output = loss(self, *args)
        calls.append(args)
        return output._replace(loss=output.loss * float("nan")) if len(calls) in (3, 7) else output

    monkeypatch.setattr(WorldModel, "loss", now_and_then)
    config = tiny(tmp_path, train={"nonfinite_limit": 3})
    loop_cases.train(config)
    state = saved(config).tensors
    assert (int(state["learner.updates"]), int(state["learner.skipped"])) == (15, 2)
    assert all(value.isfinite().all() for key, value in state.items() if value.is_floating_point())
    assert int(state["learner.optimizer.model.steps"]) == int(state["learner.optimizer.actor.steps"]) == 13
    assert [line["skipped_updates"] for line in lines(config, "metrics")] == [1, 2]
    assert not (path_of(config) / "nonfinite_batch").exists()


def test_a_missing_library(tmp_path, monkeypatch, capfd):
    argv = ["--logdir", str(tmp_path), "--device", "cpu"]
    monkeypatch.setitem(sys.modules, "envpool", None)
    code, _, err = door(train.main, ["--suite", "demo", *argv], monkeypatch, capfd)
    assert code == 6
    assert one_line(err) == "Catch-v0 needs envpool; pip install envpool"
    code, _, err = door(train.main, ["--suite", "dmc", *argv], monkeypatch, capfd)  # not about EGL
    assert code == 6
    assert one_line(err) == "acrobot_swingup needs envpool; pip install envpool"
    monkeypatch.setitem(sys.modules, "ale_py", None)
    code, _, err = door(train.main, ["--task", "Pong", *argv], monkeypatch, capfd)
    assert code == 6
    assert one_line(err) == "Atari needs envpool or ale-py; pip install envpool, or the smaller ale-py"


def test_a_library_that_does_not_load(tmp_path, monkeypatch, capfd):
    """As if a system library were missing: the package is installed, but importing it fails."""
    package = tmp_path / "envpool"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libEGL.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "envpool"]:
        monkeypatch.delitem(sys.modules, name)
    code, _, err = door(train.main, [*flags(), "--logdir", str(tmp_path / "runs")], monkeypatch, capfd)
    assert code == 6
    assert "envpool does not load: libEGL.so.1: cannot open shared object file" in one_line(err)
    assert base.installed("envpool")


@pytest.mark.parametrize(
    ("forced", "built", "code", "text"),
    [
        ("triton", True, 2, "HDFAST_BACKEND=triton cannot run: the tensor is on cpu; move it to a GPU"),
        ("trtion", True, 2, "HDFAST_BACKEND=trtion cannot run: there is no such backend"),
        (
            "",
            False,
            6,
            "the default backend native cannot run: the C++ module hdfast_kernels._native is not built",
        ),
    ],
)
def test_a_backend_that_cannot_run_is_told_before_the_first_step(
    tmp_path, monkeypatch, capfd, forced, built, code, text
):
    monkeypatch.setenv("HDFAST_BACKEND", forced)
    monkeypatch.setattr(dispatch, "native_built", lambda: built)
    got, out, err = door(train.main, [*flags(), "--logdir", str(tmp_path)], monkeypatch, capfd)
    assert (got, out) == (code, "")
    assert text in one_line(err)


@pytest.mark.skipif(not dispatch.native_built(), reason="the C++ module is not built")
def test_an_instruction_set_that_is_not_here(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HDFAST_ISA", "avx1024")
    native.module.cache_clear()
    got, out, err = door(train.main, [*flags(), "--logdir", str(tmp_path)], monkeypatch, capfd)
    assert (got, out) == (2, "")
    assert "HDFAST_ISA=avx1024 cannot run here; choose one of generic" in one_line(err)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there(tmp_path, monkeypatch, capfd):
    here = ["--logdir", str(tmp_path)]
    for argv, code, text in (
        (["--task", "Pnog"], 2, "no task 'Pnog' in suite atari100k; did you mean 'Pong'?"),
        (["--suite", "demo", "--device", "gpu"], 2, "--device: no device 'gpu'; did you mean 'cpu'?"),
        (["--suite", "demo", "--env.source", "ale"], 2, "--env.source cannot be 'ale' in suite demo"),
        (
            ["--suite", "demo", "--device", "cpu", "--train.graph", "on"],
            2,
            "--train.graph: a CUDA graph needs a CUDA device",
        ),
        (
            ["--suite", "demo", "--device", "cpu", "--train.graph", "overlap"],
            2,
            "--train.graph: a CUDA graph needs a CUDA device",
        ),
    ):
        got, out, err = door(train.main, [*argv, *here], monkeypatch, capfd)
        assert (got, out) == (code, "")
        assert text in one_line(err)
    if not torch.cuda.is_available():
        code, _, err = door(train.main, ["--device", "cuda", *here], monkeypatch, capfd)
        assert code == 2
        assert one_line(err).endswith("--device cpu works")


def test_an_unexpected_error_keeps_its_traceback_and_the_run(tmp_path, monkeypatch):
    """A bug is not presented as a user's error; checkpoints from before it stay good."""
    config = tiny(tmp_path, checkpoint={"seconds": 0})
    learn = Learner.step

    def broken(self, sample):
        learn(self, sample)
        assert self.updates < 6, "a bug"

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", broken)
        with pytest.raises(AssertionError, match="a bug"):
            loop_cases.train(config)
    assert saved(config).meta["agent_steps"] == 22
    loop_cases.train(config)
    assert int(saved(config).tensors["learner.updates"]) == 15
