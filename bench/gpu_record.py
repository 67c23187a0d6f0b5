"""Everything a GPU can tell about hdfast, in one run, as one record: `python bench/gpu_record.py`.

Runs the tests marked `gpu`, a micro-benchmark of the grid barrier, the benchmarks of ops and of the update, ncu on
the update if it is installed, and a short real training, and writes `record.json` and `record.md` to
`bench/results/<device>/`. Needs no network, and trains on whatever environments are installed. Each step has a time
limit, and a step that fails is recorded with what it said.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
NCU_METRICS = (
    "gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,"
    "sm__throughput.avg.pct_of_peak_sustained_elapsed,launch__registers_per_thread,launch__occupancy_limit_registers"
)


def run(name: str, command: list[str], seconds: float, **environment: str) -> dict[str, Any]:
    """Runs a step and keeps its exit code, its wall time and the end of what it said."""
    print(f"== {name}: {' '.join(command)}", flush=True)
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    began = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
        code, said = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        code, said = None, output.decode(errors="replace") if isinstance(output, bytes) else output
    print(said[-2000:], flush=True)
    return {
        "command": " ".join(command),
        "exit_code": code,  # None: it ran past its limit
        "seconds": round(time.monotonic() - began, 1),
        "said": said[-4000:],
    }


def machine() -> dict[str, Any]:
    """What was measured on."""
    from hdfast.runtime.device import describe_device, resolve_device

    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    device = resolve_device("auto")
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    return {
        **describe_device(device),
        "torch": torch.__version__,
        "triton": version,
        "commit": commit or None,
    }


def benchmarks(selection: str, seconds: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Runs `pytest bench/ --benchmark-only -k selection`; returns the step and a row per benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "bench.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "bench",
            "--benchmark-only",
            "-q",
            f"--benchmark-json={report}",
        ]
        step = run(f"benchmarks {selection}", command + (["-k", selection] if selection else []), seconds)
        rows = (
            json.loads(report.read_text())["benchmarks"] if report.exists() and report.stat().st_size else []
        )
    return step, [
        {
            "name": row["name"],
            "group": row["group"],
            "median_us": row["stats"]["median"] * 1e6,
            "min_us": row["stats"]["min"] * 1e6,
            "rounds": row["stats"]["rounds"],
            **row["extra_info"],
        }
        for row in rows
    ]


def profile_with_ncu(seconds: float) -> dict[str, Any]:
    """ncu's counters of the kernels of one eager Triton update."""
    ncu = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    if not Path(ncu).exists():
        return {"exit_code": None, "said": "ncu is not installed"}
    update = [sys.executable, "-m", "hdfast.profile", "--suite", "demo", "--updates", "1"]
    command = [ncu, "--metrics", NCU_METRICS, "--csv", "--launch-count", "400", *update]
    return run("ncu", command, seconds, HDFAST_BACKEND="triton")


def train(seconds: float, graph: bool) -> dict[str, Any]:
    """A short real training; the suite that is installed and learns soonest."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "hdfast.train", "--suite", "demo", "--logdir", folder]
        step = run("train", command + (["--train.graph"] if graph else []), seconds)
        scores = next(Path(folder).rglob("scores.jsonl"), None)
        lines = [json.loads(line) for line in scores.read_text().splitlines()] if scores else []
    curve = [
        (row["agent_steps"], row["seconds"], row["score"]) for row in lines if row["kind"] == "evaluation"
    ]
    return {
        **step,
        "evaluations": [dict(zip(("agent_steps", "seconds", "score"), row, strict=True)) for row in curve],
    }


def markdown(record: dict[str, Any]) -> str:
    """The record as tables."""
    about = record["machine"]
    lines = [f"# {about.get('name')}", "", "`python bench/gpu_record.py`", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()] + [""]
    lines += ["| step | exit | seconds |", "|---|---|---|"]
    steps = {k: v for k, v in record.items() if isinstance(v, dict) and "exit_code" in v}
    lines += [f"| {name} | {step['exit_code']} | {step.get('seconds', '')} |" for name, step in steps.items()]
    if record.get("barrier_us"):
        lines += ["", f"Grid barrier among 64 programs: {record['barrier_us']:.2f} µs."]
    lines += ["", "| benchmark | group | median µs | min µs | GB/s | GFLOP/s |", "|---|---|---|---|---|---|"]
    for row in record["benchmarks"]:
        bandwidth = row.get(
            "gb_per_second", row.get("bytes", 0) / row["median_us"] / 1e3 if row.get("bytes") else ""
        )
        rate = row.get("gflop_per_second", "")
        cells = [f"{x:.1f}" if isinstance(x, float) else str(x) for x in (bandwidth, rate)]
        lines.append(
            f"| {row['name']} | {row['group']} | {row['median_us']:.1f} | {row['min_us']:.1f} | {' | '.join(cells)} |"
        )
    lines += ["", "| agent steps | seconds | score |", "|---|---|---|"]
    lines += [
        f"| {r['agent_steps']} | {r['seconds']:.0f} | {r['score']} |" for r in record["train"]["evaluations"]
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of all records")
    parser.add_argument("--select", default="", help="pytest -k expression for the benchmarks")
    parser.add_argument("--seconds", type=float, default=460, help="time limit of the whole record")
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    on_gpu = torch.cuda.is_available()
    record: dict[str, Any] = {"machine": machine()}
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--benchmark-skip"]
    record["tests"] = run("tests", tests, 0.3 * args.seconds)
    if on_gpu:
        try:
            from bench.barrier import barrier_us

            record["barrier_us"] = barrier_us()
        except Exception as error:  # recorded, so that one kernel does not cost the whole record
            record["barrier_error"] = str(error)
    record["benchmark_step"], record["benchmarks"] = benchmarks(args.select, 0.4 * args.seconds)
    if on_gpu:
        record["ncu"] = profile_with_ncu(0.1 * args.seconds)
    record["train"] = train(0.2 * args.seconds, graph=on_gpu)
    name = re.sub(r"[^a-z0-9]+", "-", str(record["machine"].get("name", "cpu")).lower()).strip("-")
    folder = args.out / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "record.md").write_text(markdown(record))
    print(f"wrote {folder}/record.json and record.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
