"""The record of a GPU: what is read from other tools' output, what is concluded, and what a reader is told."""

import json
import os
import re
import signal
import sys
import time

import pytest
import torch

from bench import gpu_record, gpu_tools, gpu_work
from bench.agent import Bench
from bench.gpu_defaults import proposal
from bench.gpu_predictions import RATES, compared, predictions, rates_of
from bench.gpu_report import markdown
from hdfast.config import apply_overrides
from hdfast.runtime.graphs import WARMUP
from hdfast_kernels import dispatch
from tests.recorder import record_instead_of_capturing

RAW = """\
==PROF== Connected to process 4242 (/usr/bin/python3.11)
==PROF== Profiling "layer_norm_silu_forward" - 0: 0%....50%....100% - 2 passes
{"kind": "once"}
==PROF== Disconnected from process 4242
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"dram__throughput.avg.pct_of_peak_sustained_elapsed","gpu__time_duration.sum","launch__registers_per_thread",\
"sm__throughput.avg.pct_of_peak_sustained_elapsed","sm__warps_active.avg.pct_of_peak_sustained_active"
"","","","","","","","","","","","%","ns","register/thread","%","%"
"0","4242","python3.11","127.0.0.1","layer_norm_silu_forward","1","7","(128, 1, 1)","(256, 1, 1)","0","9.0",\
"60.00","2,000","40","20.00","50.00"
"1","4242","python3.11","127.0.0.1","void at::native::vectorized_elementwise_kernel<4, float>(int, float)","1","7",\
"(128, 1, 1)","(9, 1, 1)","0","9.0","10.00","1,500.50","16","5.00","n/a"
"2","4242","python3.11","127.0.0.1","layer_norm_silu_forward","1","7","(128, 1, 1)","(256, 1, 1)","0","9.0",\
"90.00","6,000","40","40.00","70.00"
==WARNING== Note: Running with uncontrolled GPU caches.
"""
DETAILS = """\
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","python","h","kernel","1","7","(1, 1, 1)","(1, 1, 1)","0","9.0","Command line profiler metrics",\
"gpu__time_duration.sum","usecond","12.5"
"0","7","python","h","kernel","1","7","(1, 1, 1)","(1, 1, 1)","0","9.0","Command line profiler metrics",\
"launch__registers_per_thread","register/thread","255"
"""
FORBIDDEN = """\
==PROF== Connected to process 9 (/usr/bin/python3.11)
==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters on device 0.
==PROF== Disconnected from process 9
"""
MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at two_hot_forward+0x170 in two_hot.py:36
=========     by thread (0,0,0) in block (1,0,0)
=========     Address 0x7f6f3ec00001 is out of bounds
=========     Saved host backtrace up to driver entry point at kernel launch time
=========     Host Frame: [0x2df3f2]
=========
========= Invalid __global__ write of size 4 bytes
=========     at 0x160 in two_hot.py:36:two_hot_forward(float*)
=========     by thread (1,0,0) in block (1,0,0)
=========
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at observe_forward+0x100 in rssm.py:26
=========     and Read access at observe_forward+0x230 in rssm.py:29 [16 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
BROKEN_LINES = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at
=========     race_condition(float *)+0xb0 in demo.cu:28
=========     and Read access at
=========     race_condition(float *)+0xc0 in demo.cu:30
=========     [1024 hazards]
=========
========= Error: Race reported between Write access at 0x68 in sgemm_nt
=========     and Read access at 0x78 in sgemm_nt [20 hazards]
=========
========= Invalid __global__ read of size 2 bytes
=========     at void at::native::copy_kernel<float>(int, float *)+0x90
=========     by thread (65,0,0) in block (0,0,0)
=========
========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)
"""
NO_CALLS = """\
========= COMPUTE-SANITIZER
========= Error: Target application terminated before first instrumented API call
========= Tracking kernels launched by child processes requires the --target-processes all option.
"""


def test_ncu_kernels_are_added_up_and_weighted_by_time():
    first, second = gpu_tools.ncu_rows(RAW)
    assert first == {
        "name": "layer_norm_silu_forward",
        "launches": 2,
        "us": 8.0,
        "dram_percent": 82.5,  # (60 * 2 + 90 * 6) / 8
        "sm_percent": 35.0,
        "occupancy_percent": 65.0,
        "registers": 40.0,
    }
    assert second["us"] == pytest.approx(1.5005)
    assert second["occupancy_percent"] is None


def test_ncu_with_a_line_per_metric():
    (row,) = gpu_tools.ncu_rows(DETAILS)
    assert (row["us"], row["registers"], row["dram_percent"]) == (12.5, 255.0, None)


@pytest.mark.parametrize(
    ("unit", "us"), [("ns", 0.003), ("usecond", 3.0), ("ms", 3e3), ("second", 3e6), ("", 3.0)]
)
def test_units_of_ncu(unit, us):
    assert gpu_tools._number("3", unit) == pytest.approx(us)


def test_why_a_tool_could_not_look():
    assert gpu_tools.ncu_rows(FORBIDDEN) == []
    assert gpu_tools.tool_obstacle(FORBIDDEN).startswith(
        "ERR_NVGPUCTRPERM - The user does not have permission"
    )
    assert gpu_tools.tool_obstacle(NO_CALLS).endswith("terminated before first instrumented API call")
    for text in (RAW, MEMCHECK, RACECHECK, ""):
        assert gpu_tools.tool_obstacle(text) is None


def test_what_compute_sanitizer_found():
    assert gpu_tools.sanitizer_row(MEMCHECK) == {
        "errors": 2,
        "kinds": {"Invalid __global__ write of size 4 bytes in two_hot_forward": 2},
    }
    assert gpu_tools.sanitizer_row(RACECHECK) == {
        "errors": 1,
        "kinds": {"Error: Race reported in observe_forward": 1},
    }
    assert gpu_tools.sanitizer_row(BROKEN_LINES) == {
        "errors": 3,
        "kinds": {
            "Error: Race reported in race_condition": 1,
            "Error: Race reported in sgemm_nt": 1,
            "Invalid __global__ read of size 2 bytes in at::native::copy_kernel": 1,
        },
    }
    clean = gpu_tools.sanitizer_row("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n")
    assert clean == {"errors": 0, "kinds": {}}
    assert gpu_tools.sanitizer_row(NO_CALLS)["errors"] is None


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
        "name": "test_b[triton-cuda]",
        "file": "test_kl_balance",
        "outcome": "failed",
        "reason": "AssertionError: 0: largest error 3",
    }
    assert (rows[3]["name"], rows[4]["reason"]) == ("tests/test_d.py", "the process crashed or hung in it")
    assert gpu_tools.tests_of("kl_balance", rows) == {"passed": 1, "failed": 1}
    assert gpu_tools.tests_of("two_hot_loss", rows) == {}
    shapes = {"file": "test_training_shapes", "outcome": "passed"}
    names = (
        "t[fp32-two_hot_loss-16384-triton-cuda]",
        "test_rssm_observe_errs[triton-cuda-persistent-small-fp32]",
    )
    rows = [shapes | {"name": name} for name in names]
    assert gpu_tools.tests_of("two_hot_loss", rows) == {"passed": 1}
    assert gpu_tools.tests_of("rssm_observe", rows) == {}


TESTS_THAT_END_BADLY = """
import os, time, pytest

