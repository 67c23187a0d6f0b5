"""Trains every task of a suite with several seeds, each run in a process of its own, and prints the suite's table.

Flags after `--` are passed on to `hdfast.train`. With --vary, every combination of values has a folder of its own below
the logdir, and the table shows them side by side. A run's output goes to train.log in its directory. The same command
resumes all unfinished runs. Ctrl-C, or killing the sweep, stops all runs, each with a checkpoint.
"""

import argparse
import contextlib
import ctypes
import functools
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

from hdfast import config, config_file, envs, init_from, report, results, suites, variants
from hdfast.agent.custom import learner_class
from hdfast.flags import field_names
from hdfast.runtime import errors
from hdfast.runtime.arguments import Arguments, natural, positive
from hdfast.runtime.console import Console
from hdfast.runtime.device import resolve_device
from hdfast.runtime.errors import ConfigError, MissingLibraryError, OutputFullError, RunError
from hdfast.runtime.rundir import path_of
from hdfast.runtime.signals import StopRequest

OWN_FLAGS = ("--suite", "--task", "--seed", "--seeds", "--dry-run", "--help", "-h")
POLL_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


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
            return _launch((*job.command, *device), job.log, self._environment, _ends_with(os.getpid()))

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


def jobs_of(
    suite: suites.Suite,
    tasks: Sequence[suites.Task],
    seeds: Sequence[int],
    flags: Sequence[str],
    logdir: Path,
    variant: str = "",
) -> list[Job]:
    """Every task with every seed; all tasks with one seed come before the next seed, so that the table fills evenly.

    flags: of `hdfast.train`. logdir: the one named there. variant: what sets these apart from other jobs.
    """
    return [
        Job(
            name=f"{task.name} seed {seed}" + (f", {variant}" if variant else ""),
            command=(
                *(sys.executable, "-m", "hdfast.train", "--suite", suite.name),
                *("--task", task.name, "--seed", str(seed), *flags),
            ),
            log=path_of(logdir, suite.name, task.folder, seed) / "train.log",
        )
        for seed in seeds
        for task in tasks
    ]


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
            say(f"[{number}/{len(jobs)}] {job.name}: {_ending(code)} after {took}")

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


def _ends_with(parent: int) -> Callable[[], None]:
    """A new process calls this to get SIGHUP when `parent` is gone, which asks a run to save itself and end.

    Repeats change nothing, so a run that is already ending loses nothing. `nohup` is for terminals, not for this.
    """
    prctl = ctypes.CDLL(None).prctl

    def prepare() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        prctl(_PR_SET_PDEATHSIG, signal.SIGHUP)
        if os.getppid() != parent:  # it has already ended
            os.kill(os.getpid(), signal.SIGHUP)

    return prepare


def _launch(
    command: Sequence[str], log: Path, environment: dict[str, str], prepare: Callable[[], None] | None = None
) -> subprocess.Popen[bytes]:
    """A process in a group of its own: Ctrl-C reaches it once, from the sweep, not a second time from the terminal.

    prepare: called in the new process before the command begins.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        output.write(f"$ {shlex.join(command)}\n".encode())
        output.flush()
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            process_group=0,
            preexec_fn=prepare,
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


def _ending(code: int) -> str:
    """How a job ended; a code below 0 is that of a signal."""
    names = {int(signum): signum.name for signum in signal.Signals}
    if code < 0:
        return f"ended by {names.get(-code, f'signal {-code}')}"
    return f"exit code {code}" if code else "done"


def _last_line(log: Path) -> str:
    """The last words of a failed run: its error with the first detail line, else its last line."""
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    lines = lines[max((i for i, line in enumerate(lines) if line.startswith("$ ")), default=0) :]
    said = [line.rstrip() for line in lines if line.strip()]
    at = max((i for i, line in enumerate(said) if line.startswith("error: ")), default=-1)
    if at < 0:
        return said[-1].strip() if said else ""
    details = [line.strip() for line in said[at + 1 : at + 2] if line.startswith(" ")]
    return " ".join([said[at], *(f"({detail})" for detail in details)])


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments before and after `--`."""
    argv = list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    return argv[:cut], argv[cut + 1 :]


