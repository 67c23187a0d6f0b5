import errno
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from hdfast.runtime import checkpoint
from hdfast.runtime.errors import CheckpointError, DiskFullError, RunError


def state(number=0, size=3):
    generator = torch.Generator().manual_seed(number)
    return {
        "weight": torch.randn(size, 5, generator=generator),
        "channels_last": torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last),
        "transposed": torch.arange(6, dtype=torch.int64).reshape(2, 3).T,
        "bf16": torch.randn(7, generator=generator).bfloat16(),
        "f16": torch.randn(3, generator=generator).half(),
        "f64": torch.randn((), generator=generator, dtype=torch.float64),
        "i32": torch.tensor([-1], dtype=torch.int32),
        "i16": torch.tensor([-2], dtype=torch.int16),
        "i8": torch.tensor([-3], dtype=torch.int8),
        "random state": generator.get_state(),
        "flag": torch.tensor(True),
        "empty": torch.empty(0, 4),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "ünïcode/日本": torch.ones(1),
    }


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape)
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (got[name], tensor)]
        assert torch.equal(*bits), name


def never(text):
    raise AssertionError(text)


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    meta = {"agent_steps": 7, "nested": {"list": [1, 2.5, None, "ß"], "big": 2**127}}
    path = checkpoint.save(tmp_path / "new" / "checkpoints", state(7), meta, number=7)
    found = checkpoint.load_latest(path.parent, warn=never)
    assert_same(found.tensors, state(7))
    assert (found.meta, found.number, found.path) == (meta, 7, path)
    assert_same(safetensors.torch.load_file(path), state(7))  # for other programs a plain safetensors file


def test_what_is_loaded_does_not_follow_the_file(tmp_path):
    path = checkpoint.save(tmp_path, state(1), {}, number=1)
    checkpoint.load_latest(tmp_path).tensors["weight"].fill_(9)
    assert_same(checkpoint.load_latest(tmp_path, warn=never).tensors, state(1))
    found = checkpoint.load_latest(tmp_path)
    checkpoint.save(tmp_path, state(2), {}, number=1)
    path.unlink()
    assert_same(found.tensors, state(1))


def test_tensors_that_share_memory_or_require_grad_are_saved(tmp_path):
    buffer = torch.arange(6.0, requires_grad=True)
    checkpoint.save(tmp_path, {"all": buffer, "half": buffer[:3], "again": buffer}, {}, number=1)
    found = checkpoint.load_latest(tmp_path).tensors
    assert_same(found, {"all": buffer.detach(), "half": buffer[:3].detach(), "again": buffer.detach()})


def test_a_checkpoint_under_a_name_of_one_s_own_is_loaded_as_number_0(tmp_path):
    path = checkpoint.save(tmp_path, state(1), {"m": 1}, number=7).rename(tmp_path / "best.safetensors")
    found = checkpoint.load(path)
    assert (found.number, found.meta, found.path) == (0, {"m": 1}, path)
    assert_same(found.tensors, state(1))


def test_every_tensor_lies_where_its_elements_are_aligned(tmp_path):
    for length in range(8):  # of names, and with them of the header
        tensors = {"a" * length + "b": torch.ones(3, dtype=torch.uint8)} | state()
        data = checkpoint.save(tmp_path, tensors, {}, number=1).read_bytes()
        (header,) = struct.unpack_from("<Q", data)
        entries = json.loads(data[8 : 8 + header])
        assert entries.keys() == {"__metadata__", *tensors}
        for name, tensor in tensors.items():
            assert (8 + header + entries[name]["data_offsets"][0]) % tensor.element_size() == 0


