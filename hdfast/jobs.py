"""Runs jobs, some at a time, on this machine or on a ray cluster: each a command that trains one run."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hdfast.runtime import errors, tethered
from hdfast.runtime.errors import MissingLibraryError, OutputFullError, RunError
from hdfast.runtime.signals import StopRequest

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Job:
    """One run: its name, the command that trains it, and the file that takes its output."""

    name: str
    command: tuple[str, ...]
    log: Path


class Pool(Protocol):
    """Where jobs run."""

    def start(self, job: Job, slot: int) -> Any:
        """Begins a job and returns its handle. slot: 0 to jobs - 1, used by no other running job."""

    def poll(self, handle: Any) -> int | None:
        """The exit code of a job; None while it runs."""

    def stop(self, handle: Any) -> None:
        """Asks a job to save itself and end."""


class LocalPool:
    """Processes on this machine. They save themselves and end when this one does, even if it is killed.

    jobs: how many at a time; on CPUs each gets its share of the cores.
    devices: values of `--device` for the slots in turn; none leaves it to the train flags.
    threads: of each job on the CPU, in place of its share; OMP_NUM_THREADS overrides both.
    """

    def __init__(self, jobs: int, devices: Sequence[str] = (), *, threads: int | None = None) -> None:
        self._devices = devices
        threads = threads or max(1, len(os.sched_getaffinity(0)) // jobs)
        self._environment = {"OMP_NUM_THREADS": str(threads), **os.environ}

    def start(self, job: Job, slot: int) -> subprocess.Popen[bytes]:
        device = ("--device", self._devices[slot % len(self._devices)]) if self._devices else ()
        with errors.disk_errors(job.log, "write the log"):
            tether = (sys.executable, "-I", tethered.__file__, str(os.getpid()))
            return _launch((*job.command, *device), job.log, self._environment, tether)

    def poll(self, handle: subprocess.Popen[bytes]) -> int | None:
        return handle.poll()

    def stop(self, handle: subprocess.Popen[bytes]) -> None:
        handle.terminate()


class RayPool:
    """Tasks of a ray cluster whose machines share the run directories; each takes a GPU if the cluster has any.

    address: of the cluster, as `ray.init` takes it; "auto" for the one this machine belongs to.

    Raises: MissingLibraryError without ray, RunError if there is no cluster at `address`.
    """

    def __init__(self, address: str) -> None:
        try:
            import ray
        except ImportError:
            raise MissingLibraryError("--ray needs ray", hint="pip install 'ray>=2.40,<3'") from None
        try:
            ray.init(address=address, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise RunError(f"no ray cluster: {error}", where=f"--ray {address}") from error
        self._ray = ray
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        self._task = ray.remote(num_gpus=gpus, max_retries=0)(_run_remotely)

    def start(self, job: Job, slot: int) -> Any:
        return self._task.remote(job.command, str(job.log.absolute()), os.getcwd())

    def poll(self, handle: Any) -> int | None:
        if not self._ray.wait([handle], timeout=0)[0]:
            return None
        try:
            return self._ray.get(handle)
        except self._ray.exceptions.TaskCancelledError:
            return 128 + signal.SIGTERM
        except self._ray.exceptions.RayError:
            return 1

    def stop(self, handle: Any) -> None:
        self._ray.cancel(handle)  # KeyboardInterrupt in the task


def run(
    pool: Pool, jobs: Sequence[Job], at_a_time: int, stop: StopRequest, say: Callable[[str], None]
) -> dict[str, int]:
    """Runs all jobs and returns the exit codes of those that failed, by name; -9 of one that SIGKILL ended.

    stop: once a stop is requested, no job is begun, those running are asked to end, and then Interrupted is raised.
    say: gets one line for each job that begins or ends.
    """
    waiting, running, slots = deque(enumerate(jobs, 1)), {}, list(range(at_a_time))
    failed: dict[str, int] = {}

    def begin() -> None:
        number, job = waiting.popleft()
        running[slots[0]] = number, job, pool.start(job, slots[0]), time.monotonic()
        del slots[0]
        say(f"[{number}/{len(jobs)}] {job.name}: started, output in {job.log}")

    def reap() -> None:
        for slot, (number, job, handle, began) in list(running.items()):
            if (code := pool.poll(handle)) is None:
                continue
            del running[slot]
            slots.append(slot)
            if code:
                failed[job.name] = code
            took = f"{time.monotonic() - began:.0f} s"
            say(f"[{number}/{len(jobs)}] {job.name}: {ending(code)} after {took}")

    try:
        while (running or waiting) and not stop:
            while waiting and slots and not stop:
                begin()
            time.sleep(POLL_SECONDS)
            reap()
    finally:
        if running:  # after a signal, a failed start of a job, or output without a reader
            for _, _, handle, _ in running.values():
                pool.stop(handle)
            with contextlib.suppress(BrokenPipeError, OutputFullError):
                runs = f"{len(running)} run{'s' * (len(running) > 1)}"
                say(f"stopping {runs}, each with a checkpoint")
        while running:
            time.sleep(POLL_SECONDS)
            with contextlib.suppress(BrokenPipeError, OutputFullError):
                reap()
    stop.check()
    return failed


def _launch(
    command: Sequence[str], log: Path, environment: dict[str, str], tether: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    """A process in a group of its own: Ctrl-C reaches it once, from the sweep, not a second time from the terminal.

    tether: the command that begins the command.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        output.write(f"$ {shlex.join(command)}\n".encode())
        output.flush()
        return subprocess.Popen(
            (*tether, *command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            process_group=0,
        )


def _run_remotely(command: Sequence[str], log: str, folder: str) -> int:
    """Body of a ray task: the exit code of the command. Cancelling it stops the command with a checkpoint."""
    os.chdir(folder)
    process = _launch((sys.executable, *command[1:]), Path(log), dict(os.environ))
    try:
        while process.poll() is None:  # cancelling interrupts Python code, not a system call
            time.sleep(POLL_SECONDS)
        return process.returncode
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def ending(code: int) -> str:
    """How a job ended; a code below 0 is that of a signal."""
    names = {int(signum): signum.name for signum in signal.Signals}
    if code < 0:
        return f"ended by {names.get(-code, f'signal {-code}')}"
    return f"exit code {code}" if code else "done"
