"""Everything a GPU can tell about hdfast, in one run, as one record: `python bench/gpu_record.py`.

Rates of the machine and of the grid barrier; update, scan, imagination, acting and replay on every backend, eager and
as CUDA graphs; the tests marked `gpu`; every op beside eager PyTorch; what torch.profiler, ncu and compute-sanitizer
see; a short training; predictions beside measurements; and which backends should run by default.

Writes `record.json` after every step, and at the end `record.md`, to `bench/results/<device>/`, beside what all its
commands said (`log.txt`) and timelines for a browser's tracing page (`trace-*.json.gz`). Needs no network.
Every step has a time limit and a process of its own; one that fails, or whose tool or package is not there, is
recorded with its reason, and what it had found by then is kept. On a CPU it runs to the end, too.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # run by its path, from wherever, in a clone or where hdfast is not installed
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from bench import gpu_tools  # noqa: E402
from bench.gpu_defaults import proposal  # noqa: E402
from bench.gpu_predictions import compared  # noqa: E402
from bench.gpu_report import markdown  # noqa: E402

# What tells most comes first, if time ends before all are done: graphs, and every kernel at the rows of training.
TESTS = ("tests/test_cuda.py", "tests/kernels/test_training_shapes.py", "tests/kernels", "tests")
GRACE = 15  # seconds between a request to end, at which reports are written, and the end
WORKERS = 14  # processes that test side by side, most of their time compiling
ALONE, TESTS_GRACE = 0.15, 4  # of the tests' time, for what failed beside others; as GRACE


@dataclass
class Record:
    """What is known so far, and the steps by which it came: status, seconds, and the reason where it is not "ok".

    A step whose time was over is "partial", one that something is missing for "skipped".
    """

    folder: Path
    until: float
    on_gpu: bool
    found: dict[str, Any] = field(default_factory=lambda: {"steps": {}, "rows": []})

    def step(self, name: str, weight: float, left: float, do: Callable[[float], str | None]) -> None:
        """Does one step in its share of the time: `do` takes its limit in seconds and returns why it is not "ok".

        weight, left: of this step, and of it and all that follow.
        """
        limit = max(5.0, (self.until - time.monotonic() - 5) * (weight / left if left else 1.0))
        print(f"== {name}: at most {limit:.0f} s", flush=True)
        began = time.monotonic()
        try:
            reason = do(limit)
        except Exception as error:  # one step must not cost the others; its reason is in the record
            reason = f"{type(error).__name__}: {error}"
        status, colon, why = (reason or "ok").partition(": ")
        if not colon or status not in ("skipped", "partial"):
            status, why = "ok" if reason is None else "failed", reason
        step = {"status": status, "seconds": round(time.monotonic() - began, 1)}
        if reason is not None:
            step["reason"] = why
            print(f"   {status}: {step['reason']}", flush=True)
        self.found["steps"][name] = step
        self.write()

    def log(self, text: str) -> None:
        """Keeps all that a command said beside the record."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.txt").open("a") as file:
            file.write(text)

    def write(self) -> None:
        """The record as it is, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / "record.json.part"
        draft.write_text(json.dumps(self.found, indent=1) + "\n")
        draft.replace(self.folder / "record.json")


def execute(
    command: list[str], seconds: float, grace: float = GRACE, **environment: str
) -> tuple[str | None, str]:
    """Why a command failed (None: it did not), and all that it said.

    `grace` seconds before its limit, or for short limits a third of them, it is asked to end, at the limit killed.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, **environment},
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        grace, reason = min(grace, seconds / 3), None
        try:
            process.wait(seconds - grace)
        except subprocess.TimeoutExpired:
            reason = f"partial: ended at its limit of {seconds - grace:.0f} s"
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(0)
        text = said.read()
    if reason is None and process.returncode:
        lines = [line for line in text.strip().splitlines() if line.strip()] or [""]
        reason = f"exit code {process.returncode}: {lines[-1][:300]}"
    return reason, text