def test_the_newest_two_are_kept(tmp_path):
    for number in (5, 10, 100, 99_999_999_999):
        checkpoint.save(tmp_path, state(), {}, number=number)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0000000100.safetensors", "99999999999.safetensors"]
    assert checkpoint.load_latest(tmp_path).number == 99_999_999_999
    checkpoint.save(tmp_path, state(), {}, number=99_999_999_999, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["99999999999.safetensors"]


def test_leftovers_of_an_interrupted_write_go_with_the_next_save(tmp_path):
    (tmp_path / "0000000009.safetensors.partial").write_bytes(b"half")
    (tmp_path / "notes.partial").write_text("mine")
    path = checkpoint.save(tmp_path, state(), {}, number=8)
    assert sorted(tmp_path.iterdir()) == [path, tmp_path / "notes.partial"]


def test_none_where_there_is_none(tmp_path):
    assert checkpoint.load_latest(tmp_path / "absent") is None
    (tmp_path / "0000000001.safetensors.partial").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    assert checkpoint.load_latest(tmp_path) is None


def test_a_flipped_bit_anywhere_and_a_cut_anywhere_are_found(tmp_path):
    path = checkpoint.save(
        tmp_path, {"a": torch.arange(4.0), "b": torch.tensor([1, 2])}, {"m": [1]}, number=3
    )
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(8, (len(whole),), generator=generator).tolist()
    flipped = [whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1 :] for i, bit in enumerate(bits)]
    for damaged in (*flipped, *(whole[:i] for i in range(len(whole))), whole + b"\0"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            checkpoint.load_latest(tmp_path, warn=lambda text: None)
    path.write_bytes(whole)
    assert checkpoint.load_latest(tmp_path, warn=never).number == 3


def test_a_damaged_newest_one_falls_back_with_a_warning_and_goes_with_the_next_save(tmp_path, capsys):
    checkpoint.save(tmp_path, state(1), {"n": 1}, number=1)
    newest = checkpoint.save(tmp_path, state(2), {"n": 2}, number=20)
    newest.write_bytes(newest.read_bytes()[:-1])
    found = checkpoint.load_latest(tmp_path)
    assert (found.meta, found.number) == ({"n": 1}, 1)
    assert capsys.readouterr().err == (
        f"warning: {newest}: checkpoint is damaged (its checksum does not match); trying the one before\n"
    )
    (tmp_path / "0000000001.safetensors").unlink()
    with pytest.raises(CheckpointError):
        checkpoint.load_latest(tmp_path)
    assert capsys.readouterr().err == (
        f"warning: {newest}: checkpoint is damaged (its checksum does not match)\n"
    )
    checkpoint.save(tmp_path, state(1), {"n": 1}, number=1)
    checkpoint.save(tmp_path, state(3), {"n": 3}, number=15)  # by the resumed run, before it reaches 20 again
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0000000001.safetensors", "0000000015.safetensors"]


def test_all_damaged_is_an_error_that_names_each(tmp_path):
    for number in (1, 2):
        checkpoint.save(tmp_path, state(), {}, number=number).write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint can be loaded") as error:
        checkpoint.load_latest(tmp_path, warn=lambda text: None)
    assert [line.partition(":")[0] for line in error.value.details] == [
        "0000000002.safetensors",
        "0000000001.safetensors",
    ]


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("reads", ["numbered", "_verify"])
def test_what_a_writer_removes_meanwhile_is_not_damaged(tmp_path, monkeypatch, reads, keep):
    """All files that were listed are gone when the newest is about to be opened, or has been: there are newer ones."""
    numbers, read = iter(range(1, 9)), getattr(checkpoint, reads)

    def save():
        for _ in range(keep):
            number = next(numbers)
            checkpoint.save(tmp_path, state(number), {"n": number}, number=number, keep=keep)

    def removed_after(what):
        monkeypatch.setattr(checkpoint, reads, read)
        found = read(what)
        save()
        return found

    save()
    monkeypatch.setattr(checkpoint, reads, removed_after)
    found = checkpoint.load_latest(tmp_path, warn=never)
    number = 2 * keep if reads == "numbered" else keep
    assert (found.number, found.meta) == (number, {"n": number})
    assert_same(found.tensors, state(number))


def test_a_directory_may_have_any_name(tmp_path):
    directory = Path(os.fsdecode(os.fsencode(tmp_path) + b"/L\xf6we"))
    checkpoint.save(directory, state(), {}, number=1)
    assert_same(checkpoint.load_latest(directory, warn=never).tensors, state())


def test_a_link_to_nowhere_is_damaged(tmp_path):
    (tmp_path / "0000000001.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError):
        checkpoint.load_latest(tmp_path, warn=lambda text: None)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("text", ["", "a size does not match", "CUDA out of memory\nfree some"])
def test_only_torch_s_error_about_parameters_is_one_about_the_checkpoint(tmp_path, text):
    with pytest.raises(RuntimeError) as error, checkpoint.fitting(tmp_path):
        raise RuntimeError(text)
    assert str(error.value) == text
    with pytest.raises(CheckpointError, match="the checkpoint does not fit"), checkpoint.fitting(tmp_path):
        torch.nn.Linear(2, 3).load_state_dict({"weight": torch.ones(1)})


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ({}, "is its environment, its config.json or the code of its learner another than in training?"),
        ({"hint": "use the same sizes"}, "use the same sizes"),
        ({"differing": ["rssm.deter: 8 -> 16"]}, ""),
    ],
    ids=["nothing", "a hint", "a difference"],
)
def test_a_checkpoint_that_does_not_fit_is_explained_by_what_is_known(tmp_path, given, hint):
    with pytest.raises(CheckpointError) as error, checkpoint.fitting(tmp_path, **given):
        torch.nn.Linear(2, 3).load_state_dict({"weight": torch.ones(1), "bias": torch.ones(3)})
    assert error.value.hint == hint
    *differing, shape = error.value.details
    assert differing == given.get("differing", [])
    assert shape.startswith("size mismatch for weight")


