"""The steps of a GPU record, each in a process of its own with a time limit, and what is kept of them.

See bench/gpu_record.py, which puts them in order.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import gpu_tools

ROOT = Path(__file__).resolve().parent.parent
# Most important first, in case time ends before all are done: graphs, and every kernel at the shapes of training.
TESTS = ("tests/test_cuda.py", "tests/kernels/test_training_shapes.py", "tests/kernels", "tests")
GRACE = 15  # seconds from the request to end, upon which reports are written, to the kill
WORKERS = 14  # processes that test side by side; they spend most of their time compiling
ALONE = 0.15  # share of the tests' time for trying alone what failed beside others
TESTS_GRACE = 4  # like GRACE, for tests


@dataclass
class Record:
    """What is known so far, and the steps that found it: status, seconds, and the reason if the status is not "ok".

    A step that ran out of time is "partial", one that lacks something it needs "skipped".
    """

    folder: Path
    until: float
    on_gpu: bool
    found: dict[str, Any] = field(default_factory=lambda: {"steps": {}, "rows": []})

    def step(self, name: str, weight: float, left: float, do: Callable[[float], str | None]) -> None:
        """Does one step in its share of the time.

        weight, left: the weight of this step, and the sum of its weight and those of all later steps.
        do: is given its limit in seconds; returns None, or why the step is not "ok".
        """
        limit = max(5.0, (self.until - time.monotonic() - 5) * (weight / left if left else 1.0))
        print(f"== {name}: at most {limit:.0f} s", flush=True)
        began = time.monotonic()
        try:
            reason = do(limit)
        except Exception as error:  # a step must not end the others; its reason is recorded
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
        """Appends the output of a command to the log beside the record."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.txt").open("a") as file:
            file.write(text)

    def write(self) -> None:
        """Writes the record as it is now, atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / "record.json.part"
        draft.write_text(json.dumps(self.found, indent=1) + "\n")
        draft.replace(self.folder / "record.json")


def execute(
    command: list[str], seconds: float, grace: float = GRACE, **environment: str
) -> tuple[str | None, str]:
    """Why a command failed (None if it did not), and all of its output.

    It is asked to end `grace` seconds before its limit (or a third of the limit, if that is less), and killed at it.
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
    """Makes processes started from here heed SIGINT, even if this one runs in the background of a shell."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # inherited by children, which a handler is not
        signal.signal(signal.SIGINT, signal.default_int_handler)


def missing(*packages: str) -> str | None:
    """Why to skip what needs these packages; None if all are installed."""
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    return f"skipped: not installed: {', '.join(absent)}" if absent else None


def work(record: Record, what: str, backend: str = "default") -> Callable[[float], str | None]:
    """The step that runs a kind of work of bench.gpu_work and adds its rows to the record."""

    def do(seconds: float) -> str | None:
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows"
            own = 0.7 * seconds  # after which no row is begun
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
    """The step of the tests that need a GPU, side by side; those that fail are tried once more, alone."""

    def do(seconds: float) -> str | None:
        if absent := missing("pytest"):
            return absent
        until = time.monotonic() + seconds
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        command += ["--continue-on-collection-errors", "-p", "bench.gpu_tests"]

        def share(path: Path, *options: str, until: float = until) -> str | None:
            """Runs a share of the tests in a process; if a test ends it, another process goes on behind that test."""
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
                    return reason or "pytest did not finish"

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
    """The step that times every op beside eager PyTorch."""

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
            lines = Path(folder) / "lines.jsonl"
            reason, said = execute([sys.executable, *command], seconds, HDFAST_BENCH_ROWS=str(lines))
            record.log(said)
            record.found["benchmarks"] = gpu_tools.benchmark_rows(report) or gpu_tools.lines_of(lines)
        return reason

    return do


def watched(
    record: Record, tool: str, name: str, options: list[str], what: str
) -> Callable[[float], str | None]:
    """The step that runs work of bench.gpu_work under an Nvidia tool; its findings are recorded as `name`."""

    def do(seconds: float) -> str | None:
        if not record.on_gpu:
            return "skipped: no CUDA device"
        path = gpu_tools.find_tool(tool)
        if path is None:
            return f"skipped: {tool} is not installed"
        # Memory in torch's cache is valid memory to the tool: overruns show only without the cache.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "compute-sanitizer" else {}
        command = [sys.executable, "-m", "bench.gpu_work", what, "--backend", "triton", "--out", os.devnull]
        reason, text = execute([path, *options, *command], seconds, grace=3, **environment)
        record.log(text)
        record.found[name] = gpu_tools.ncu_rows(text) if tool == "ncu" else gpu_tools.sanitizer_row(text)
        counted = tool == "ncu" and bool(record.found[name])
        # ncu calls the kernel that is under way when its time ends a failure.
        if (obstacle := gpu_tools.tool_obstacle(text)) and not (counted and reason):
            return obstacle
        if tool == "ncu":
            return reason if counted else reason or "no kernel was seen"
        errors = record.found[name]["errors"]
        return f"{errors} errors: {record.found[name]['kinds']}" if errors else reason

    return do


def peers(record: Record) -> Callable[[float], str | None]:
    """The step that times updates of sheeprl's DreamerV3 in turns with ours, by default and in bfloat16."""

    def do(seconds: float) -> str | None:
        if absent := missing("sheeprl", "tyro"):
            return absent
        with tempfile.TemporaryDirectory() as folder:
            numbers = Path(folder) / "numbers.json"
            command = ["-m", "bench.peers", "--here", "--graph", "--rounds", "10", "--json", str(numbers)]
            command += ["--precision", "default", "bfloat16"]
            reason, said = execute([sys.executable, *command], seconds)
            record.log(said)
            record.found["peers"] = json.loads(numbers.read_text())["results"] if numbers.exists() else []
        return reason

    return do


def training(record: Record, name: str, *flags: str) -> Callable[[float], str | None]:
    """The step of a real run with these flags; its curve is recorded as `name`, also if the run is ended early."""

    def do(seconds: float) -> str | None:
        if absent := missing("envpool", "tyro", "safetensors", "rich", "tensorboard", "PIL"):
            return absent
        with tempfile.TemporaryDirectory() as folder:
            command = ["-m", "hdfast.train", *flags, "--logdir", folder]
            if record.on_gpu:  # tuning would take all of the time; the step `choice` does it
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
