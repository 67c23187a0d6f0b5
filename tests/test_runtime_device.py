import contextlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from hdfast.runtime import device, profiling
from hdfast.runtime.errors import ConfigError, MissingLibraryError
from hdfast_kernels import dispatch, native

CPU = torch.device("cpu")


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_devices_by_name(two_gpus):
    assert device.resolve_device("auto") == torch.device("cuda:1")
    assert device.resolve_device("cuda") == torch.device("cuda:1")
    assert device.resolve_device("cuda:0") == torch.device("cuda:0")
    assert device.resolve_device("cpu") == CPU


def test_auto_is_the_cpu_without_a_gpu(no_gpu):
    assert device.resolve_device("auto") == CPU


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda:2", "--device: no device 'cuda:2'; CUDA devices here: 'cuda:0', 'cuda:1'"),
        ("gpu", "--device: no device 'gpu'; "),
        ("cuda:", "--device: no device 'cuda:'; did you mean 'cuda"),
        ("cuda:-1", "--device: no device 'cuda:-1'; did you mean 'cuda"),
        ("cpu:0", "--device: no device 'cpu:0'; did you mean 'cpu'"),
    ],
)
def test_a_device_that_is_not_there(two_gpus, name, message):
    with pytest.raises(ConfigError) as error:
        device.resolve_device(name)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("cuda", "reason"), [(None, "is built without CUDA"), ("13.0", r"\(CUDA 13.0\) finds no GPU or driver")]
)
def test_cuda_without_cuda_says_why(no_gpu, monkeypatch, cuda, reason):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(ConfigError, match=f"--device: 'cuda' cannot be used: .*{reason}; --device cpu works"):
        device.resolve_device("cuda")


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_auto_precision_of_a_gpu_is_that_of_its_tensor_cores(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert device.resolve_precision("auto", torch.device("cuda:0")) == dtype


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("fpu avx512f avx512_bf16 avx512vl", torch.bfloat16),
        ("fpu amx_bf16", torch.bfloat16),
        ("fpu avx512f avx512_bf16x amx_tile", torch.float32),
        (None, torch.float32),
    ],
)
def test_auto_precision_of_a_cpu_is_that_of_its_flags(monkeypatch, tmp_path, flags, dtype):
    cpuinfo = tmp_path / "cpuinfo"
    if flags:
        cpuinfo.write_text(
            f"processor\t: 0\nmodel name\t: A Chip\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t: x\n"
        )
    monkeypatch.setattr(device, "_CPUINFO", cpuinfo)
    assert device.resolve_precision("auto", CPU) == dtype
    assert (device.describe_device(CPU)["name"] == "A Chip") == bool(flags)


def test_a_precision_asked_for_is_given():
    assert device.resolve_precision("float32", CPU) == torch.float32
    assert device.resolve_precision("bfloat16", CPU) == torch.bfloat16
    with pytest.raises(ConfigError, match=r"--precision: no precision 'bf16'; did you mean 'bfloat16'?"):
        device.resolve_precision("bf16", CPU)


@pytest.mark.parametrize(
    ("kind", "little", "asked", "threads"),
    [
        ("cpu", True, None, 1),
        ("cpu", False, None, 7),
        ("cpu", True, "7", 7),
        ("cuda", True, None, 7),
        ("cuda:1", True, None, 7),
    ],
)
def test_what_a_device_is_prepared_by(monkeypatch, kind, little, asked, threads):
    """Little work is done on one thread; freed memory is kept on a CPU; products on CUDA keep all digits."""
    now, kept = [7], []
    monkeypatch.setattr(native, "keep_freed_memory", lambda: kept.append(kind))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: now.append(count))
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[-1])
    monkeypatch.setattr(device, "_spared", [])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    products = SimpleNamespace(allow_bf16_reduced_precision_reduction=True)  # torch for CPUs lacks it
    monkeypatch.setattr(torch.backends.cuda, "matmul", products)
    precision: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", precision.append)
    device.prepare_device(torch.device(kind), little)
    assert now[-1] == threads
    assert kept == (["cpu"] if kind == "cpu" and dispatch.native_built() else [])
    assert current == ([torch.device("cuda:1")] if kind == "cuda:1" else [])
    assert torch.backends.cudnn.allow_tf32 is (kind == "cpu")
    assert products.allow_bf16_reduced_precision_reduction is (kind == "cpu")
    assert precision == ([] if kind == "cpu" else ["highest"])