def main() -> None:
    parser = Arguments("python -m hdfast.sweep", __doc__)
    parser.usage = "%(prog)s [options] [-- flags of hdfast.train]"
    parser.add_argument("--suite", default="atari100k", help="suite to train")
    parser.add_argument(
        "--tasks", "--task", nargs="+", metavar="TASK", help="tasks to train; all of the suite if left out"
    )
    parser.add_argument(
        variants.FLAG,
        nargs="+",
        action="extend",
        default=argparse.SUPPRESS,  # "extend" would keep any other
        metavar="FLAG=VALUE,VALUE",
        help="settings to try all combinations of; a switch is true or false",
    )
    parser.add_argument("--seed", type=natural, default=0, help="first seed")
    parser.add_argument(
        "--seeds", type=positive, default=5, help="seeds of each task, counting up from --seed"
    )
    parser.add_argument("--jobs", type=positive, default=1, help="runs trained at a time")
    parser.add_argument("--devices", nargs="+", default=(), help="devices that the runs are spread over")
    parser.add_argument("--ray", metavar="ADDRESS", help="train on this ray cluster")
    own, flags = _split(sys.argv[1:])
    of_train = {config_file.FLAG, *(f"--{name.replace('_', '-')}" for name in field_names(config.Config()))}
    for flag in (arg.partition("=")[0] for arg in own):
        if flag not in OWN_FLAGS and flag.replace("_", "-").replace(".no-", ".") in of_train:
            raise ConfigError(f"{flag} is a flag of hdfast.train", hint="put it behind --")
    args = parser.parse_args(own)
    if given := [flag for flag in flags if flag.partition("=")[0] in OWN_FLAGS]:
        raise ConfigError(f"{given[0]} cannot come after --", hint="see python -m hdfast.sweep --help")
    suite = suites.get(args.suite)
    tasks = suite.select(name for given in args.tasks or () for name in given.split(",") if name)
    seeds = ["--seed", str(args.seed), "--seeds", str(args.seeds)]
    parsed = config.parse(["--suite", suite.name, *seeds, *flags])
    folders, jobs, tried = {}, [], variants.variants(getattr(args, "vary", ()))
    for seed in range(args.seed, args.seed + args.seeds):
        for variant in tried:
            folder = parsed.logdir / variant.folder
            more = [*flags, *variant.flags, *(["--logdir", str(folder)] if variant.folder else [])]
            folders[folder] = config.parse(["--suite", suite.name, *seeds, *more])
            jobs += jobs_of(suite, tasks, [seed], more, folder, variant.folder)
    threads = 1 if all(one.little_work for one in folders.values()) else None
    if args.ray and args.devices:
        raise ConfigError("--devices has no effect with --ray", hint="ray hands out the GPUs of its cluster")
    for name in args.devices:
        resolve_device(name)  # before any run is begun
    if not args.ray:  # of a cluster's machines, nothing is known here
        for task in tasks:
            envs.check(suite.name, task.name)
        for one in {one.init_from: one for one in folders.values()}.values():
            init_from.checkpoint_for(one)
        for one in folders.values():
            learner_class(one)
            if one.device != "auto":  # which needs no look, and so no GPU in this process
                resolve_device(one.device)
    pool = RayPool(args.ray) if args.ray else LocalPool(args.jobs, args.devices, threads=threads)
    say = functools.partial(Console(highlight=False).print, markup=False, soft_wrap=True)
    with StopRequest() as stop:
        failed = run(pool, jobs, args.jobs, stop, say)
    found = {str(folder): results.collect(folder, suite, tasks) for folder in folders}
    if len(found) > 1:
        report.compare(suite, found)
    else:
        report.show(suite, *found.values())
    if failed:
        logs = {job.name: job.log for job in jobs}
        details = [f"{name}: {_ending(code)}: {_last_line(logs[name])}" for name, code in failed.items()]
        raise RunError(f"{len(failed)} of {len(jobs)} runs failed", details=details)


if __name__ == "__main__":
    errors.main(main)
