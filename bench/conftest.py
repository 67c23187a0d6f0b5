"""What benchmarks share: the machine's own peak, a comparison that interleaves, and a table of ratios at the end."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hdfast_kernels import dispatch, native

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SECONDS = 0.25  # about as long as one implementation of one case is timed


def synchronised(function: Callable[[], Any]) -> Callable[[], None]:
    """`function`, to the end of what it starts on the device."""

    def run() -> None:
        function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return run


def seconds(function: Callable[[], None]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


@pytest.fixture(scope="session", autouse=True)
def memory_as_in_training() -> None:
    """A run makes the same tensors over and over: no implementation is to pay for new pages in every round."""
    if DEVICE.type == "cpu" and dispatch.native_built():
        native.keep_freed_memory()


@pytest.fixture(scope="session")
def peak_gb_per_second(memory_as_in_training) -> float:
    """What a copy reaches here, reads and writes, of more than the caches hold."""
    source = torch.ones(256 << 20, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = synchronised(lambda: target.copy_(source))
    copy()
    return 2 * source.nbytes / min(seconds(copy) for _ in range(10)) / 1e9


@pytest.fixture
def compare(benchmark, peak_gb_per_second) -> Callable[..., None]:
    """compare(run, eager, nbytes, **info): times `run`, and `eager` between its rounds, so that both see one machine.

    `nbytes` is what has to move at the least; the achieved rate and its share of the peak are told from it.
    """

    def timed(run: Callable[[], Any], eager: Callable[[], Any] | None, nbytes: int, **info: Any) -> None:
        run = synchronised(run)
        run()
        rounds = min(100, max(7, int(SECONDS / seconds(run))))
        beside: list[float] = []
        if eager is not None:
            eager = synchronised(eager)
            eager()

        def before() -> None:
            if eager is not None:
                beside.append(seconds(eager))

        benchmark.pedantic(run, setup=before, rounds=rounds, iterations=1)
        median = benchmark.stats.stats.median
        rate = nbytes / median / 1e9
        benchmark.extra_info |= {
            **info,
            "device": str(DEVICE),
            "threads": torch.get_num_threads(),
            "bytes": nbytes,
            "gb_per_second": rate,
            "share_of_peak": rate / peak_gb_per_second,
            "times_eager": statistics.median(beside) / median if beside else 1.0,
        }

    return timed


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """One line per benchmark that compares: the median, how many times faster than eager, and the rate."""
    session = getattr(config, "_benchmarksession", None)
    rows = [bench for bench in session.benchmarks if "times_eager" in bench.extra_info] if session else []
    if not rows:
        return
    terminalreporter.section("beside eager PyTorch, interleaved")
    head = f"{'group':40s} {'implementation':14s} {'median ms':>10s} {'x eager':>8s} {'GB/s':>8s} {'of peak':>8s}"
    terminalreporter.write_line(head)
    for bench in sorted(rows, key=lambda bench: (bench.group, bench.extra_info["times_eager"])):
        info = bench.extra_info
        terminalreporter.write_line(
            f"{bench.group:40s} {info['implementation']:14s} {bench.stats.median * 1e3:10.3f} "
            f"{info['times_eager']:8.2f} {info['gb_per_second']:8.1f} {info['share_of_peak']:8.0%}"
        )