@pytest.mark.parametrize("before", [1, 2])
def test_little_work_leaves_later_work_its_threads(monkeypatch, before):
    """In one process, such as a notebook's: the demo, and then a model that is faster with many threads."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(device, "_spared", [])
    threads, ours = [], torch.get_num_threads()
    try:
        torch.set_num_threads(before)
        for little in (True, True, False, False, True, False):
            device.prepare_device(CPU, little)
            threads.append(torch.get_num_threads())
        torch.set_num_threads(1)  # as a user may wish
        device.prepare_device(CPU, False)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(ours)
    assert threads == [1, 1, before, before, 1, before]


def test_a_module_that_cannot_be_used_is_one_line(monkeypatch):
    def refuse():
        raise dispatch.BackendError("the C++ module was built before; build it with `pip install -e .`")

    monkeypatch.setattr(dispatch, "native_built", lambda: True)
    monkeypatch.setattr(native, "module", refuse)
    with pytest.raises(MissingLibraryError, match="was built before; build it with") as error:
        device.prepare_device(torch.device("cpu"), False)
    assert error.value.exit_code == 6


def test_a_generator_goes_on_from_its_state_or_from_another_kinds():
    first, second = (torch.Generator().manual_seed(7) for _ in range(2))
    torch.rand(3, generator=first)
    device.restore_generator(second, first.get_state())
    assert torch.equal(torch.rand(5, generator=first), torch.rand(5, generator=second))
    drawn = []
    for state in (bytes(16), bytes(16), b"x" * 16):  # of a CUDA generator
        device.restore_generator(second, torch.frombuffer(bytearray(state), dtype=torch.uint8))
        drawn.append(torch.rand(5, generator=second).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_description_is_json_with_units(monkeypatch):
    about = json.loads(json.dumps(device.describe_device(CPU)))
    assert about["device"] == "cpu"
    assert about["cores"] >= 1
    assert about["threads"] == torch.get_num_threads()
    assert about["instruction_set"] == (native.isa() if dispatch.native_built() else None)
    assert 2**28 < about["memory_bytes"] < 2**50
    card = SimpleNamespace(name="H100", total_memory=2**36, multi_processor_count=132, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert device.describe_device(torch.device("cuda:0")) == {
        "device": "cuda:0",
        "bfloat16": True,
        "name": "H100",
        "memory_bytes": 2**36,
        "multiprocessors": 132,
        "capability": "9.0",
        "cuda": torch.version.cuda,
    }


class FakeDomain:
    def __init__(self):
        self.calls = []

    def get_event_attributes(self, *, message):
        return message

    def push_range(self, attributes):
        self.calls.append(attributes)

    def pop_range(self):
        self.calls.append("end")


@pytest.fixture
def fresh_ranges():
    profiling.annotate.cache_clear()
    yield
    profiling.annotate.cache_clear()


def test_ranges_nest_and_end_when_the_block_raises(monkeypatch, fresh_ranges):
    domain = FakeDomain()
    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(get_domain={"hdfast": domain}.__getitem__))
    with contextlib.suppress(KeyError), profiling.annotate("update"), profiling.annotate("observe"):
        with profiling.annotate("update"):
            pass
        raise KeyError
    assert domain.calls == ["update", "observe", "update", "end", "end", "end"]


def test_a_phase_is_a_range_for_both_profilers_and_ends_when_the_block_raises(monkeypatch, fresh_ranges):
    domain = FakeDomain()
    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(get_domain={"hdfast": domain}.__getitem__))
    monkeypatch.setenv("KINETO_LOG_LEVEL", "6")  # as `profile.measure`: it is read once in a process
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        with contextlib.suppress(KeyError), profiling.phase("imagination"):
            with profiling.phase("rollout"):
                torch.zeros(1)
            raise KeyError
        torch.ones(1)
    assert domain.calls == ["imagination", "rollout", "end", "end"]
    parents = {event.name: event.cpu_parent and event.cpu_parent.name for event in profiler.events()}
    assert parents["rollout"] == "imagination"
    assert parents["aten::zeros"] == "rollout"
    assert parents["aten::ones"] is None


@pytest.mark.parametrize(
    "nvtx",
    [None, SimpleNamespace(annotate=None), SimpleNamespace(get_domain=lambda name: object())],
    ids=["none", "0.2.10", "0.2.11"],
)
def test_ranges_are_nothing_without_nvtx(monkeypatch, fresh_ranges, nvtx):
    monkeypatch.setitem(sys.modules, "nvtx", nvtx)
    with profiling.annotate("update"), profiling.annotate("update"):
        pass


def test_ranges_work_with_the_real_package(fresh_ranges):
    pytest.importorskip("nvtx")
    with profiling.annotate("update"), profiling.annotate("update"):
        pass


def test_importing_touches_no_device_starts_no_thread_and_leaves_what_is_heavy():
    code = """
import sys, threading
import torch
from hdfast.runtime import checkpoint, device, errors, files, logger, profiling, progress, rundir
from hdfast.runtime import tensorboard, video
assert threading.active_count() == 1, threading.enumerate()
assert not torch.cuda.is_initialized()
assert not {"tensorboard", "nvtx", "envpool"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