def test_loading_executes_nothing(tmp_path):
    sprung = tmp_path / "sprung"
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()  # the trap works
    sprung.unlink()
    torch.save(Trap(sprung), tmp_path / "0000000001.safetensors")
    with pytest.raises(CheckpointError):
        checkpoint.load_latest(tmp_path, warn=lambda text: None)
    assert not sprung.exists()


@pytest.fixture
def file_size_limit():
    """No file may grow beyond 64 KiB: the kernel itself refuses, in the middle of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_in_the_middle_of_a_file_keeps_what_was_there(tmp_path, file_size_limit):
    checkpoint.save(tmp_path, state(1), {}, number=1)
    checkpoint.save(tmp_path, state(2), {}, number=2)
    with pytest.raises(
        DiskFullError, match=r"0000000003.safetensors: cannot write the checkpoint: File too large"
    ):
        checkpoint.save(tmp_path, state(3, size=1 << 16), {}, number=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0000000001.safetensors", "0000000002.safetensors"]
    assert_same(checkpoint.load_latest(tmp_path, warn=never).tensors, state(2))


def test_no_room_met_at_fsync_keeps_what_was_there(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, state(1), {}, number=1)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match="No space left on device"):
        checkpoint.save(tmp_path, state(2), {}, number=2)
    assert [p.name for p in tmp_path.iterdir()] == ["0000000001.safetensors"]


def test_a_directory_that_cannot_be_is_one_clear_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write the checkpoint: Not a directory"):
        checkpoint.save(tmp_path / "file" / "checkpoints", state(), {}, number=1)


def test_what_has_no_stored_form_is_named_and_nothing_is_written(tmp_path):
    with pytest.raises(TypeError, match=r"tensor 'z': torch.complex64 has no stored form"):
        checkpoint.save(tmp_path, {"z": torch.zeros(1, dtype=torch.complex64)}, {}, number=1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoint.save(tmp_path, state(), {"f": never}, number=1)
    assert list(tmp_path.iterdir()) == []


SAVE_UNTIL_KILLED = """
import os, pathlib, signal, sys
import torch
from hdfast.runtime import checkpoint
torch.set_num_threads(1)
ours = {module.__file__ for module in (checkpoint, sys.modules[checkpoint.replacing.__module__])}
def save(directory, number):
    tensors = {name: torch.full((1 << 12,), float(number)) for name in "ab"}
    checkpoint.save(directory, tensors, {"number": number}, number=number)
def trace(frame, event, arg):
    global lines
    if frame.f_code.co_filename not in ours:
        return None
    if event == "line":
        lines += 1
        if lines == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    return trace
kill_at = 0
while True:  # a child dies before line 1 of writing the second checkpoint, another before line 2, ...
    kill_at += 1
    directory = pathlib.Path(sys.argv[1]) / f"{kill_at:04d}"
    child = os.fork()
    if not child:
        save(directory, 1)
        lines = 0
        sys.settrace(trace)
        save(directory, 2)
        os._exit(0)
    if os.WIFEXITED(os.waitpid(child, 0)[1]):
        break
"""


def test_kill_9_at_any_line_of_saving_never_costs_more_than_the_checkpoint_being_written(tmp_path):
    arguments = [sys.executable, "-c", SAVE_UNTIL_KILLED, str(tmp_path)]
    subprocess.run(arguments, check=True, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"})
    *killed, finished = sorted(tmp_path.iterdir())
    seen = set()
    for directory in [*killed, finished]:
        partial = any(directory.glob("*.partial"))
        found = checkpoint.load_latest(directory, warn=never)
        seen.add((found.number, partial))
        assert found.meta == {"number": found.number}
        for tensor in found.tensors.values():
            assert torch.equal(tensor, torch.full((1 << 12,), float(found.number)))
        checkpoint.save(directory, found.tensors, found.meta, number=found.number + 1)
        assert not any(directory.glob("*.partial"))
    assert checkpoint.load_latest(finished, warn=never).number == 3
    assert seen == {(1, False), (1, True), (2, False)}  # before, within and after the write
    assert len(killed) > 40


def test_one_that_cannot_be_read_now_is_not_damaged(tmp_path, monkeypatch):
    """Going on from the one before would cut off the rows of replay that came after that."""
    for number in (1, 2):
        checkpoint.save(tmp_path, state(number), {}, number=number, keep=2)

    def failing(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "_verify", failing)
    with pytest.raises(RunError, match="cannot read the checkpoint: Input/output error") as raised:
        checkpoint.load_latest(tmp_path, warn=never)
    assert raised.value.where == str(checkpoint.numbered(tmp_path)[2])
