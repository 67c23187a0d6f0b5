"""An update of other people's programs and one of ours, in turns on this machine.

The model is that of Atari 100k (small; 17.9 million parameters in ours), with images of 64 x 64 x 3 and six actions.
What a peer needs is installed by pip, as pip is configured here, into an environment of its own in `.venv-peers/`, with
the version of torch that runs ours. A peer that is not a package is imported from a checkout that you have cloned. Each
runs in a process of its own with the same number of threads. Ours is the whole update, with sampling and the slow
critic; what a peer's own training function leaves out of that is said in its worker, `bench/peers/*_update.py`. GFLOP
are those of matrix products and convolutions: of PyTorch peers counted while they run, of ours those of the definition.

On two CPU cores five rounds of three PyTorch peers take three minutes per precision, three rounds of one JAX peer two
to three; an installation takes half a minute and 0.7 to 1.5 GB of disk, a process 1 to 5 GB of memory.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from bench import table
from bench.peers.known import PEERS
from bench.peers.places import Program, program
from bench.peers.workers import Worker, take_turns
from hdfast import __version__
from hdfast.runtime import entry
from hdfast.runtime.arguments import Arguments, positive
from hdfast.runtime.device import PRECISIONS, describe_device, resolve_device

ROOT = Path(__file__).parents[2]
PLACE = ROOT / ".venv-peers"
BY_NAME = {peer.name: peer for peer in PEERS}
OURS = Program("hdfast", [sys.executable, "-m", "bench.peers.hdfast_update"], __version__)


def report(
    names: Sequence[str], abouts: Sequence[Mapping[str, Any]], times: Sequence[Sequence[float]]
) -> str:
    """A Markdown table of the programs, each beside the last: ratio of medians and range of the rounds' ratios."""
    head = ["", "version", "precision", "median s", "min s", "max s", f"x {names[-1]}", "in rounds"]
    head += ["GFLOP", "GFLOP/s", "parameters", "threads", "on"]
    ours, rows = statistics.median(times[-1]), []
    for name, about, taken in zip(names, abouts, times, strict=True):
        median, work = statistics.median(taken), about["gflop"]
        # All updates of a round met the machine in the same state.
        ratios = [one / other for one, other in zip(taken, times[-1], strict=True)]
        rows.append(
            [
                name,
                about["version"],
                about["precision"],
                *(table.number(value) for value in (median, min(taken), max(taken))),
                f"{median / ours:.2f}",
                f"{min(ratios):.2f} to {max(ratios):.2f}",
                table.number(work),
                table.number(work and work / median),
                f"{about['parameters']:,}",
                str(about["threads"]),
                about["on"],
            ]
        )
    return table.markdown(head, rows)


def compare(
    settings: Mapping[str, Any], programs: Sequence[Program], rounds: int
) -> tuple[str, dict[str, Any]]:
    """The report of one precision, and its numbers. Raises: RunError if one of the processes ends early."""
    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                Worker(one.name, one.command, {**settings, **one.options}, cwd=ROOT, env=one.variables)
            )
            for one in programs
        ]
        times = take_turns(workers, rounds, warmups=5 if settings["graph"] or settings["compile"] else 1)
    names = [one.name for one in programs]
    abouts = [{"version": one.version, **worker.about} for one, worker in zip(programs, workers, strict=True)]
    numbers = {
        name: {**about, "seconds": taken} for name, about, taken in zip(names, abouts, times, strict=True)
    }
    return report(names, abouts, times), {**settings, **numbers}


def parser() -> Arguments:
    lines = [f"  {peer.name:<19} {peer.version}, {peer.about}" for peer in PEERS]
    clones = {peer.checkout: None for peer in PEERS if peer.checkout}
    lines += ["", "checkouts:", *(f"  {one.name:<19} {one.url} at {one.commit}" for one in clones)]
    flags = Arguments("python -m bench.peers", __doc__)
    flags.formatter_class = argparse.RawDescriptionHelpFormatter
    flags.epilog = "\n".join(["peers:", *lines])
    flags.add_argument(
        "--peer",
        nargs="+",
        choices=list(BY_NAME),
        default=["sheeprl"],
        metavar="NAME",
        help="one or more of those below (sheeprl)",
    )
    flags.add_argument(
        "--checkouts",
        type=Path,
        default=PLACE / "checkouts",
        metavar="DIR",
        help="folder of the clones of peers that are not packages (.venv-peers/checkouts)",
    )
    flags.add_argument("--rounds", type=positive, default=5, help="timed updates of each (5)")
    flags.add_argument(
        "--precision",
        nargs="+",
        choices=["default", *PRECISIONS],
        default=["default", *PRECISIONS],
        help="default: each program's own; else all that support it in that one (all three)",
    )
    flags.add_argument("--batch", type=positive, default=16, help="windows per update (16)")
    flags.add_argument("--length", type=positive, default=64, help="rows per window (64)")
    flags.add_argument("--horizon", type=positive, default=15, help="imagined steps (15)")
    flags.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    flags.add_argument(
        "--compile",
        action="store_true",
        help="sheeprl and r2dreamer with their own option for torch.compile; on two CPU cores "
        "sheeprl takes more than three minutes to compile",
    )
    flags.add_argument("--graph", action="store_true", help="ours as one CUDA graph")
    flags.add_argument(
        "--here",
        action="store_true",
        help="run peers on this Python with the packages it has, where nothing can be installed",
    )
    flags.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    return flags


def main(arguments: Iterable[str] | None = None) -> None:
    flags = parser().parse_args(None if arguments is None else list(arguments))
    device = resolve_device(flags.device)
    settings = {name: getattr(flags, name) for name in ("batch", "length", "horizon", "compile", "graph")}
    settings |= {"device": device.type, "threads": torch.get_num_threads()}
    peers = [BY_NAME[name] for name in dict.fromkeys(flags.peer)]
    programs = {
        peer.name: program(peer, PLACE, flags.checkouts, device.type, here=flags.here) for peer in peers
    }
    about, results = describe_device(device), []
    for precision in flags.precision:
        chosen = [peer for peer in peers if precision in ("default", *peer.precisions)]
        if without := [peer.name for peer in peers if peer not in chosen]:
            print(f"no {precision} in {', '.join(without)}\n")
        if not chosen:
            continue
        text, numbers = compare(
            {**settings, "precision": precision},
            [*(programs[peer.name] for peer in chosen), OURS],
            flags.rounds,
        )
        results.append(numbers)
        print(
            f"{about['name']}, {precision}, small, B{flags.batch} x T{flags.length}, H{flags.horizon}\n\n{text}\n"
        )
    if flags.json:
        flags.json.write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    entry.main(main)