def heed_interrupts() -> None:
    """Has what this process starts heed SIGINT, also where it was started in the background of a shell."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # which is inherited, a handler is not
        signal.signal(signal.SIGINT, signal.default_int_handler)


def missing(*packages: str) -> str | None:
    """The reason to skip what needs these packages; None if they are there."""
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    return f"skipped: not installed: {', '.join(absent)}" if absent else None


def machine() -> dict[str, Any]:
    """What was measured on, and with what."""
    import torch

    from hdfast.runtime.device import describe_device, resolve_device

    versions = {"torch": torch.__version__}
    if importlib.util.find_spec("triton"):
        import triton

        versions["triton"] = triton.__version__
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    driver = subprocess.run(
        [gpu_tools.find_tool("nvidia-smi") or "true", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        **describe_device(resolve_device("auto")),
        **versions,
        "python": sys.version.split()[0],
        "compiler": compiler(),
        "driver": driver.stdout.strip().splitlines()[0] if driver.stdout.strip() else None,
        "commit": git.stdout.strip() or None,
    }


def compiler() -> str | None:
    """What Triton builds its launchers with, or what it will not find: a C compiler and Python's headers."""
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return f"no {header}" if found and not header.exists() else found


def keep_compiled_kernels() -> None:
    """Has all steps compile a kernel once, also where the home folder cannot be written to."""
    if "TRITON_CACHE_DIR" in os.environ or "TRITON_HOME" in os.environ:
        return
    try:
        (Path.home() / ".triton" / "cache").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=Path.home() / ".triton" / "cache"):
            pass
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton-")


def work(record: Record, what: str, backend: str = "default") -> Callable[[float], str | None]:
    """The step that has bench.gpu_work do something, and takes in its rows."""

    def do(seconds: float) -> str | None:
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows"
            own = 0.7 * seconds  # no row is begun later
            command = [
                "-m",
                "bench.gpu_work",
                what,
                "--backend",
                backend,
                "--out",
                str(rows),
                "--seconds",
                f"{own:.0f}",
                "--traces",
                str(record.folder),
            ]
            reason, said = execute([sys.executable, *command], seconds, grace=2)
            record.log(said)
            found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
        record.found["rows"] += found
        wrong = [row["error"] for row in found if "error" in row]
        if wrong and reason is None:
            reason = f"{len(wrong)} of {len(found)} rows failed: {wrong[0]}"
        return reason if found or reason else f"partial: no row was begun in {own:.0f} s"

    return do


def tests(record: Record) -> Callable[[float], str | None]:
    """The step of the tests that need a GPU, side by side; what fails there is tried once more, alone."""

    def do(seconds: float) -> str | None:
        if absent := missing("pytest"):
            return absent
        until = time.monotonic() + seconds
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        command += ["--continue-on-collection-errors", "-p", "bench.gpu_tests"]

        def share(path: Path, *options: str, until: float = until) -> str | None:
            """What a process does of the tests, and where a test ended it, another one with those behind it."""
            found = -1
            while True:
                left = max(5.0, until - time.monotonic())
                own = [f"--outcomes={path}", f"--left={left:.0f}", *options]
                reason, said = execute([*command, *own, *TESTS], left, TESTS_GRACE, OMP_NUM_THREADS="2")
                record.log(said)
                before, found = found, len(gpu_tools.outcomes(path))
                over = time.monotonic() > until - TESTS_GRACE
                if over:
                    gpu_tools.cut_off(path, until - TESTS_GRACE)
                if gpu_tools.finished(path):
                    return None
                if over or found == before:
                    return reason or "pytest came to no end"

        with tempfile.TemporaryDirectory() as folder:
            workers = min(WORKERS, max(1, (os.cpu_count() or 1) - 2)) if record.on_gpu else 1
            paths = [Path(folder) / f"outcomes {at}" for at in range(workers)]
            with ThreadPoolExecutor(workers) as pool:
                each = [
                    pool.submit(share, path, f"--share={at}/{workers}", until=until - ALONE * seconds)
                    for at, path in enumerate(paths)
                ]
            reason = next(filter(None, [one.result() for one in each]), None)
            failed = [test["id"] for test in gpu_tools.outcomes(*paths) if test["outcome"] == "failed"]
            if failed and workers > 1:
                among = Path(folder) / "failed"
                among.write_text("\n".join(failed))
                paths.append(Path(folder) / "alone")
                reason = share(paths[-1], f"--among={among}") or reason
            record.found["tests"] = found = gpu_tools.outcomes(*paths)
        if not found:
            return reason or "no test was begun"
        if failures := sum(test["outcome"] == "failed" for test in found):
            reason = f"{failures} of {len(found)} tests failed" + (f"; {reason}" if reason else "")
        if all(test["outcome"] == "skipped" for test in found):
            return f"skipped: all {len(found)} tests: {found[0]['reason']}"
        return reason

    return do


