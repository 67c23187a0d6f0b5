"""What a size, a batch, a window or a horizon costs: `python -m bench.costs` prints two tables in Markdown.

One factor is varied at a time around size small, B16 x T64, H15; acting is varied over the number of environments.
Each point is measured in a process of its own, so that its peak memory is its own: on a CPU that of the whole process
(libraries take about half a gigabyte), on CUDA what the allocator handed out. Times are medians of `--rounds` after a
warm-up, on CUDA those of CUDA graphs; a share is of the best rate that this machine reaches in a matrix product.

On two idle CPU cores the default points take 2 minutes in bfloat16 (4 on busy cores), twice as long in float32: each
point costs the start of a process (5 s), `--rounds` updates and one more. The best rate is measured once, before them.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from bench import table
from bench.agent import Bench, config_of, gflop
from bench.machine import gemm_gflop_per_second, seconds, synchronised
from hdfast.runtime import entry
from hdfast.runtime.arguments import Arguments, positive
from hdfast.runtime.device import describe_device, prepare_device, resolve_device, resolve_precision
from hdfast.runtime.errors import RunError
from hdfast.runtime.graphs import WARMUP
from hdfast.sizes import SIZES

ACTS = 50  # timed actions, each of which takes milliseconds
FACTORS = {"size": "size", "batch": "B", "length": "T", "horizon": "H", "num_envs": "environments"}


@dataclass(frozen=True)
class Point:
    """What is measured: an update, or if `num_envs` is not zero an action for each of that many environments."""

    size: str = "small"
    batch: int = 16
    length: int = 64
    horizon: int = 15
    num_envs: int = 0

    @property
    def part(self) -> str:
        return "act" if self.num_envs else "update"


def points(
    sizes: Sequence[str],
    batches: Sequence[int],
    lengths: Sequence[int],
    horizons: Sequence[int],
    envs: Sequence[int],
) -> Iterator[tuple[str, Point]]:
    """Factor and point: the centre first, then points that differ from it in one factor each."""
    centre = Point()
    yield "", centre
    for factor, values in zip(FACTORS, (sizes, batches, lengths, horizons, envs), strict=True):
        for value in values:
            if (point := replace(centre, **{factor: value})) != centre:
                yield factor, point


def dtype_of(point: Point, where: torch.device, precision: str) -> torch.dtype:
    """What a point computes in: the policy acts in float32 on a CPU."""
    if point.num_envs and where.type == "cpu":
        return torch.float32
    return resolve_precision(precision, where)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def measure(
    point: Point, device: str, precision: str, rounds: int, rates: Mapping[str, float]
) -> dict[str, Any]:
    """Seconds, peak bytes and GFLOP of a point, measured in this process.

    rates: the best GFLOP/s of the machine, by dtype.
    """
    where = resolve_device(device)
    dtype = resolve_precision(precision, where)
    config = config_of(point.size, batch=point.batch, length=point.length, horizon=point.horizon)
    prepare_device(where, config.little_work)
    bench = Bench(config, where, dtype)
    graph = where.type == "cuda"  # as a run has it there
    update = bench.graph if graph else bench.update
    run = synchronised(bench.act(point.num_envs, graph=graph) if point.num_envs else update(), where)
    for _ in range(WARMUP + 3 if graph else 1):
        run()
    times = [seconds(run) for _ in range(ACTS if point.num_envs else rounds)]
    if where.type == "cuda":
        peak = torch.cuda.max_memory_allocated(where)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    work = gflop(config, point.part, where) * (point.num_envs or 1)
    rate, dtype = work / statistics.median(times), name_of(dtype_of(point, where, precision))
    return {
        **asdict(point),
        "part": point.part,
        "seconds": statistics.median(times),
        "rounds": len(times),
        "peak_bytes": peak,
        "parameters": bench.learner.parameter_counts()["total"],
        "gflop": work,
        "gflop_per_second": rate,
        "share_of_peak": rate / rates[dtype],
        "dtype": dtype,
        "threads": torch.get_num_threads(),
    }


def measure_alone(
    point: Point, device: str, precision: str, rounds: int, rates: Mapping[str, float]
) -> dict[str, Any]:
    """`measure` in a process of its own. Raises: RunError with the last line of its stderr."""
    call = json.dumps([asdict(point), device, precision, rounds, rates])
    command = [sys.executable, "-m", "bench.costs", "--point", call]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RunError(said[-1], where=f"bench.costs {describe(point)}")
    return json.loads(done.stdout.splitlines()[-1])


def describe(point: Point) -> str:
    centre = Point()
    differing = [f.name for f in fields(point) if getattr(point, f.name) != getattr(centre, f.name)]
    return (
        ", ".join(f"{FACTORS[name]} {getattr(point, name)}" for name in differing) or "small, B16, T64, H15"
    )


def report(rows: Sequence[dict[str, Any]]) -> str:
    """Two tables in Markdown: updates, and actions."""
    head = ["update", "s", "x", "peak GB", "GFLOP", "GFLOP/s", "of peak", "M parameters"]
    cells, centre = [], rows[0]["seconds"]
    for row in rows:
        if row["part"] == "update":
            point = Point(**{f.name: row[f.name] for f in fields(Point)})
            cells.append(
                [
                    describe(point),
                    table.number(row["seconds"]),
                    f"{row['seconds'] / centre:.2f}",
                    table.number(row["peak_bytes"] / 1e9),
                    table.number(row["gflop"]),
                    table.number(row["gflop_per_second"]),
                    f"{row['share_of_peak']:.0%}",
                    table.number(row["parameters"] / 1e6),
                ]
            )
    parts = [table.markdown(head, cells)]
    acts = [row for row in rows if row["part"] == "act"]
    if acts:
        head = ["environments", "act ms", "actions/s", "peak GB", "GFLOP", "GFLOP/s", "of peak"]
        cells = [
            [
                str(row["num_envs"]),
                table.number(row["seconds"] * 1e3),
                table.number(row["num_envs"] / row["seconds"]),
                table.number(row["peak_bytes"] / 1e9),
                table.number(row["gflop"]),
                table.number(row["gflop_per_second"]),
                f"{row['share_of_peak']:.0%}",
            ]
            for row in acts
        ]
        parts.append(table.markdown(head, cells))
    return "\n\n".join(parts)


def parser() -> Arguments:
    flags = Arguments("python -m bench.costs", __doc__)
    flags.formatter_class = argparse.RawDescriptionHelpFormatter
    flags.add_argument(
        "--sizes",
        nargs="*",
        default=["tiny", "small", "medium"],
        choices=list(SIZES),
        metavar="SIZE",
        help="sizes of the model (tiny small medium)",
    )
    for name, values, what in (
        ("batches", [4, 32], "windows per update"),
        ("lengths", [16, 128], "rows per window"),
        ("horizons", [5, 30], "imagined steps"),
        ("envs", [1, 8, 64], "environments to act in"),
    ):
        about = f"{what} ({' '.join(map(str, values))})"
        flags.add_argument(f"--{name}", nargs="*", type=positive, default=values, metavar="N", help=about)
    flags.add_argument("--rounds", type=positive, default=3, help="timed updates at each point (3)")
    flags.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    flags.add_argument("--precision", default="auto", help="auto, float32 or bfloat16")
    flags.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    flags.add_argument("--point", help=argparse.SUPPRESS)
    return flags


def main(arguments: Iterable[str] | None = None) -> None:
    flags = parser().parse_args(None if arguments is None else list(arguments))
    if flags.point:
        point, *rest = json.loads(flags.point)
        print(json.dumps(measure(Point(**point), *rest)))
        return
    where = resolve_device(flags.device)
    how = (flags.device, name_of(resolve_precision(flags.precision, where)), flags.rounds)
    chosen = list(points(flags.sizes, flags.batches, flags.lengths, flags.horizons, flags.envs))
    prepare_device(where, little_work=False)
    dtypes = dict.fromkeys(dtype_of(point, where, flags.precision) for _, point in chosen)
    rates = {name_of(dtype): gemm_gflop_per_second(where, dtype) for dtype in dtypes}
    if where.type == "cuda":
        torch.cuda.empty_cache()  # the points' own processes need the memory
    rows = []
    for factor, point in chosen:
        rows.append({"factor": factor, **measure_alone(point, *how, rates)})
        print(f"{describe(point)}: {rows[-1]['seconds']:.4g} s", file=sys.stderr, flush=True)
    about = describe_device(where)
    print(f"{about['name']}, {how[1]}, {torch.get_num_threads()} threads\n")
    print(report(rows))
    if flags.json:
        flags.json.write_text(
            json.dumps({"machine": about, "torch": torch.__version__, "points": rows}, indent=1)
        )


if __name__ == "__main__":
    entry.main(main)
