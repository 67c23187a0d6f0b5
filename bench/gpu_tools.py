"""Rows from the output of tools: ncu's CSV, compute-sanitizer, outcomes of tests, torch.profiler's spans."""

import csv
import io
import json
import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

NCU_METRICS = {
    "us": "gpu__time_duration.sum",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm_percent": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
# All kernels of the ops except those of the scan: some hundred launches in an update.
NCU_KERNELS = (
    "^(adam_step|gather_windows|layer_norm|onehot_linear|sample_onehot|kl_balance|two_hot|image|harmony_loss"
    "|lambda_return)_"
)
MICROSECONDS = {
    "n": 1e-3,
    "u": 1.0,
    "m": 1e3,
    "": 1e6,
}  # by the prefix of ncu's unit of time, "usecond" or "us"
# Errors after which nothing works on the device in this process.
LASTING = "illegal memory access|illegal instruction|misaligned address|launch failure|device-side assert"
# Errors after which nothing can be captured: PyTorch's allocator remains in the capture that failed.
CAPTURE = "during capture|stream is capturing|capturing (blocking )?stream|captures_underway"
ENDED, FINISHED = "the process crashed or hung in it", "all tests are done"
TOOLS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/nvidia/nsight-compute/*")


def find_tool(name: str) -> str | None:
    """Path of an Nvidia tool, from PATH or where CUDA installs it; None if it is not there."""
    places = [
        place for pattern in TOOLS for place in sorted(Path("/").glob(pattern.lstrip("/")), reverse=True)
    ]
    return shutil.which(name) or next((str(p / name) for p in places if (p / name).is_file()), None)


def ncu_rows(text: str) -> list[dict[str, Any]]:
    """Kernels in order of total time, from the output of `ncu --csv --page raw` with NCU_METRICS.

    Times are in µs; the other metrics are means over a kernel's launches, weighted by time.
    """
    # The table follows the program's own output and notes of ncu.
    begin = re.search(r'^"ID",', text, re.MULTILINE)
    if begin is None:
        return []
    by_name: dict[str, list[dict[str, float | None]]] = defaultdict(list)
    units: dict[str, str] = {}
    for line in csv.DictReader(io.StringIO(text[begin.start() :])):
        if line["ID"] == "":  # the second line
            units = line
        elif not line["ID"].isdecimal():  # output after the table
            break
        else:
            values = {
                key: _number(line.get(metric), units.get(metric)) for key, metric in NCU_METRICS.items()
            }
            by_name[line["Kernel Name"]].append(values)
    rows = []
    for name, found in by_name.items():
        total = sum(one["us"] or 0.0 for one in found)
        row: dict[str, Any] = {"name": name, "launches": len(found), "us": total}
        for key in list(NCU_METRICS)[1:]:
            known = [one for one in found if one[key] is not None and one["us"]]
            weight = sum(one["us"] for one in known)
            row[key] = sum(one[key] * one["us"] for one in known) / weight if weight else None
        rows.append(row)
    return sorted(rows, key=lambda row: -row["us"])


def _number(value: str | None, unit: str | None) -> float | None:
    try:
        scale = re.fullmatch(r"([num]?)(s|second)", unit or "")
        return float((value or "").replace(",", "")) * (MICROSECONDS[scale.group(1)] if scale else 1.0)
    except ValueError:  # "n/a", or nothing
        return None


def tool_obstacle(text: str) -> str | None:
    """Why ncu or compute-sanitizer could not do its work, if it says so."""
    for line in text.splitlines():
        if re.match(r"==ERROR==|========= (Internal|Target application|Error: (?!Race))", line):
            return line.strip("= ").removeprefix("ERROR==").strip()
    return None


def sanitizer_row(text: str) -> dict[str, Any]:
    """The errors counted by compute-sanitizer (None if it did not finish), and their kinds with kernels, most first."""
    found = re.search(r"^========= (?:ERROR|RACECHECK) SUMMARY: (\d+)", text, re.MULTILINE)
    kinds: Counter[str] = Counter()
    start = r"^========= (?=Invalid|Misaligned|Uninitialized|Barrier error|(?:\w+: )?Race)"
    for report in re.split(start, text, flags=re.MULTILINE)[1:]:
        flat = re.sub(r"\s*\n=========\s+", " ", report)  # long lines are broken after "at"
        kind = re.split(r" (?:between|at) ", flat)[0].strip()
        # "at kernel(...)+0x170 in file.py:36", in older versions "at 0x160 in file.py:36:kernel(...)", without line
        # numbers "at 0x160 in kernel(...)".
        place = re.search(r"\bat (?:0x\w+ in (?:\S+:\d+:)?)?(?:void )?([A-Za-z_][\w:]*)", flat)
        kinds[f"{kind} in {place.group(1)}" if place else kind] += 1
    return {"errors": int(found.group(1)) if found else None, "kinds": dict(kinds.most_common(10))}


def outcomes(*paths: Path) -> list[dict[str, str]]:
    """id, name, file, outcome (passed, failed, skipped) and reason of every test that bench.gpu_tests recorded.

    A test that was begun and has no outcome crashed or hung its process: it failed. Of several files, the last one in
    which a test was not skipped counts.
    """
    last: dict[str, dict[str, str]] = {}
    for path in paths:
        found = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            row = json.loads(line)
            if row["outcome"] != FINISHED:
                found[row["test"]] = row
        last |= {test: row for test, row in found.items() if test not in last or row["outcome"] != "skipped"}
    rows = []
    for test, row in last.items():
        file, _, name = test.partition("::")
        told = {"outcome": row["outcome"] or "failed", "reason": row["reason"] if row["outcome"] else ENDED}
        rows.append({"id": test, "name": name.rpartition("::")[2] or file, "file": Path(file).stem, **told})
    return rows


def cut_off(path: Path, end: float) -> None:
    """Makes what was running at `end` (time.monotonic()) count as skipped: it was asked to stop, and then killed."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    last = {row["test"]: row for row in lines if row["outcome"] != FINISHED}
    under_way = [t for t, row in last.items() if row["outcome"] == "failed" and row["at"] >= end]
    under_way += [lines[-1]["test"]] if lines and lines[-1]["outcome"] is None else []
    with path.open("a") as file:
        for test in under_way:
            row = {"test": test, "outcome": "skipped", "reason": "time was over", "at": end}
            file.write(json.dumps(row) + "\n")


def finished(path: Path) -> bool:
    """Whether bench.gpu_tests got through all its tests."""
    return path.exists() and any(
        json.loads(line)["outcome"] == FINISHED for line in path.read_text().splitlines()
    )


def benchmark_rows(path: Path) -> list[dict[str, Any]]:
    """A row for each comparison in pytest-benchmark's report, times in µs; none if there is no report."""
    if not path.exists() or not path.stat().st_size:
        return []
    return [
        {
            "name": row["name"],
            "group": row["group"],
            "us": row["stats"]["median"] * 1e6 / row["extra_info"].get("calls", 1),
            "least_us": row["stats"]["min"] * 1e6 / row["extra_info"].get("calls", 1),
            "rounds": row["stats"]["rounds"],
            **row["extra_info"],
        }
        for row in json.loads(path.read_text())["benchmarks"]
        if "implementation" in row["extra_info"]  # the one being timed when time ran out has none
    ]


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Rows that a process wrote one by one, if it did not live to write its report."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def occupied(spans: list[tuple[str, float, float]], updates: int, top: int = 60) -> dict[str, Any]:
    """How many kernels run in an update, how long at least one of them runs, and how long none.

    spans: name, begin and end in µs of everything that ran in `updates` updates. The idle share is that of the time
    from the first begin to the last end.
    """
    if not spans:
        return {"kernels": 0}
    spans = sorted(spans, key=lambda span: span[1])
    busy, until = 0.0, spans[0][1]
    times: dict[str, list[float]] = defaultdict(list)
    for name, begin, end in spans:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
        times[name].append(end - begin)
    wall = until - spans[0][1]
    most = sorted(times.items(), key=lambda entry: -sum(entry[1]))[:top]
    return {
        "kernels": len(spans) / updates,
        "busy_us": busy / updates,
        "wall_us": wall / updates,
        "idle_share": 1 - busy / wall if wall else 0.0,
        "top": [
            {"name": name, "launches": len(each) / updates, "us": sum(each) / updates} for name, each in most
        ],
    }