def benchmarks(record: Record, select: str) -> Callable[[float], str | None]:
    """The step of the benchmarks of ops, beside eager PyTorch."""

    def do(seconds: float) -> str | None:
        if absent := missing("pytest", "pytest_benchmark"):
            return absent
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "bench.json"
            command = [
                "-m",
                "pytest",
                "bench/test_ops.py",
                "--benchmark-only",
                "-q",
                f"--benchmark-json={report}",
            ]
            command += ["-k", select] if select else []
            reason, said = execute([sys.executable, *command], seconds)
            record.log(said)
            record.found["benchmarks"] = gpu_tools.benchmark_rows(report)
        return reason

    return do


def watched(
    record: Record, tool: str, name: str, options: list[str], what: str
) -> Callable[[float], str | None]:
    """The step that runs work of bench.gpu_work under an Nvidia tool, and keeps what `name` makes of its output."""

    def do(seconds: float) -> str | None:
        if not record.on_gpu:
            return "skipped: no CUDA device"
        path = gpu_tools.find_tool(tool)
        if path is None:
            return f"skipped: {tool} is not installed"
        # Memory that torch keeps for later is valid memory to the tool: only without its cache an overrun shows.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "compute-sanitizer" else {}
        command = [sys.executable, "-m", "bench.gpu_work", what, "--backend", "triton", "--out", os.devnull]
        reason, text = execute([path, *options, *command], seconds, grace=3, **environment)
        record.log(text)
        record.found[name] = gpu_tools.ncu_rows(text) if tool == "ncu" else gpu_tools.sanitizer_row(text)
        if obstacle := gpu_tools.tool_obstacle(text):
            return obstacle
        if tool == "ncu":
            return reason if record.found[name] else reason or "no kernel was seen"
        errors = record.found[name]["errors"]
        return f"{errors} errors: {record.found[name]['kinds']}" if errors else reason

    return do


