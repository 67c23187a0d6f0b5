"""An update of sheeprl's DreamerV3 and one of ours, in turns on this machine, in the same size and precision.

The model is that of Atari 100k (small; 17.9 million parameters in both), with images of 64 x 64 x 3 and six actions.
sheeprl is installed by pip, as pip is configured here, into an environment of its own, `.venv-peers/`, beside the
torch that runs ours. Both run in a process of their own and get the same number of threads. Ours is the whole
update, with sampling and the slow critic, and learns three harmony scalars as well; sheeprl's is its function
`train`, as it is configured by default, which has neither. GFLOP are those of matrix products and convolutions:
sheeprl's as counted while it runs, ours those of the definition.

On two idle CPU cores a precision takes about a minute, the installation another one and 1.5 GB of disk.
"""

import argparse
import json
import statistics
import subprocess
import sys
import venv
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from bench import table
from bench.peers.workers import Worker, take_turns
from hdfast.runtime import errors
from hdfast.runtime.arguments import Arguments, positive
from hdfast.runtime.device import PRECISIONS, describe_device, resolve_device
from hdfast.runtime.errors import MissingLibraryError

ROOT = Path(__file__).parents[2]
VENV = ROOT / ".venv-peers" / "sheeprl"
PACKAGE = "sheeprl==0.8.4"


def said(done: subprocess.CompletedProcess[str]) -> str:
    """The last line of what a command said that names an error, or its last line."""
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return next(
        (line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no word"
    )


def interpreter(folder: Path, package: str) -> Path:
    """The Python that has `package`; installs it where it is not there yet.

    Raises: MissingLibraryError with what pip said, or that an environment cannot be made.
    """
    python = folder / "bin" / "python"
    name, _, version = package.partition("==")
    check = [str(python), "-c", f"import importlib.metadata as m; print(m.version({name!r}))"]
    if python.exists():
        done = subprocess.run(check, capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip() == version:
            return python
    print(f"installing {package} into {folder.name}", file=sys.stderr, flush=True)
    hint = "it needs pip, an index that has it, and Python 3.10 to 3.13"
    try:
        venv.EnvBuilder(clear=True, with_pip=True).create(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        raise MissingLibraryError(f"no environment for it: {error}", where=package, hint=hint) from error
    same_torch = f"torch=={torch.__version__.partition('+')[0]}"
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-input", package, same_torch]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise MissingLibraryError(f"cannot be installed: {said(done)}", where=package, hint=hint)
    return python


def report(
    names: Sequence[str], abouts: Sequence[Mapping[str, Any]], times: Sequence[Sequence[float]]
) -> str:
    """A Markdown table of the programs and the ratio of the medians of the first and the last."""
    medians = [statistics.median(taken) for taken in times]
    head = ["", "version", "median s", "min s", "max s", "GFLOP", "GFLOP/s", "parameters", "threads", "torch"]
    rows = []
    for name, about, taken, median in zip(names, abouts, times, medians, strict=True):
        work = about["gflop"]
        rows.append(
            [
                name,
                about["version"],
                *(table.number(value) for value in (median, min(taken), max(taken))),
                table.number(work),
                table.number(work and work / median),
                f"{about['parameters']:,}",
                str(about["threads"]),
                about["torch"],
            ]
        )
    # Both of a round met the same machine.
    ratios = sorted(theirs / ours for theirs, ours in zip(times[0], times[-1], strict=True))
    ratio = f"{names[0]} takes {medians[0] / medians[-1]:.2f} x as long as {names[-1]}"
    return f"{table.markdown(head, rows)}\n\n{ratio} ({ratios[0]:.2f} to {ratios[-1]:.2f} in {len(ratios)} rounds)"


def compare(settings: Mapping[str, Any], python: Path, rounds: int) -> tuple[str, dict[str, Any]]:
    """The report of one precision, and its numbers. Raises: RunError if one of the processes ends."""
    commands = {
        "sheeprl": [str(python), str(ROOT / "bench" / "peers" / "sheeprl_update.py")],
        "hdfast": [sys.executable, "-m", "bench.peers.hdfast_update"],
    }
    with ExitStack() as stack:
        workers = [
            stack.enter_context(Worker(name, command, settings, cwd=ROOT))
            for name, command in commands.items()
        ]
        times = take_turns(workers, rounds, warmups=5 if settings["graph"] else 1)
    abouts = [worker.about for worker in workers]
    numbers = {
        name: {**about, "seconds": taken} for name, about, taken in zip(commands, abouts, times, strict=True)
    }
    return report(list(commands), abouts, times), {**settings, **numbers}


def parser() -> Arguments:
    flags = Arguments("python -m bench.peers", __doc__)
    flags.formatter_class = argparse.RawDescriptionHelpFormatter
    flags.add_argument("--rounds", type=positive, default=5, help="updates of each that are timed (5)")
    flags.add_argument(
        "--precision",
        nargs="+",
        choices=list(PRECISIONS),
        default=list(PRECISIONS),
        help="one or both (both)",
    )
    flags.add_argument("--batch", type=positive, default=16, help="windows of an update (16)")
    flags.add_argument("--length", type=positive, default=64, help="rows of a window (64)")
    flags.add_argument("--horizon", type=positive, default=15, help="imagined steps (15)")
    flags.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    flags.add_argument(
        "--compile",
        action="store_true",
        help="sheeprl with its own option for torch.compile, which takes minutes",
    )
    flags.add_argument("--graph", action="store_true", help="ours as one CUDA graph")
    flags.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    return flags


def main(arguments: Iterable[str] | None = None) -> None:
    flags = parser().parse_args(None if arguments is None else list(arguments))
    device = resolve_device(flags.device)
    settings = {name: getattr(flags, name) for name in ("batch", "length", "horizon", "compile", "graph")}
    settings |= {"device": device.type, "threads": torch.get_num_threads()}
    python = interpreter(VENV, PACKAGE)
    about, results = describe_device(device), []
    for precision in flags.precision:
        text, numbers = compare({**settings, "precision": precision}, python, flags.rounds)
        results.append(numbers)
        print(
            f"{about['name']}, {precision}, small, B{flags.batch} x T{flags.length}, H{flags.horizon}\n\n{text}\n"
        )
    if flags.json:
        flags.json.write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    errors.main(main)
