"""What the record of a GPU makes of the output of ncu and compute-sanitizer."""

import time
from types import SimpleNamespace

import pytest

from bench import gpu_steps, gpu_tests, gpu_tools
from tests.gpu_samples import BROKEN_LINES, FORBIDDEN, MEMCHECK, NO_CALLS, RACECHECK, RAW


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


@pytest.mark.parametrize(
    ("error", "lasts"),
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("CUDA error: operation failed due to a previous error during capture", True),
        ("CUDA error: operation not permitted when stream is capturing", True),
        ("CUDA error: capturing stream has unjoined work", True),
        ("captures_underway.empty() INTERNAL ASSERT FAILED", True),
        ("assert distance(eager, graph) <= 4 * distance(eager, again)", False),
        ("a CUDA graph needs a CUDA device", False),
    ],
)
def test_after_which_error_tests_go_on_in_another_process(error, lasts, tmp_path):
    outcomes = gpu_tests.Outcomes(tmp_path / "outcomes")
    told = {"when": "call", "passed": False, "failed": True, "outcome": "failed", "nodeid": "a"}
    outcomes.pytest_runtest_logreport(SimpleNamespace(**told, longrepr=None, longreprtext=f"E   {error}"))
    assert outcomes.lasting == lasts


def test_where_the_time_of_ncu_ends_it_has_not_failed(tmp_path, monkeypatch):
    over, last = "partial: ended at its limit of 36 s", '==ERROR== Failed to profile "adam_step_forward"\n'
    said = RAW + last
    record = gpu_steps.Record(tmp_path, time.monotonic() + 60, on_gpu=True)
    monkeypatch.setattr(gpu_tools, "find_tool", lambda name: name)
    monkeypatch.setattr(gpu_steps, "execute", lambda *args, **kwargs: (over, said))
    ncu = gpu_steps.watched(record, "ncu", "ncu", [], "once")
    assert ncu(30) == over
    assert record.found["ncu"]
    said = last
    assert ncu(30).startswith("Failed to profile")