def test_passes(): pass
def test_is_wrong(): assert 1 == 2
@pytest.mark.skip(reason="not here")
def test_is_skipped(): pass
def test_crashes(): os._exit(3)
def test_hangs(): time.sleep(600)
def test_breaks_the_device(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_is_last(): pass
"""


def test_a_test_that_takes_its_process_along_costs_no_other(record, tmp_path, monkeypatch):
    file = tmp_path / "test_bad.py"
    file.write_text(TESTS_THAT_END_BADLY)
    monkeypatch.setattr(gpu_record, "TESTS", ("-m", "", "--rootdir", str(tmp_path), str(file)))
    monkeypatch.setenv("HDFAST_LONGEST_TEST", "2")
    assert gpu_record.tests(record)(60) == "4 of 7 tests failed"
    assert {row["name"]: (row["outcome"], row["reason"][:24]) for row in record.found["tests"]} == {
        "test_passes": ("passed", ""),
        "test_is_wrong": ("failed", "assert 1 == 2"),
        "test_is_skipped": ("skipped", "not here"),
        "test_crashes": ("failed", "the process crashed or h"),
        "test_hangs": ("failed", "the process crashed or h"),
        "test_breaks_the_device": ("failed", "RuntimeError: CUDA error"),
        "test_is_last": ("passed", ""),
    }


def test_time_of_kernels_that_overlap_and_of_none():
    spans = [("a", 0.0, 10.0), ("b", 5.0, 15.0), ("a", 20.0, 30.0), ("c", 22.0, 24.0)]
    found = gpu_tools.occupied(spans, updates=2)
    assert (found["kernels"], found["busy_us"], found["wall_us"]) == (2.0, 12.5, 15.0)
    assert found["idle_share"] == pytest.approx(5 / 30)
    assert found["top"][0] == {"name": "a", "launches": 1.0, "us": 10.0}
    assert gpu_tools.occupied([], updates=2) == {"kernels": 0}


def bench_row(op, implementation, us, group="g fp32", **more):
    return {"op": op, "group": group, "implementation": implementation, "us": us, **more}


def test_triton_is_proposed_where_it_is_right_and_faster_everywhere():
    ops = dict.fromkeys(
        ("image_loss", "kl_balance", "two_hot_loss", "lambda_return"), ("reference", "triton")
    )
    ops |= {"adam_step": ("reference",), "rssm_observe": ("reference", "triton")}
    tests = [
        {"file": f"test_{name}", "name": "t[triton-cuda]", "outcome": outcome, "reason": ""}
        for name, outcome in (("image_loss", "passed"), ("kl_balance", "failed"), ("two_hot", "passed"))
    ]
    tests.append(
        {
            "file": "test_training_shapes",
            "name": "t[rssm_observe-triton-cuda]",
            "outcome": "passed",
            "reason": "",
        }
    )
    benchmarks = [bench_row(name, "reference", 10.0) for name in ops]
    benchmarks += [bench_row(name, "triton", 4.0) for name in ops]
    benchmarks += [
        bench_row("two_hot_loss", i, us, "g bf16") for i, us in (("reference", 3.0), ("triton", 4.0))
    ]
    scan = {"kind": "timing", "part": "scan", "size": "small", "precision": "bfloat16", "graph": True}
    rows = [{**scan, "backend": "reference", "us": 9.0}, {**scan, "backend": "triton", "us": 3.0}]
    found = {
        row["op"]: (row["backend"], row["why"])
        for row in proposal({"tests": tests, "benchmarks": benchmarks, "rows": rows}, ops)
    }
    assert found == {
        "adam_step": ("reference", "has no Triton kernel"),
        "image_loss": ("triton", "1 tests passed; 2.50 to 2.50 x the reference"),
        "kl_balance": ("reference", "1 of 1 tests failed"),
        "lambda_return": ("reference", "no test of it ran on a GPU"),
        "rssm_observe": ("triton", "1 tests passed; 2.50 to 3.00 x the reference"),
        "two_hot_loss": ("reference", "1 tests passed; 0.75 to 2.50 x the reference"),
    }


def timing(part, backend, graph, us, **more):
    about = {"kind": "timing", "part": part, "size": "small", "precision": "bfloat16"}
    return {**about, "backend": backend, "graph": graph, **({"us": us} if us else {}), **more}


def test_predictions_stand_beside_what_was_measured():
    rows = [
        {"kind": "peak", "what": "copy", "unit": "GB/s", "value": 2412.0},
        timing("scan", "triton", True, 3136.0),
        timing("act 1", "reference", True, None, error="RuntimeError: no"),
    ]
    nbytes = 0.8 * 3350e9 * 1e-3  # a millisecond
    benchmarks = [
        bench_row("image_loss", "triton", 1500.0, bytes=nbytes),
        bench_row("image_loss", "eager", 9.0),
    ]
    found = {row["what"]: row for row in compared("NVIDIA H100 80GB HBM3", rows, benchmarks)}
    assert found["copy"]["ratio"] == pytest.approx(0.8)
    assert found["scan, Triton in a graph"]["ratio"] == pytest.approx(2.0)
    assert found["g fp32, Triton"]["predicted"] == pytest.approx(1000.0)
    assert found["act 1, graph"]["measured"] is None
    assert found["act 1, graph"]["ratio"] is None
    assert len(found) == len(predictions("H100")) + 1


def test_a_faster_card_is_predicted_to_be_faster():
    assert rates_of("NVIDIA A100-SXM4-80GB") == ("A100", RATES["A100"])
    assert rates_of("AMD EPYC")[0] == "H100"
    a100, h100 = ({p.what: p.value for p in predictions(card)} for card in ("A100", "H100"))
    assert a100["update, Triton in a graph"] > h100["update, Triton in a graph"]


def full_record():
    rows = [
        {"kind": "peak", "what": "copy", "unit": "GB/s", "value": 2412.0},
        {"kind": "peak", "what": "grid barrier, 64 programs", "unit": "µs", "error": "RuntimeError: a | b"},
        timing("update", "reference", False, 40_000.0, gflop=600.0, parameters=17_900_000),
        timing("update", "triton", True, 10_000.0, gflop=600.0, parameters=17_900_000),
        timing("scan", "triton", True, None, error="OutOfResources: shared"),
        {
            "kind": "profile", "part": "update", "size": "small", "backend": "triton", "graph": True,
            "kernels": 2100.0, "busy_us": 9000.0, "wall_us": 10_000.0, "idle_share": 0.1,
            "top": [{"name": "void at::native::" + "x" * 200, "launches": 64.0, "us": 900.0}],
        },
    ]  # fmt: skip
    benchmarks = [
        bench_row("kl_balance", "triton", 20.0, times_beside=3.0, gb_per_second=1500.0, share_of_peak=0.6)
    ]
    test = {"file": "test_kl_balance", "name": "t[triton-cuda]"}
    ops = {"kl_balance": ("reference", "triton")}
    record = {
        "machine": {"name": "NVIDIA H100", "device": "cuda:0", "memory_bytes": 80e9, "driver": None},
        "seconds": 400.0,
        "steps": {
            "rates": {"status": "ok", "seconds": 3.0},
            "ncu": {"status": "skipped", "seconds": 0.0, "reason": "ncu is not installed"},
        },
        "rows": rows,
        "tests": [
            {**test, "outcome": "failed", "reason": "largest error | 3"},
            {**test, "outcome": "passed"},
        ],
        "benchmarks": benchmarks,
        "ncu": gpu_tools.ncu_rows(RAW),
        "memcheck": gpu_tools.sanitizer_row(MEMCHECK),
        "training": [
            {"kind": "evaluation", "agent_steps": 1000 * k, "seconds": k, "score": 0.5} for k in range(3)
        ],
    }
    record["predictions"] = compared("H100", rows, benchmarks)
    record["cuda_default"] = proposal(record, ops)
    return record


def test_the_markdown_tells_it_all():
    text = markdown(full_record())
    assert text.startswith(
        "# NVIDIA H100\n\n`python bench/gpu_record.py`, 400 s: memory 80 GB, device cuda:0.\n"
    )
    for told in (
        "- An update of the small model in bfloat16: 10.00 ms with triton in a graph (60.0 TFLOP/s), "
        "4.0 x eager PyTorch.",
        "- 1 tests on the GPU passed, 1 failed.",
        "- Not complete: ncu (skipped).",
        "| ncu | skipped | ncu is not installed | 0 |",
        "| update small bfloat16 | 40,000 | 10,000 | 4.00 |",
        "| scan small bfloat16 |  | error |  |",
        "\n\n- 1 x OutOfResources: shared",
        "An update of the small model, 17.9 M parameters, B16 x T64, H15, is 600 GFLOP of matrix products.",
        "| kl_balance | reference | 1 of 2 tests failed |",
        "| grid barrier, 64 programs | RuntimeError: a \\| b | µs |",
        "| g fp32 | triton | 20.00 | 3.00 | 1,500 | 60% |",
        "| small, triton in a graph | 2,100 | 9,000 | 10,000 | 10% |",
        "| layer_norm_silu_forward | 2 | 8.000 | 4.00 | 82.5 | 35.0 | 65.0 | 40.0 |",
        "- memcheck: 2 errors in one update and one action of a small Triton model.",
        "\n\n- test_kl_balance::t[triton-cuda]: largest error \\| 3",
        "| 2,000 | 2 | 0.500 |",
    ):
        assert told in text, told
    for block in text.split("\n\n"):
        lines = [line.replace("\\|", "") for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1, block
        assert max(map(len, lines), default=0) < 300


def test_the_markdown_of_nothing():
    record = {"machine": {"name": "x", "device": "cpu"}, "seconds": 1.0, "steps": {}, "rows": []}
    record |= {
        "predictions": compared("x", [], []),
        "cuda_default": proposal(record, {"adam_step": ("reference",)}),
    }
    text = markdown(record)
    assert "nothing is measured without a GPU" in text
    assert "CUDA_DEFAULT: dict[str, str] = {}" in text
    assert "- Right and faster in Triton: nothing that was seen here." in text
    assert "## Training" not in text


@pytest.fixture
def record(tmp_path):
    return gpu_record.Record(tmp_path / "card", time.monotonic() + 60, on_gpu=True)


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
    assert gpu_record.execute([*python, "print('hello')"], 30) == (None, "hello\n")
    reason, _ = gpu_record.execute([*python, "print('a'); raise SystemExit('because')"], 30)
    assert reason == "exit code 1: because"
    began = time.monotonic()
    asleep = "import time\ntry: time.sleep(600)\nexcept KeyboardInterrupt: print('report')"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a shell
    try:
        assert gpu_record.execute([*python, asleep], 12) == ("partial: ended at its limit of 8 s", "report\n")
    finally:
        signal.signal(signal.SIGINT, before)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('x', flush=True); time.sleep(600)"
    assert gpu_record.execute([*python, deaf], 9) == ("partial: ended at its limit of 6 s", "x\n")
    assert time.monotonic() - began < 300


@pytest.mark.parametrize("tool", ["ncu", "compute-sanitizer"])
def test_tools_and_packages_that_are_not_there(record, tool, monkeypatch):
    monkeypatch.setattr(gpu_tools, "find_tool", lambda name: None)
    assert gpu_record.watched(record, tool, "found", [], "once")(10) == f"skipped: {tool} is not installed"
    record.on_gpu = False
    assert gpu_record.watched(record, tool, "found", [], "once")(10) == "skipped: no CUDA device"
    assert gpu_record.missing("torch", "no_such_package", "nor_this") == (
        "skipped: not installed: no_such_package, nor_this"
    )
    monkeypatch.setattr(gpu_record, "missing", lambda *packages: f"skipped: {packages}")
    for step in (gpu_record.tests(record), gpu_record.benchmarks(record, ""), gpu_record.training(record)):
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
    got = gpu_record.watched(record, tool, "found", [], "once")(30)
    assert got is None if reason is None else got.startswith(reason)
    assert record.found["found"] is not None


def test_work_whose_rows_fail_says_so(record, monkeypatch):
    def execute(command, seconds, **environment):
        path = command[command.index("--out") + 1]
        with open(path, "w") as file:
            file.write('{"kind": "peak", "what": "copy", "value": 1.0}\n{"kind": "peak", "error": "E: no"}\n')
        return None, ""

    monkeypatch.setattr(gpu_record, "execute", execute)
    assert gpu_record.work(record, "peaks")(30) == "1 of 2 rows failed: E: no"
    assert record.found["rows"][0]["value"] == 1.0


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
    before = dispatch.CPU_DEFAULT, dispatch.CUDA_DEFAULT
    scan = dispatch._ops["rssm_observe"].implementations["triton"]
    with gpu_work.backend("triton-persistent"):
        assert dispatch.CUDA_DEFAULT["kl_balance"] == "triton"
        assert "adam_step" not in dispatch.CUDA_DEFAULT
        assert dispatch._ops["rssm_observe"].implementations["triton"].keywords == {"persistent": True}
    assert before == (dispatch.CPU_DEFAULT, dispatch.CUDA_DEFAULT)
    assert dispatch._ops["rssm_observe"].implementations["triton"] is scan
    with gpu_work.backend("reference"):
        assert dispatch.resolve_name("kl_balance", None, torch.zeros(1)) == "reference"
    with (
        pytest.raises(ValueError, match="no backend 'tritn', right are default, reference"),
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


def test_compiled_kernels_are_kept_where_home_cannot_be_written(tmp_path, monkeypatch):
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    gpu_record.keep_compiled_kernels()
    assert "TRITON_CACHE_DIR" not in os.environ
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))  # no folder can be made in it
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # to be forgotten at the end
    del os.environ["TRITON_CACHE_DIR"]
    gpu_record.keep_compiled_kernels()
    assert os.path.isdir(os.environ["TRITON_CACHE_DIR"])
    os.rmdir(os.environ["TRITON_CACHE_DIR"])


def test_what_triton_cannot_build_its_launchers_with(monkeypatch):
    monkeypatch.setenv("CC", "/usr/bin/some-cc")
    monkeypatch.setattr(gpu_record.sysconfig, "get_path", lambda name: "/nowhere")
    assert gpu_record.compiler() == "no /nowhere/Python.h"
    monkeypatch.delenv("CC")
    monkeypatch.setattr(gpu_record.shutil, "which", lambda name: None)
    assert gpu_record.compiler() is None
