"""The work of a GPU record, each kind in a process: `python -m bench.gpu_work timings --backend triton --out rows`.

A kernel that goes wrong can crash or hang its process: `bench/gpu_record.py` starts one for each kind of work and reads
the rows that it has written by its end, one JSON object per line, with an `error` if the work failed. On a CPU the same
work is done at a smaller size, without graphs.

Axes: T time, B windows, N environments.
"""

import argparse
import contextlib
import json
import re
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from bench.agent import ACTIONS, IMAGE, Bench, config_of, gflop, random_row
from bench.gpu_tools import LASTING, occupied
from bench.machine import copy_gb_per_second, gemm_gflop_per_second
from hdfast.config import Config
from hdfast.overrides import apply_overrides
from hdfast.runtime.device import prepare_device, resolve_device
from hdfast.runtime.graphs import WARMUP, CapturedStep
from hdfast.tuning.choice import Job
from hdfast.tuning.search import search
from hdfast_kernels import dispatch

BACKENDS = ("default", "reference", "triton", "triton-persistent")
# Size and precision, the most important first, in case time ends before the list does.
ON_CUDA = [
    ("small", "bfloat16"),
    ("small", "float32"),
    ("tiny", "bfloat16"),
    ("medium", "bfloat16"),
    ("large", "bfloat16"),
]
ON_CPU = [("tiny", "float32")]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The graph of two branches comes last: if its capture fails, PyTorch's allocator remains in it, and the process can
# make no other graph.
# An update whose convolutions are those that cuDNN finds fastest. A run leaves them to cuDNN's rules: what it finds may
# differ from run to run, and round otherwise.
SEARCHED = "update, cudnn.benchmark"
PARTS = ("update", "scan", "observe", "imagine", "act 1", "act 8", "sample", "add", "overlap")
ROUNDS, ROUND_SECONDS = 5, 0.1
# A model in which every kernel runs, small because compute-sanitizer takes some thousand times as long. 264 units are
# rows that belong to one warp each, in parts, and whose moments are kept for backward.
SMALL = {
    "replay": {"batch": 2, "length": 3},
    "rssm": {"deter": 32, "units": 32, "stoch": 4, "classes": 8},
    "network": {"units": 264, "layers": 1, "depth": 4, "bins": 41},
    "behavior": {"horizon": 2},
}
Run = Callable[[], Any]


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Makes `name` the default backend of every op that has it, and the reference that of all others.

    "default" changes nothing; "triton" includes the fused formulation of ops without a Triton kernel, and
    "triton-persistent" also the observe scan in one launch per direction.

    Raises: ValueError for another name.
    """
    if name not in BACKENDS:
        raise ValueError(f"no backend {name!r}; the backends are {', '.join(BACKENDS)}")
    before: dict[str, dict[str, str]] = {}
    try:
        if name != "default":
            wanted = {
                "triton": ("triton", "fused"),
                "triton-persistent": ("persistent", "triton", "fused"),
            }.get(name, (name,))
            chosen = dispatch.first_of(wanted)
            before = {device: dispatch.use(device, chosen) for device in ("cpu", "cuda")}
        yield
    finally:
        for device, table in before.items():
            dispatch.use(device, table)


@contextlib.contextmanager
def searching(on: bool) -> Iterator[None]:
    """Whether cuDNN tries its algorithms for each new convolution inside the block."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def synchronize(device: torch.device) -> None:
    """Waits for everything enqueued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Run, device: torch.device, warmup: int) -> dict[str, float]:
    """Median and least time of a call in µs; calls are enqueued back to back and awaited together, as in a run."""
    for _ in range(warmup):
        run()
    synchronize(device)

    def together(calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize(device)
        return (time.perf_counter() - began) / calls

    calls = max(1, min(100, int(ROUND_SECONDS / together(1))))
    rounds = ROUNDS if device.type == "cuda" else 2
    each = [together(calls) * 1e6 for _ in range(rounds)]
    return {"us": statistics.median(each), "least_us": min(each), "calls": rounds * calls}


def scan(bench: Bench) -> Run:
    """The observe scan, forward and backward, with the prior head that follows it."""
    rssm, config = bench.learner.model.rssm, bench.config
    T, B, device = config.replay.length, config.replay.batch, bench.device
    # A generator of its own: the device's may be unusable after a capture that failed.
    random = {"device": device, "generator": torch.Generator(device).manual_seed(0)}
    embed = torch.randn(T, B, rssm.post_embed.shape[1], **random)
    action = torch.randint(ACTIONS.count, (T, B), **random)
    is_first = torch.zeros(T, B, dtype=torch.bool, device=device)
    is_first[0] = True
    uniform = torch.rand(T, B, rssm.stoch, **random)
    parameters = list(rssm.parameters())

    def run() -> None:
        seen = rssm.observe(embed, action, is_first, uniform, bench.dtype)
        loss = seen.latent.deter.sum() + seen.latent.stoch.sum() + (seen.post_logp - seen.prior_logp).sum()
        torch.autograd.grad(loss, parameters, allow_unused=True)

    return run


def part(bench: Bench, name: str, graph: bool) -> Run:
    """One part as a function without arguments."""
    if name.startswith("act"):
        return bench.act(int(name.split()[1]), graph=graph)
    if name == "add":
        row = random_row(np.random.default_rng(0), 1)
        return lambda: bench.replay.add(row)
    if graph and name in ("update", SEARCHED, "overlap"):
        return getattr(bench, "overlap" if name == "overlap" else "graph")()
    others = {"scan": lambda: scan(bench), "sample": lambda: bench.sample}
    run = others.get(name, lambda: getattr(bench, name)())()
    if not graph:
        return run
    generators = [bench.learner.generator, *bench.replay.generators]
    return CapturedStep(lambda: (run(), None)[1], device=bench.device, generators=generators)


def timings(device: torch.device, name: str, write: "Rows") -> None:
    """A row for every part, size and precision, eager and as a graph; halves overlap only with a scan in one launch."""
    on_cuda, persistent = device.type == "cuda", name == "triton-persistent"
    for size, precision in (ON_CUDA if on_cuda else ON_CPU)[: 1 if persistent else None]:
        config = config_of(size)
        bench = Bench(config, device, DTYPES[precision])
        parts = ("update", "scan", SEARCHED, "overlap") if persistent else PARTS[:-1]
        for what, graph in [(what, graph) for what in parts for graph in (False, True)]:
            if (graph and (not on_cuda or what == "add")) or (what in (SEARCHED, "overlap") and not graph):
                continue
            about = {"part": what, "size": size, "precision": precision, "backend": name, "graph": graph}
            with write.row(kind="timing", **about) as row, backend(name), searching(what == SEARCHED):
                row |= timed(part(bench, what, graph), device, WARMUP + 3 if graph else 2)
                if what in ("update", SEARCHED, "overlap"):
                    row |= {
                        "gflop": gflop(config, "update", device),
                        "parameters": bench.learner.parameter_counts()["total"],
                    }
            if graph and "error" in row:  # a failed capture leaves its generators unusable
                bench = Bench(config, device, DTYPES[precision])


def profiles(device: torch.device, name: str, write: "Rows") -> None:
    """Kernels and busy and idle time in an update of the small model in bfloat16, eager and captured."""
    on_cuda, updates = device.type == "cuda", 3
    size, precision = ("small", torch.bfloat16) if on_cuda else ("tiny", torch.float32)
    bench = Bench(config_of(size), device, precision)
    ways = [("update", True), ("update", False), ("overlap", True)] if on_cuda else [("update", False)]
    for what, graph in ways:
        with (
            write.row(kind="profile", part=what, size=size, backend=name, graph=graph) as row,
            backend(name),
        ):
            run = part(bench, what, graph)
            for _ in range(WARMUP + 3 if graph else 2):
                run()
            synchronize(device)
            # Not both: recording the host's part of thousands of launches would take longer than all else here.
            with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as found:
                for _ in range(updates):
                    run()
                synchronize(device)
            kind = torch.autograd.DeviceType.CUDA if on_cuda else torch.autograd.DeviceType.CPU
            # Without the ranges of an update's phases, which hold others.
            events = [e for e in found.events() if e.device_type == kind and not e.is_user_annotation]
            spans = [(e.name, e.time_range.start, e.time_range.end) for e in events]
            row |= occupied(spans, updates)
            if what == "overlap" and write.traces is not None:
                found.export_chrome_trace(str(write.traces / f"trace-{name}.json.gz"))
        if graph and "error" in row:  # as in `timings`
            bench = Bench(config_of(size), device, precision)


def once(device: torch.device, name: str, write: "Rows") -> None:
    """One update of the small model between cudaProfilerStart and Stop, for ncu, which repeats each launch.

    It imagines only a third of the steps, which are all alike.
    """
    size, precision = ("small", torch.bfloat16) if device.type == "cuda" else ("tiny", torch.float32)
    with write.row(kind="once", backend=name), backend(name):
        config = apply_overrides(config_of(size), {"behavior": {"horizon": 5}})
        run = part(Bench(config, device, precision, rows=0), "update", False)
        run()
        synchronize(device)
        with torch.cuda.profiler.profile() if device.type == "cuda" else contextlib.nullcontext():
            run()
            synchronize(device)


def kernels(device: torch.device, name: str, write: "Rows") -> None:
    """One update and one action at the smallest sizes, for compute-sanitizer.

    In bfloat16: float32 leaves image convolutions to cuDNN, and has no rounded states and no one-hot matrices.
    """
    config: Config = apply_overrides(config_of("tiny"), SMALL)
    with write.row(kind="kernels", backend=name), backend(name):
        # adding a row is as slow as the kernels of an update
        bench = Bench(config, device, torch.bfloat16, rows=0)
        part(bench, "update", False)()
        part(bench, "act 1", False)()
        synchronize(device)


def peaks(device: torch.device, name: str, write: "Rows") -> None:
    """The rates of a copy and of matrix products here, and the cost of a grid barrier."""
    with write.row(kind="peak", what="copy", unit="GB/s") as row:
        row["value"] = copy_gb_per_second(device)
    for dtype in (torch.bfloat16, torch.float32):
        with write.row(
            kind="peak", what=f"product {str(dtype).removeprefix('torch.')}", unit="GFLOP/s"
        ) as row:
            row["value"] = gemm_gflop_per_second(device, dtype)
    if device.type != "cuda":
        return
    most = torch.cuda.get_device_properties(device).multi_processor_count
    barriers = [(f"grid barrier, {count} programs", {"programs": count}) for count in (16, 64, 108, most)]
    barriers += [("grid barrier, 64 programs of 4 warps", {"warps": 4})]
    barriers += [("the same, asking by loads", {"warps": 4, "loads": True})]
    for what, how in barriers:
        with write.row(kind="peak", what=what, unit="µs") as row:
            from bench.barrier import barrier_us

            row["value"] = barrier_us(**how)


def choice(device: torch.device, name: str, write: "Rows") -> None:
    """What tuning would find for the most used model: which ops are right, and which are fastest together."""
    size, precision = (ON_CUDA if device.type == "cuda" else ON_CPU)[0]
    with write.row(kind="choice", size=size, precision=precision) as row:
        job = Job(IMAGE, ACTIONS, config_of(size), device, DTYPES[precision])
        budget = 0.9 * (write.until - time.monotonic())
        found = search(job, check=write.check, tell=lambda line: None, budget=budget)
        row |= {"ops": found.ops, "graph": found.graph, "report": found.report}


class Rows:
    """Appends rows to a file, each as soon as it is complete, until time is over."""

    def __init__(self, path: Path, seconds: float, traces: Path | None = None):
        self.path, self.traces, self.until = path, traces, time.monotonic() + seconds

    @contextlib.contextmanager
    def row(self, **about: Any) -> Iterator[dict[str, Any]]:
        """A row to fill; what is raised inside becomes its `error`. Raises TimeoutError if time is over."""
        self.check()
        row = dict(about)
        try:
            yield row
        except TimeoutError:  # time ran out
            raise
        except Exception as error:
            lines = str(error).strip().splitlines()
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {lines[0] if lines else ''}"
            self._write(row)
            if re.search(LASTING, str(error)):  # nothing works in this process after it
                raise
        else:
            self._write(row)

    def check(self) -> None:
        """Raises TimeoutError if time is over."""
        if time.monotonic() > self.until:
            raise TimeoutError

    def _write(self, row: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


WORK = {work.__name__: work for work in (peaks, timings, profiles, once, kernels, choice)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", choices=WORK)
    parser.add_argument("--backend", choices=BACKENDS, default="default")
    parser.add_argument("--out", type=Path, required=True, help="file to append rows to")
    parser.add_argument("--seconds", type=float, default=60, help="begin no row after this long")
    parser.add_argument("--traces", type=Path, help="folder for the timelines of profiles")
    args = parser.parse_args()
    with contextlib.suppress(TimeoutError):
        device = resolve_device("auto")
        prepare_device(device, little_work=False)
        WORK[args.work](device, args.backend, Rows(args.out, args.seconds, args.traces))


if __name__ == "__main__":
    main()
