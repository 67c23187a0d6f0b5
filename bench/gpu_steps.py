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
    """The step that has sheeprl's DreamerV3 do updates in turns with ours, in its own precision and in bfloat16."""

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
    """The step of a real run with these flags; its curve is kept as `name` where it ends, or is ended."""

    def do(seconds: float) -> str | None:
        if absent := missing("envpool", "tyro", "safetensors", "rich", "tensorboard", "PIL"):
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
