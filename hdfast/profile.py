"""Shows where the time of an update goes: runs updates on random replay data and prints the share of each phase and op.

All other flags are those of `hdfast.train`, and select the run whose update is measured (suite, task, sizes, device,
precision). The first line is timed without the profiler, because profiling itself costs time.
"""

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich import box
from rich.table import Table
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile, record_function

from hdfast import config as configs
from hdfast.agent.learner import Learner
from hdfast.config import Config
from hdfast.replay import Replay
from hdfast.replay.contents import random_row, replay_specs
from hdfast.runtime import entry
from hdfast.runtime.arguments import Arguments, given_path, natural, positive
from hdfast.runtime.console import Console, say
from hdfast.runtime.device import describe_device, ready_device, resolve_precision
from hdfast.runtime.errors import disk_errors
from hdfast.runtime.profiling import phase
from hdfast.streams import make_envs, stream_seed
from hdfast.tuning.choice import Job
from hdfast.tuning.settle import settle

PHASES = ("sample", "world model", "imagination", "actor-critic", "optimizers")


def build(config: Config) -> tuple[Learner, Callable[[], None]]:
    """A learner, and its update on a replay of random rows, with the ops that a run would use.

    Raises: HdfastError, as a run of this config would.
    """
    configs.check_no_dry_run(config)
    device = ready_device(config.device, config.little_work, config.train.graph)
    batch, length = config.replay.batch, config.replay.length
    with make_envs(config, config.tasks[0], num_envs=config.env.num_envs, stream="profile") as env:
        dtype = resolve_precision(config.precision, device)
        job = Job(env.obs_specs, env.actions, config, device, dtype)
        settle(job, check=lambda: None, say=say).use(device)
        learner = job.learner(config.seed)
        capacity = 2 * length * env.num_envs
        specs = replay_specs(env.obs_specs, env.actions)
        replay = Replay(specs, num_envs=env.num_envs, capacity=capacity, device=device)
        rng = np.random.default_rng(stream_seed(config.seed, "profile"))
        for _ in range(2 * length):
            replay.add(random_row(env.obs_specs, env.actions, env.num_envs, rng))

    def update() -> None:
        with phase("sample"):
            replay.stage(batch, length)
        learner.update(replay.sample)

    return learner, update


@dataclass(frozen=True)
class Profile:
    """What `measure` found; all times in ms per update. On CUDA, phases and ops are in device time.

    wall, cpu: of updates without the profiler; cpu is the sum over all threads.
    phases: time of each of PHASES and of the rest. ops: (name, calls per update, own time without callees).
    """

    wall: float
    cpu: float
    phases: dict[str, float]
    ops: list[tuple[str, float, float]]


def run_plain(learner: Learner, update: Callable[[], None], updates: int) -> tuple[float, float]:
    """Wall and CPU time of one update in ms; between cudaProfilerStart and Stop, for Nsight."""
    cuda = learner.device.type == "cuda"
    synchronize = torch.cuda.synchronize if cuda else (lambda: None)
    synchronize()
    with torch.cuda.profiler.profile() if cuda else contextlib.nullcontext():
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(updates):
            update()
        synchronize()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return 1e3 * wall / updates, 1e3 * cpu / updates


def measure(
    learner: Learner, update: Callable[[], None], updates: int, *, trace: Path | None = None
) -> Profile:
    """Runs `updates` updates without and as many with the profiler.

    trace: a file for Chrome's trace viewer or Perfetto, compressed if it ends in .gz.

    Raises: DiskFullError, RunError if the trace cannot be written.
    """
    if trace is not None:
        with disk_errors(trace, "write the trace"):
            open(trace, "ab").close()  # torch would fail silently, and replace an empty folder
    wall, cpu = run_plain(learner, update, updates)
    cuda = learner.device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # above its highest level: nothing on stderr
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    # On CUDA, backward would run in a separate thread, whose kernels are not counted in the ranges of this one.
    alone = torch.autograd.set_multithreading_enabled(False)
    with alone, profile(activities=activities, acc_events=True) as profiler:
        for _ in range(updates):
            with record_function("update"):
                update()
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    kind = "device" if cuda else "cpu"

    def ms(event: FunctionEventAvg, what: str) -> float:
        return getattr(event, what.format(kind)) / 1e3 / updates

    # On CUDA, kernels are listed beside the ops that launched them, and ranges a second time, as device work.
    events = {event.key: event for event in profiler.key_averages() if event.device_type == DeviceType.CPU}
    # A learner of one's own need not have all phases.
    phases = {name: ms(events[name], "{}_time_total") if name in events else 0.0 for name in PHASES}
    phases["the rest"] = ms(events.pop("update"), "{}_time_total") - sum(phases.values())
    ops = [
        (name, event.count / updates, ms(event, "self_{}_time_total"))
        for name, event in events.items()
        if name not in PHASES
    ]
    return Profile(wall, cpu, phases, sorted(ops, key=lambda op: -op[2]))


