"""The record of a GPU: what is read from other tools' output, what is concluded, and what a reader is told."""

import contextlib
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import gpu_record, gpu_steps, gpu_tools, gpu_work
from bench.agent import Bench
from hdfast.overrides import apply_overrides
from hdfast.runtime.graphs import WARMUP
from hdfast_kernels import dispatch
from tests.gpu_samples import FORBIDDEN, MEMCHECK, NO_CALLS, RAW
from tests.recorder import record_instead_of_capturing


def test_outcomes_of_tests(tmp_path):
    path = tmp_path / "outcomes"
    assert gpu_tools.outcomes(path) == []
    folder = "tests/kernels/test_kl_balance.py::"
    lines = [
        (folder + "test_a[triton-cuda]", None, ""),
        (folder + "test_a[triton-cuda]", "passed", ""),
        (folder + "test_b[triton-cuda]", "failed", "AssertionError: 0: largest error 3"),
        ("tests/test_cuda.py::test_c", "skipped", "needs a CUDA device"),
        ("tests/test_d.py", "failed", "ImportError: no"),
        ("tests/test_cuda.py::test_e", None, ""),
    ]
    path.write_text(
        "".join(json.dumps(dict(zip(("test", "outcome", "reason"), x, strict=True))) + "\n" for x in lines)
    )
    rows = gpu_tools.outcomes(path)
    assert [row["outcome"] for row in rows] == ["passed", "failed", "skipped", "failed", "failed"]
    assert rows[1] == {
        "id": f"{folder}test_b[triton-cuda]",
        "name": "test_b[triton-cuda]",
        "file": "test_kl_balance",
        "outcome": "failed",
        "reason": "AssertionError: 0: largest error 3",
    }
    assert (rows[3]["name"], rows[4]["reason"]) == ("tests/test_d.py", "the process crashed or hung in it")


TESTS_THAT_END_BADLY = """
import os, pathlib, time, pytest

def test_passes(): pass
def test_is_wrong(): assert 1 == 2
@pytest.mark.skip(reason="not here")
def test_is_skipped(): pass
def test_crashes(): os._exit(3)
@pytest.mark.gpu(30)
def test_takes_long(): time.sleep(4)
def test_hangs(): time.sleep(600)
def test_breaks_the_device(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_fails_once():
    before = pathlib.Path(__file__).with_name("before")
    alone = before.exists()
    before.touch()
    assert alone
@pytest.mark.gpu(600)
def test_wants_more_than_there_is(): raise RuntimeError("was begun")
def test_is_last(): pass
"""


