"""What benchmarks share: a comparison with interleaved rounds, and the tables of all comparisons at the end."""

import json
import os
import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import table
from bench.machine import (
    copy_gb_per_second,
    copy_seconds,
    gemm_gflop_per_second,
    in_a_row,
    launches,
    seconds,
    synchronised,
)
from hdfast.runtime.device import prepare_device, resolve_device

DEVICE = resolve_device("auto")
prepare_device(DEVICE, little_work=False)  # memory is kept as in a run: no implementation pays for new pages
# About how long an implementation of a case is timed where no number of rounds is given.
SECONDS = 0.25 if DEVICE.type == "cpu" else 0.05
NOISE = 1.1  # a smaller ratio is not reported
HEAD = [
    "group",
    "",
    "implementation",
    "median ms",
    "beside ms",
    "x",
    "GFLOP",
    "GFLOP/s",
    "GB/s",
    "of peak",
    "per s",
]


@pytest.fixture
def compare(benchmark) -> Callable[..., None]:
    """Times a function in turns with another, so that both meet the machine in the same state; see `timed`."""

    def timed(
        run: Callable[[], Any],
        beside: Callable[[], Any] | None = None,
        *,
        implementation: str,
        against: str = "",
        default: bool = False,
        nbytes: int | None = None,
        gflop: float | None = None,
        dtype: torch.dtype = torch.float32,
        count: int | None = None,
        rounds: int | None = None,
        warmups: int = 1,
        graph: bool = False,
        **info: Any,
    ) -> None:
        """Times `run`, and before each of its rounds `beside`, until all that they start on the device is done.

        implementation, against: the names of `run` and `beside`.
        default: whether `run` is what runs if nothing is chosen.
        nbytes: the least that has to move; reported as a rate, and as a share of the rate of a large copy. What runs by
            default in a graph also as a share of what copies reach that move as much in as many launches, which takes
            a profiler and a graph of its own.
        gflop, dtype: of the matrix work; reported as a rate, and as a share of the rate of a large product.
        count: what `run` gets done, reported per second.
        graph: whether on CUDA both run as replays of a CUDA graph, see `in_a_row`.
        rounds: by default as many as take about SECONDS, between 7 and 100.
        """
        called = run
        prepare = in_a_row if graph else lambda function, device: (synchronised(function, device), 1)
        run, calls = prepare(run, DEVICE)
        beside, others = prepare(beside, DEVICE) if beside else (None, 1)
        for _ in range(warmups):
            run()
            if beside:
                beside()
        besides: list[float] = []

        def before() -> None:
            if beside:
                besides.append(seconds(beside) / others)

        rounds = rounds or min(100, max(7, int(SECONDS / seconds(run))))
        benchmark.pedantic(run, setup=before, rounds=rounds, iterations=1)
        median = benchmark.stats.stats.median / calls
        info |= {
            "median_ms": median * 1e3,
            "calls": calls,
            "implementation": implementation,
            "default": default,
            "against": against,
            "device": str(DEVICE),
            "threads": torch.get_num_threads(),
        }
        if beside:
            info["beside_ms"] = statistics.median(besides) * 1e3
            info["times_beside"] = statistics.median(besides) / median
            info["calls_beside"] = others
        if nbytes:
            rate = nbytes / median / 1e9
            share = rate / copy_gb_per_second(DEVICE)
            info |= {"bytes": nbytes, "gb_per_second": rate, "share_of_peak": share}
            if default and calls > 1 and (count_of := launches(called, DEVICE)):
                of_copies = copy_seconds(DEVICE, nbytes, count_of) / median
                info |= {"launches": count_of, "share_of_copies": of_copies}
        if gflop:
            rate = gflop / median
            share = rate / gemm_gflop_per_second(DEVICE, dtype)
            info |= {"gflop": gflop, "gflop_per_second": rate, "share_of_peak": share}
        if count:
            info["per_second"] = count / median
        benchmark.extra_info |= info
        if path := os.environ.get("HDFAST_BENCH_ROWS"):  # so that a crash loses one row, not all of them
            own = {"name": benchmark.name, "group": benchmark.group, "us": median * 1e6}
            with open(path, "a") as file:
                file.write(json.dumps(own | info) + "\n")

    return timed


def row(bench: Any) -> list[str]:
    info = bench.extra_info
    share = info.get("share_of_peak")
    times = info.get("times_beside")
    return [
        bench.group,
        "*" if info["default"] else "",
        info["implementation"],
        table.number(info["median_ms"], 4),
        table.number(info.get("beside_ms"), 4),
        "" if times is None else f"{times:.2f}",
        *(table.number(info.get(key)) for key in ("gflop", "gflop_per_second", "gb_per_second")),
        "" if share is None else f"{share:.0%}",
        table.number(info.get("per_second")),
    ]


def not_the_fastest(rows: list[Any]) -> list[str]:
    """A line for every op whose default is beaten here by another backend or by eager PyTorch."""
    groups = defaultdict(list)
    for bench in rows:
        if bench.extra_info["implementation"] != "compile":
            groups[bench.group].append(bench.extra_info)
    lines = []
    for group, infos in groups.items():
        best = max(infos, key=lambda info: info.get("times_beside", 1.0))
        for info in infos:
            times, most = (one.get("times_beside", 1.0) for one in (info, best))
            if info["default"] and most > NOISE * times:
                lines.append(
                    f"{group}: {info['implementation']} runs, "
                    f"{best['implementation']} is {most / times:.2f} x as fast"
                )
    return lines


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Prints a table for each thing compared with: times, ratios, rates, and shares of the machine's peaks."""
    session = getattr(config, "_benchmarksession", None)
    sections = defaultdict(list)
    for bench in session.benchmarks if session else []:
        if "against" in bench.extra_info:
            sections[bench.extra_info["against"]].append(bench)
    for against, rows in sections.items():
        title = f"beside {against}, interleaved; * runs by default" if against else "alone"
        terminalreporter.section(title)
        rows.sort(key=lambda bench: (bench.group, bench.extra_info.get("times_beside", 1.0)))
        for line in table.aligned(*table.filled(HEAD, [row(bench) for bench in rows]), texts=3):
            terminalreporter.write_line(line)
        if against == "eager":
            lines = not_the_fastest(rows)
            terminalreporter.write_line("")
            terminalreporter.write_line(
                "the default is the fastest everywhere" if not lines else "\n".join(lines)
            )