def training(record: Record, name: str, *flags: str) -> Callable[[float], str | None]:
    """The step of a real run with these flags; its curve is kept as `name` where it ends, or is ended."""

    def do(seconds: float) -> str | None:
        if absent := missing("envpool", "tyro", "safetensors", "rich"):
            return absent
        with tempfile.TemporaryDirectory() as folder:
            command = ["-m", "hdfast.train", *flags, "--logdir", folder]
            if record.on_gpu:  # what `choice` does would take all of the time
                command += ["--train.no-tune", "--train.graph", "on"]
            reason, said = execute([sys.executable, *command], seconds)
            record.log(said)
            scores = next(Path(folder).rglob("scores.jsonl"), None)
            lines = [json.loads(line) for line in scores.read_text().splitlines()] if scores else []
        record.found[name] = [
            {key: line[key] for key in ("kind", "agent_steps", "seconds", "score")} for line in lines
        ]
        return reason

    return do


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of all records")
    parser.add_argument(
        "--select", default="not compile", help="pytest -k expression for the benchmarks of ops"
    )
    parser.add_argument("--seconds", type=float, default=460, help="time limit of the whole record")
    parser.add_argument(
        "--steps", default="", help="regular expression: only the steps whose name it is found in"
    )
    args = parser.parse_args()
    began = time.monotonic()
    heed_interrupts()
    keep_compiled_kernels()
    about = machine()
    on_gpu = about["device"].startswith("cuda")
    if not on_gpu:
        sys.stderr.write("no GPU here: recording what there is of this CPU\n")
    folder = args.out / re.sub(r"[^a-z0-9]+", "-", str(about["name"]).lower()).strip("-")
    record = Record(folder, began + args.seconds, on_gpu)
    record.found["machine"] = about
    gpu = 1 if on_gpu else 0  # what is only for a GPU takes no time from the rest
    metrics = ",".join(gpu_tools.NCU_METRICS.values())
    # Our own kernels, at the clock of a run, not the base clock; not the 640 launches of the scan, which torch.profiler
    # sees. In base units, since one line of units stands for a column.
    ncu = ["--csv", "--page", "raw", "--print-units", "base", "--metrics", metrics, "--clock-control", "none"]
    ncu += ["--profile-from-start", "off", "--kernel-name", f"regex:{gpu_tools.NCU_KERNELS}"]
    # Without API errors: torch and Triton ask the driver for what it may not have, and each "no" would count.
    sanitizer = ["--report-api-errors", "no", "--tool"]
    backends = {"reference": 5, "triton": 8, "triton-persistent": 3} if on_gpu else {"default": 5}
    profiled = ("reference", "triton") if on_gpu else ("default",)
    # With how much of the time, beside each other. The tests, side by side, compile kernels for all that follow.
    steps: list[tuple[str, float, Callable[[float], str | None]]] = [
        ("rates", 3, work(record, "peaks")),
        ("tests", 26, tests(record)),
        *((f"timings {name}", weight, work(record, "timings", name)) for name, weight in backends.items()),
        ("ops", 13, benchmarks(record, args.select)),
        *((f"profile {name}", 3, work(record, "profiles", name)) for name in profiled),
        ("ncu", 8 * gpu, watched(record, "ncu", "ncu", ncu, "once")),
        # First without the tools, so that under them nothing has to be compiled.
        *([("kernels", 2, work(record, "kernels", "triton"))] if on_gpu else []),
        (
            "memcheck",
            3 * gpu,
            watched(record, "compute-sanitizer", "memcheck", [*sanitizer, "memcheck"], "kernels"),
        ),
        (
            "racecheck",
            3 * gpu,
            watched(record, "compute-sanitizer", "racecheck", [*sanitizer, "racecheck"], "kernels"),
        ),
        *([("choice", 6, work(record, "choice"))] if on_gpu else []),
        # The suite that learns soonest, and a game of Atari 100k for as long as there is time.
        ("training", 10, training(record, "training", "--suite", "demo")),
        ("game", 6, training(record, "game", "--suite", "atari100k", "--task", "Boxing")),
    ]
    steps = [step for step in steps if re.search(args.steps, step[0])]
    for at, (name, weight, do) in enumerate(steps):
        record.step(name, weight, sum(step[1] for step in steps[at:]), do)
    from hdfast_kernels import dispatch

    found, ops = record.found, {op: tuple(dispatch._ops[op].implementations) for op in dispatch.ops()}
    rows, benches = (found["rows"], found.get("benchmarks", [])) if on_gpu else ([], [])
    found["predictions"] = compared(about["name"], rows, benches)
    found["cuda_default"] = proposal(found, ops)
    found["seconds"] = round(time.monotonic() - began, 1)
    record.write()
    (folder / "record.md").write_text(markdown(found))
    print(f"wrote {folder}/record.json and record.md after {found['seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