@pytest.mark.parametrize("cores", [pytest.param(2, marks=pytest.mark.slow), 5])
def test_a_test_that_takes_its_process_along_costs_no_other(cores, record, tmp_path, monkeypatch):
    file = tmp_path / "test_bad.py"
    file.write_text(TESTS_THAT_END_BADLY)
    monkeypatch.setattr(gpu_steps.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(gpu_steps, "TESTS", ("-m", "", "--rootdir", str(tmp_path), str(file)))
    monkeypatch.setenv("HDFAST_LONGEST_TEST", "2")
    alone = cores > 3  # what fails side by side with others is tried once more
    assert gpu_steps.tests(record)(60) == f"{4 if alone else 5} of 10 tests failed"
    assert {row["name"]: (row["outcome"], row["reason"][:24]) for row in record.found["tests"]} == {
        "test_passes": ("passed", ""),
        "test_is_wrong": ("failed", "assert 1 == 2"),
        "test_is_skipped": ("skipped", "not here"),
        "test_crashes": ("failed", "the process crashed or h"),
        "test_takes_long": ("passed", ""),
        "test_hangs": ("failed", "the process crashed or h"),
        "test_breaks_the_device": ("failed", "RuntimeError: CUDA error"),
        "test_fails_once": ("passed", "") if alone else ("failed", "assert False"),
        "test_wants_more_than_there_is": ("skipped", "may take 600 s, there ar"),
        "test_is_last": ("passed", ""),
    }


def test_what_is_under_way_when_time_is_over_has_not_failed(tmp_path):
    path = tmp_path / "outcomes"
    gpu_tools.cut_off(path, 5.0)  # nothing was begun
    path.unlink()
    rows = [
        ("crashes", None, 1.0),
        ("fails", "failed", 2.0),
        ("is stopped", "failed", 6.0),
        ("is killed", None, 4.0),
    ]
    path.write_text(
        "".join(
            json.dumps({"test": f"f.py::{t}", "outcome": o, "reason": "", "at": at}) + "\n"
            for t, o, at in rows
        )
    )
    gpu_tools.cut_off(path, 5.0)
    assert {row["name"]: row["outcome"] for row in gpu_tools.outcomes(path)} == {
        "crashes": "failed",
        "fails": "failed",
        "is stopped": "skipped",
        "is killed": "skipped",
    }


def test_time_of_kernels_that_overlap_and_of_none():
    spans = [("a", 0.0, 10.0), ("b", 5.0, 15.0), ("a", 20.0, 30.0), ("c", 22.0, 24.0)]
    found = gpu_tools.occupied(spans, updates=2)
    assert (found["kernels"], found["busy_us"], found["wall_us"]) == (2.0, 12.5, 15.0)
    assert found["idle_share"] == pytest.approx(5 / 30)
    assert found["top"][0] == {"name": "a", "launches": 1.0, "us": 10.0}
    assert gpu_tools.occupied([], updates=2) == {"kernels": 0}


@pytest.fixture
def record(tmp_path):
    return gpu_steps.Record(tmp_path / "card", time.monotonic() + 60, on_gpu=True)


def steps_of(record):
    return json.loads((record.folder / "record.json").read_text())["steps"]


def test_a_step_that_fails_is_recorded_and_the_next_one_done(record):
    def burst(limit):
        raise OSError("no room")

    limits = []
    record.step("first", 1, 4, burst)
    record.step("second", 1, 2, lambda limit: limits.append(limit))
    record.step("third", 1, 1, lambda limit: "skipped: not there")
    record.step("fourth", 1, 1, lambda limit: "partial: time was over")
    record.step("fifth", 0, 0, lambda limit: "exit code 3: said why")
    told = {name: (step["status"], step.get("reason")) for name, step in steps_of(record).items()}
    assert told == {
        "first": ("failed", "OSError: no room"),
        "second": ("ok", None),
        "third": ("skipped", "not there"),
        "fourth": ("partial", "time was over"),
        "fifth": ("failed", "exit code 3: said why"),
    }
    assert 20 < limits[0] <= 27.5  # half of what is left


def test_commands_that_fail_and_that_do_not_end():
    python = [sys.executable, "-c"]
    assert gpu_steps.execute([*python, "print('hello')"], 30) == (None, "hello\n")
    reason, _ = gpu_steps.execute([*python, "print('a'); raise SystemExit('because')"], 30)
    assert reason == "exit code 1: because"
    began = time.monotonic()
    asleep = "trap 'echo report; exit' INT; while :; do sleep 0.1; done"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a shell
    try:
        gpu_steps.heed_interrupts()
        assert gpu_steps.execute(["sh", "-c", asleep], 3) == (
            "partial: ended at its limit of 2 s",
            "report\n",
        )
    finally:
        signal.signal(signal.SIGINT, before)
    deaf = "trap '' INT; echo x; while :; do sleep 0.1; done"
    assert gpu_steps.execute(["sh", "-c", deaf], 3) == ("partial: ended at its limit of 2 s", "x\n")
    assert time.monotonic() - began < 300


@pytest.mark.parametrize("tool", ["ncu", "compute-sanitizer"])
def test_tools_and_packages_that_are_not_there(record, tool, monkeypatch):
    monkeypatch.setattr(gpu_tools, "find_tool", lambda name: None)
    assert gpu_steps.watched(record, tool, "found", [], "once")(10) == f"skipped: {tool} is not installed"
    record.on_gpu = False
    assert gpu_steps.watched(record, tool, "found", [], "once")(10) == "skipped: no CUDA device"
    assert gpu_steps.missing("torch", "no_such_package", "nor_this") == (
        "skipped: not installed: no_such_package, nor_this"
    )
    monkeypatch.setattr(gpu_steps, "missing", lambda *packages: f"skipped: {packages}")
    for step in (
        gpu_steps.tests(record),
        gpu_steps.benchmarks(record, ""),
        gpu_steps.peers(record),
        gpu_steps.training(record, "x"),
    ):
        assert step(10).startswith("skipped: (")


@pytest.mark.parametrize(
    ("tool", "said", "reason"),
    [
        ("ncu", RAW, None),
        ("ncu", FORBIDDEN, "ERR_NVGPUCTRPERM"),
        ("ncu", "", "no kernel was seen"),
        ("compute-sanitizer", MEMCHECK, "2 errors: {'Invalid"),
        ("compute-sanitizer", NO_CALLS, "Error: Target application"),
        ("compute-sanitizer", "========= ERROR SUMMARY: 0 errors\n", None),
    ],
)
def test_a_tool_s_output_decides_its_step(record, tool, said, reason, tmp_path, monkeypatch):
    fake = tmp_path / tool
    (tmp_path / "said").write_text(said)
    fake.write_text(f"#!/bin/sh\ncat {tmp_path / 'said'}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    got = gpu_steps.watched(record, tool, "found", [], "once")(30)
    assert got is None if reason is None else got.startswith(reason)
    assert record.found["found"] is not None


def test_benchmarks_that_crash_leave_the_rows_that_they_had(record, monkeypatch):
    def execute(command, seconds, **environment):
        Path(environment["HDFAST_BENCH_ROWS"]).write_text(
            '{"name": "a", "us": 1.0}\n{"name": "b", "us": 2.0}\n'
        )
        return "exit code -11: ", "said"

    monkeypatch.setattr(gpu_steps, "execute", execute)
    assert gpu_steps.benchmarks(record, "")(10) == "exit code -11: "
    assert [row["name"] for row in record.found["benchmarks"]] == ["a", "b"]


def test_work_whose_rows_fail_says_so(record, monkeypatch):
    def execute(command, seconds, **environment):
        path = command[command.index("--out") + 1]
        with open(path, "w") as file:
            file.write('{"kind": "peak", "what": "copy", "value": 1.0}\n{"kind": "peak", "error": "E: no"}\n')
        return None, ""

    monkeypatch.setattr(gpu_steps, "execute", execute)
    assert gpu_steps.work(record, "peaks")(30) == "1 of 2 rows failed: E: no"
    assert record.found["rows"][0]["value"] == 1.0


def test_a_peer_s_numbers_are_kept(record, monkeypatch):
    def execute(command, seconds, **environment):
        assert {"--here", "--graph"} <= set(command)
        Path(command[command.index("--json") + 1]).write_text('{"machine": {}, "results": [{"batch": 16}]}')
        return "partial: ended", "said"

    monkeypatch.setattr(gpu_steps, "execute", execute)
    monkeypatch.setattr(gpu_steps, "missing", lambda *packages: None)
    assert gpu_steps.peers(record)(30) == "partial: ended"
    assert record.found["peers"] == [{"batch": 16}]


def test_rows_are_kept_where_work_fails(tmp_path):
    rows = gpu_work.Rows(tmp_path / "rows", seconds=60)
    with rows.row(kind="a") as row:
        row["value"] = 1
    with rows.row(kind="b"):
        raise ValueError("first line\nsecond")
    with pytest.raises(RuntimeError), rows.row(kind="c"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(KeyboardInterrupt), rows.row(kind="broken off"):
        raise KeyboardInterrupt
    rows.until = 0
    with pytest.raises(TimeoutError), rows.row(kind="d"):
        pass
    assert [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()] == [
        {"kind": "a", "value": 1},
        {"kind": "b", "error": "ValueError: first line"},
        {"kind": "c", "error": "RuntimeError: CUDA error: an illegal memory access was encountered"},
    ]


def test_a_backend_is_forced_where_it_exists():
    def of(op):
        return dispatch.defaults("cuda").get(op)

    before = [dispatch.defaults(device) for device in ("cpu", "cuda")]
    with gpu_work.backend("triton"):
        assert (of("kl_balance"), of("adam_step"), of("rssm_observe")) == ("triton", "triton", "triton")
    with gpu_work.backend("triton-persistent"):
        assert (of("kl_balance"), of("adam_step"), of("rssm_observe")) == ("triton", "triton", "persistent")
        assert of("linear") == "fused"
    assert before == [dispatch.defaults(device) for device in ("cpu", "cuda")]
    with gpu_work.backend("reference"):
        assert dispatch.resolve_name("kl_balance", None, torch.zeros(1)) == "reference"
    with (
        pytest.raises(ValueError, match="no backend 'tritn'; the backends are default, reference"),
        gpu_work.backend("tritn"),
    ):
        pass


@pytest.mark.parametrize("name", [name for name in gpu_work.PARTS if name != "add"])
def test_every_part_can_be_captured(name, monkeypatch):
    """Recorded on the CPU, as the GPU is to capture it: the last two calls are replays."""
    made = record_instead_of_capturing(monkeypatch, gpu_work)
    config = apply_overrides(gpu_work.config_of("tiny"), gpu_work.SMALL)
    bench = Bench(config, torch.device("cpu"), torch.float32)
    run = gpu_work.part(bench, name, graph=True)
    for _ in range(WARMUP + 3):
        run()
    assert len(made) == 1
    assert made[0].recording is not None


@pytest.mark.parametrize(
    ("what", "name", "wrong"),
    [
        ("timings", "triton", []),
        ("timings", "triton-persistent", ["overlap"]),
        ("profiles", "triton", ["overlap"]),
    ],
)
def test_a_capture_of_overlapping_halves_that_fails_costs_no_other(what, name, wrong, tmp_path, monkeypatch):
    """Nothing can be captured after it."""
    failed, learner = [], SimpleNamespace(parameter_counts=lambda: {"total": 1})

    def part(bench, name, graph):
        def run():
            if graph and (failed or name == "overlap"):
                failed.append(name)
                raise RuntimeError("operation failed due to a previous error during capture")

        return run

    fakes = {
        "Bench": lambda *args: SimpleNamespace(learner=learner),
        "part": part,
        "timed": lambda run, device, warmup: {"us": run() or 1.0},
        "gflop": lambda *args: 1.0,
        "synchronize": lambda device: None,
        "profile": lambda **options: contextlib.nullcontext(SimpleNamespace(events=list)),
        "ON_CUDA": gpu_work.ON_CUDA[:1],
    }
    for attribute, fake in fakes.items():
        monkeypatch.setattr(gpu_work, attribute, fake)
    getattr(gpu_work, what)(torch.device("cuda"), name, gpu_work.Rows(tmp_path / "rows", 60, tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [row["part"] for row in rows if "error" in row] == wrong
    assert {("update", False), ("update", True)} <= {(row["part"], row["graph"]) for row in rows}


def test_what_runs_by_default_is_timed_and_seen_first_and_has_the_time(tmp_path, monkeypatch):
    left, limits = 455.0, {}

    def step(record, name, weight, of, do):
        nonlocal left
        limits[name] = left * weight / of
        left -= limits[name]

    monkeypatch.setattr(gpu_record, "machine", lambda: {"name": "NVIDIA H200", "device": "cuda:0"})
    monkeypatch.setattr(gpu_steps.Record, "step", step)
    monkeypatch.setattr(sys, "argv", ["gpu_record.py", "--out", str(tmp_path)])
    assert gpu_record.main() == 0
    assert list(limits)[:3] == ["rates", "tests", "timings triton-persistent"]
    least = {"timings triton-persistent": 35, "profile triton-persistent": 17, "choice": 60}
    assert {name for name, seconds in least.items() if limits[name] < seconds} == set()
    assert not limits.keys() & {"racecheck", "peers", "training", "game"}


def test_steps_for_which_there_is_no_time_are_left_out_whole():
    needed = {"rates": 10.0, "racecheck": 40.0, "peers": 0.0, "training": 60.0, "game": 60.0}
    assert gpu_record.left_out(needed, 160) == []
    assert gpu_record.left_out(needed, 150) == ["game"]
    assert gpu_record.left_out(needed, 40) == ["game", "training", "racecheck"]
    assert gpu_record.left_out({"rates": 10.0, "tests": 90.0}, 20) == []


def test_ncu_looks_at_every_kernel_but_those_of_the_scan():
    triton = pytest.importorskip("triton")
    names = {
        name
        for module in list(sys.modules.values())
        if getattr(module, "__name__", "").startswith("hdfast_kernels.")
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith(("_forward", "_backward"))
    }
    assert {"layer_norm_gru_wide_backward", "observe_forward"} <= names
    assert {name for name in names if not re.match(gpu_tools.NCU_KERNELS, name)} == {
        "observe_forward",
        "observe_backward",
    }
