"""The tools of bench/: counting work, comparing functions, tables, and what it needs to run."""

import contextlib
import gc
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import agent, machine, table
from bench.agent import PARTS, Bench, backend, config_of, gflop
from hdfast.agent import optimizer
from hdfast.overrides import apply_overrides
from hdfast.runtime.errors import ConfigError
from tests.calls import Calls

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
NARROW = {
    "rssm": {"deter": 16, "units": 16, "stoch": 4, "classes": 4},
    "network": {"units": 16, "layers": 1, "depth": 4, "bins": 15},
}


def narrow(batch: int = 2, length: int = 4, horizon: int = 3):
    return apply_overrides(config_of("tiny", batch=batch, length=length, horizon=horizon), NARROW)


def pytest_of_bench(*arguments: str, cwd: Path = ROOT, **environment: str) -> str:
    command = [sys.executable, "-m", "pytest", str(ROOT / "bench"), "-p", "no:cacheprovider", *arguments]
    path = os.pathsep.join([*environment.pop("first", "").split(), *filter(None, sys.path)])
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    result = subprocess.run(
        command,
        cwd=cwd,
        env={**ours, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_gflop_of_an_act_by_hand():
    """Encoder, prior of the initial state, recurrent step, posterior, actor; one-hot latents are gathered rows."""
    layers = [(64, 4 * 4 * 3, 4), (32, 4 * 4 * 4, 8), (16, 4 * 4 * 8, 16), (8, 4 * 4 * 16, 32)]
    encoder = sum((side // 2) ** 2 * inputs * outputs for side, inputs, outputs in layers)
    embed, units, deter, logits = 4 * 4 * 32, 16, 16, 4 * 4
    initial = deter * units + units * logits
    step = units * 3 * deter + deter * 3 * deter + (deter + embed) * units + units * logits
    actor = deter * units + units * 6
    assert gflop(narrow(), "act", CPU) * 1e9 == 2 * (encoder + initial + step + actor)


@pytest.fixture
def modes(monkeypatch) -> list[str]:
    """Stands in for what captures on CUDA; what was said about waiting for the device."""
    said: list[str] = []
    for name in ("Stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", said.append)
    return said


def test_what_waits_for_the_device_is_not_captured(modes, monkeypatch):
    """PyTorch's generator stays in a capture that failed: later benchmarks could not even draw their inputs."""

    def eager():
        if modes[-1:] == ["error"]:
            raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: pytest.fail("it was captured"))
    run, calls = machine.in_a_row(eager, torch.device("cuda"))
    run()
    assert (calls, modes) == (1, ["error", "default"])


def test_no_older_graph_is_destroyed_in_a_capture(modes, monkeypatch):
    """As Python's garbage collector may; and another thread may do there what it likes."""
    collecting = []

    def graph(graph, *, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "graph", graph)
    _, calls = machine.in_a_row(lambda: collecting.append(gc.isenabled()), torch.device("cuda"))
    assert calls == machine.REPLAYS
    assert collecting == [True] * (machine.WARMUPS + 1) + [False]
    assert gc.isenabled()


def test_copies_are_timed_in_pieces():
    """The time is for all bytes, read and written, however many copies there are."""
    large, small = (machine.copy_seconds(CPU, nbytes, 4) for nbytes in (64 << 20, 1 << 20))
    assert 0 < small < large
    assert (64 << 20) / large / 1e9 < 10 * machine.copy_gb_per_second(CPU)
    assert machine.launches(lambda: pytest.fail("called"), CPU) == 0


def test_copies_begin_where_a_tensor_would(monkeypatch):
    """A copy from and to odd addresses goes byte by byte."""
    starts, copy = [], torch.Tensor.copy_

    def seen(to, piece):
        starts.extend(one.storage_offset() % machine.ALIGNED for one in (to, piece))
        return copy(to, piece)

    monkeypatch.setattr(torch.Tensor, "copy_", seen)
    assert machine.copy_seconds(CPU, 12_345, 3) > 0
    assert set(starts) == {0}
    assert len(starts) >= 2 * 3 * machine.TRIES


@pytest.mark.parametrize("part", PARTS[:3])
def test_gflop_grows_with_the_batch_alone(part):
    """Counting one window and multiplying gives the same as counting all."""
    from torch.utils.flop_counter import FlopCounterMode

    config = narrow(batch=3)
    with backend("reference"):
        run = getattr(Bench(config, CPU, torch.float32), part)()
        with FlopCounterMode(display=False) as counter:
            run()
    assert gflop(config, part, CPU) == pytest.approx(counter.get_total_flops() / 1e9, rel=1e-3)


def test_gflop_of_an_update_is_more_than_that_of_its_parts():
    config = narrow()
    update, observe, imagine, act = (gflop(config, part, CPU) for part in PARTS)
    assert update > observe + imagine > observe > 0
    assert imagine > 0 < act
    with pytest.raises(ValueError, match="no part 'replay'"):
        gflop(config, "replay", CPU)


@pytest.mark.parametrize("part", PARTS)
def test_parts_run_and_an_update_changes_the_parameters(part):
    bench = Bench(narrow(), CPU, torch.float32)
    before = [parameter.clone() for parameter in bench.learner.model.parameters()]
    getattr(bench, part)()()
    changed = any(
        not torch.equal(a, b) for a, b in zip(before, bench.learner.model.parameters(), strict=True)
    )
    assert changed == (part == "update")
    assert bench.learner.updates == (part == "update")


@pytest.mark.parametrize(("part", "spared"), [("observe", 30), ("imagine", 3)])
def test_parts_round_their_weights_at_once_as_an_update_does(part, spared, monkeypatch):
    """Where the parameters are one tensor, as on CUDA."""
    monkeypatch.setenv("HDFAST_BACKEND", "reference")
    monkeypatch.setattr(optimizer, "FLAT", ("cpu",))
    run = getattr(Bench(narrow(), CPU, torch.bfloat16), part)()
    with Calls() as few:
        run()
    monkeypatch.setattr(agent, "rounded", lambda *_: contextlib.nullcontext())
    with Calls() as many:
        run()
    casts = [len(calls.of("_to_copy")) for calls in (few, many)]
    assert casts[0] <= casts[1] - spared


def test_a_run_that_is_timed_does_not_depend_on_what_tuning_found(tmp_path, monkeypatch):
    running = pytest.importorskip("bench.running", reason="a run needs more packages", exc_type=ImportError)
    for device, graph in (("cuda", "on"), ("cpu", "auto")):
        monkeypatch.setattr(running, "resolve_device", lambda _, device=device: torch.device(device))
        train = running.config_of("demo", "Catch", tmp_path, prefill=16).train
        assert (train.tune, train.graph, train.prefill) == (False, graph, 16)


def test_a_graph_needs_cuda():
    with pytest.raises(ConfigError, match="CUDA graph"):
        Bench(narrow(), CPU, torch.float32).graph()


def test_backend_is_set_inside_and_restored(monkeypatch):
    monkeypatch.setenv("HDFAST_BACKEND", "native")
    with backend("reference"):
        assert os.environ["HDFAST_BACKEND"] == "reference"
    with backend(None):
        assert "HDFAST_BACKEND" not in os.environ
    assert os.environ["HDFAST_BACKEND"] == "native"


def test_peaks_are_those_of_all_threads_and_measured_once(monkeypatch):
    seen = []
    monkeypatch.setattr(machine, "seconds", lambda function: seen.append(torch.get_num_threads()) or 1.0)
    monkeypatch.setattr(machine, "THREADS", 2)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        machine.gemm_gflop_per_second.cache_clear()
        assert machine.gemm_gflop_per_second(CPU, torch.float32) == pytest.approx(2 * 2048**3 / 1e9)
        machine.gemm_gflop_per_second(CPU, torch.float32)
        assert seen == [2] * (3 * machine.TRIES)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
        machine.gemm_gflop_per_second.cache_clear()


def test_tables():
    assert [table.number(x) for x in (0.012345, 1.2345, 123.45, 12345.6, None)] == [
        "0.012", "1.23", "123", "12,346", ""
    ]  # fmt: skip
    head, rows = table.filled(["name", "empty", "ms"], [["a", "", "1.5"], ["long", "", ""]])
    assert table.aligned(head, rows) == ["name   ms", "a     1.5", "long"]
    assert table.markdown(head, rows).splitlines()[1:] == ["| --- | ---: |", "| a | 1.5 |", "| long |  |"]


def test_a_selection_by_part_and_size_selects_just_that():
    listed = pytest_of_bench("--benchmark-only", "--collect-only", "-q", "-k", "update and small")
    names = re.findall(r"^bench/.*::(\S+)$", listed, re.MULTILINE)
    assert len(names) >= 2
    assert all(name.startswith("test_update[small-") for name in names)


BARE = """
from functools import partial
from importlib.machinery import PathFinder

GONE = {"envpool", "ale_py", "rich", "tyro", "safetensors", "tensorboard", "PIL", "ray"}

def find_spec(find, name, *rest):
    return None if name.partition(".")[0] in GONE else find(name, *rest)

PathFinder.find_spec = partial(find_spec, PathFinder.find_spec)
"""


def test_what_needs_more_packages_is_skipped_with_the_reason(tmp_path):
    """The rest runs with torch, triton and pytest alone."""
    (tmp_path / "sitecustomize.py").write_text(BARE)
    said = pytest_of_bench(
        "--benchmark-only", "-q", "-k", "environments or loop or (append and 1-memory)", first=str(tmp_path)
    )
    assert re.search(r"1 passed, 7 skipped", said), said
    assert re.search(r"SKIPPED.*envpool", said)
    assert re.search(r"SKIPPED.*a run needs more packages", said)
    assert re.search(r"replay append 1 +\* +memory", said)