def tables(found: Profile, top: int) -> list[Table]:
    """Phases, and the `top` ops."""
    total = sum(found.phases.values())
    phases = Table("phase, under the profiler", box=box.SIMPLE_HEAD)
    ops = Table("op", box=box.SIMPLE_HEAD)
    for table, columns in ((phases, ("ms", "share")), (ops, ("calls", "self ms", "share"))):
        for column in columns:
            table.add_column(column, justify="right")
    for name, ms in found.phases.items():
        phases.add_row(name, f"{ms:.2f}", f"{ms / total:.0%}")
    for name, calls, ms in found.ops[:top]:
        ops.add_row(name, f"{calls:g}", f"{ms:.2f}", f"{ms / total:.0%}")
    return [phases, ops]


def main() -> None:
    parser = Arguments("python -m hdfast.profile", __doc__)
    parser.usage = "%(prog)s [options] [flags of hdfast.train]"
    parser.add_argument("--updates", type=positive, default=10, help="updates to measure")
    parser.add_argument("--warmup", type=natural, default=3, help="updates to run first, unmeasured")
    parser.add_argument("--top", type=positive, default=15, help="ops to list")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--trace", type=given_path, help="write a Chrome trace to this file")
    either.add_argument("--plain", action="store_true", help="run without this profiler, for nsys or ncu")
    args, flags = parser.parse_known_args()
    learner, update = build(configs.parse(flags, "python -m hdfast.profile", parser.own()))
    for _ in range(args.warmup):
        update()
    if args.plain:
        wall, cpu = run_plain(learner, update, args.updates)
        sys.stdout.write(f"{summary(learner)}: {wall:.2f} ms wall, {cpu:.2f} ms CPU per update\n")
        return
    found = measure(learner, update, args.updates, trace=args.trace)
    console = Console()
    console.print(
        f"{summary(learner)}: {found.wall:.2f} ms wall, {found.cpu:.2f} ms CPU per update", soft_wrap=True
    )
    for table in tables(found, args.top):
        console.print(table, width=None if console.is_terminal else 110)
    if learner.device.type == "cuda":
        console.print(nsight(flags), markup=False, soft_wrap=True)


def summary(learner: Learner) -> str:
    """What was measured, in one line."""
    config, device = learner.config, describe_device(learner.device)
    million = learner.parameter_counts()["total"] / 1e6
    how = f", {device['instruction_set']}" if device.get("instruction_set") else ""
    if count := device.get("threads"):
        how += f", {count} thread{'s' * (count > 1)}"
    precision = str(learner.dtype).removeprefix("torch.")
    shape = f"B{config.replay.batch} T{config.replay.length} H{config.behavior.horizon}"
    return f"{million:.2f} M parameters, {shape}, {precision} on {device['name']}{how}"


def nsight(flags: Sequence[str]) -> str:
    """The command lines that show the same updates in Nvidia's tools."""
    ours = shlex.join(["python", "-m", "hdfast.profile", "--plain", *flags])
    return (
        "timeline: nsys profile --trace=cuda,nvtx --capture-range=cudaProfilerApi " + ours + "\n"
        "kernels:  ncu --profile-from-start off --set basic --launch-count 200 " + ours
    )


if __name__ == "__main__":
    entry.main(main)
