"""Everything a GPU can tell about hdfast, in one run, as one record: `python bench/gpu_record.py`.

Rates of the machine and of the grid barrier; update, scan, imagination, acting and replay on every backend, eager and
as CUDA graphs; the tests marked `gpu`; every op beside eager PyTorch; what torch.profiler, ncu and compute-sanitizer
see; what a run finds for itself; sheeprl's DreamerV3 if it is installed; a short training.

In the 460 s of a whole record there is no time to look for races, for sheeprl, and for training; `--seconds 240 --steps
'racecheck|peers|training|game' --out FOLDER` does that, into another folder because a record is written whole.

Writes `record.json` after every step and `record.md` at the end to `bench/results/<device>/`, beside all output of its
commands (`log.txt`) and timelines for a browser's tracing page (`trace-*.json.gz`). Needs no network. Every step has a
time limit and processes of its own; a step that fails, or lacks its tool or package, is recorded with the reason, and
what it had found by then is kept. It also runs to the end on a CPU.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Steps that are left out where time is short, the first of these first, and the share of it that may be promised.
LATE, TOLERATED = ("game", "training", "peers", "racecheck"), 1.1
if __name__ == "__main__":  # run by its path from any folder, whether or not hdfast is installed
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from bench import gpu_tools  # noqa: E402
from bench.gpu_report import markdown  # noqa: E402
from bench.gpu_steps import (  # noqa: E402
    Record,
    benchmarks,
    heed_interrupts,
    peers,
    tests,
    training,
    watched,
    work,
)


def machine() -> dict[str, Any]:
    """The machine and the software that the record is made with."""
    import torch

    from hdfast.runtime.device import describe_device, resolve_device

    versions = {"torch": torch.__version__}
    if importlib.util.find_spec("triton"):
        import triton

        versions["triton"] = triton.__version__
    driver = first_line(
        gpu_tools.find_tool("nvidia-smi"), "--query-gpu=driver_version", "--format=csv,noheader"
    )
    return {
        **describe_device(resolve_device("auto")),
        **versions,
        "python": sys.version.split()[0],
        "compiler": compiler(),
        "driver": driver,
        "commit": first_line(shutil.which("git"), "rev-parse", "HEAD"),
    }


def first_line(program: str | None, *arguments: str) -> str | None:
    """The first line that a program prints; None if it fails or there is no such program."""
    if program is None:
        return None
    done = subprocess.run([program, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return next(iter(done.stdout.strip().splitlines()), None) if done.returncode == 0 else None


def compiler() -> str | None:
    """The C compiler that Triton builds its launchers with; "no <path>" if Python's headers are missing."""
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return f"no {header}" if found and not header.exists() else found


def keep_compiled_kernels() -> None:
    """Makes all steps share compiled kernels, even if the home folder cannot be written to."""
    if "TRITON_CACHE_DIR" in os.environ or "TRITON_HOME" in os.environ:
        return
    try:
        (Path.home() / ".triton" / "cache").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=Path.home() / ".triton" / "cache"):
            pass
    except (OSError, RuntimeError):  # RuntimeError: no home folder is known
        os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton-")


def left_out(needed: Mapping[str, float], seconds: float) -> list[str]:
    """The steps for which there is no time, given what each needs: half a step says less than another one whole."""
    left = [name for name in LATE if needed.get(name)]
    out: list[str] = []
    while left and sum(needed.values()) - sum(needed[name] for name in out) > TOLERATED * seconds:
        out.append(left.pop(0))
    return out


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of all records")
    parser.add_argument(
        "--select", default="not compile", help="pytest -k expression for the benchmarks of ops"
    )
    parser.add_argument("--seconds", type=float, default=460, help="time limit of the whole record")
    parser.add_argument("--steps", default="", help="regular expression: only steps whose name it matches")
    args = parser.parse_args()
    began = time.monotonic()
    heed_interrupts()
    keep_compiled_kernels()
    about = machine()
    on_gpu = about["device"].startswith("cuda")
    if not on_gpu:
        sys.stderr.write("no GPU here: recording this CPU\n")
    folder = args.out / re.sub(r"[^a-z0-9]+", "-", str(about["name"]).lower()).strip("-")
    record = Record(folder, began + args.seconds, on_gpu)
    record.found["machine"] = about
    gpu = 1 if on_gpu else 0  # on a CPU, steps for a GPU alone need no time
    metrics = ",".join(gpu_tools.NCU_METRICS.values())
    # Our own kernels, at the clock of a run, not at the base clock; without the 640 launches of the scan, which
    # torch.profiler sees. In base units, because a column has one unit for all its lines.
    ncu = ["--csv", "--page", "raw", "--print-units", "base", "--metrics", metrics, "--clock-control", "none"]
    ncu += ["--profile-from-start", "off", "--kernel-name", f"regex:{gpu_tools.NCU_KERNELS}"]
    # Without API errors: torch and Triton ask the driver for what it may not have, and each "no" would count as one.
    sanitizer = ["--report-api-errors", "no", "--print-limit", "200", "--tool"]
    # What runs by default comes first, with time to compile what no test has compiled.
    backends = {"triton-persistent": 38, "triton": 28, "reference": 22} if on_gpu else {"default": 22}
    profiled = {"triton-persistent": 19, "reference": 14} if on_gpu else {"default": 14}
    # Name, seconds that it takes on an H200 whose host is slow, what to do. The tests, which run side by side, compile
    # kernels for all that follow.
    steps: list[tuple[str, float, Callable[[float], str | None]]] = [
        ("rates", 10, work(record, "peaks")),
        ("tests", 92, tests(record)),
        *((f"timings {name}", weight, work(record, "timings", name)) for name, weight in backends.items()),
        *((f"profile {name}", weight, work(record, "profiles", name)) for name, weight in profiled.items()),
        *([("choice", 66, work(record, "choice"))] if on_gpu else []),
        ("ops", 95, benchmarks(record, args.select)),
        ("ncu", 48 * gpu, watched(record, "ncu", "ncu", ncu, "once")),
        # First without the sanitizer, so that nothing has to be compiled under it.
        *([("kernels", 20, work(record, "kernels", "triton"))] if on_gpu else []),
        (
            "memcheck",
            40 * gpu,
            watched(record, "compute-sanitizer", "memcheck", [*sanitizer, "memcheck"], "kernels"),
        ),
        (
            "racecheck",
            40 * gpu,
            watched(record, "compute-sanitizer", "racecheck", [*sanitizer, "racecheck"], "kernels"),
        ),
        ("peers", 40 * gpu, peers(record)),
        # The suite that learns soonest, and a game of Atari 100k for the rest of the time.
        ("training", 60, training(record, "training", "--suite", "demo")),
        ("game", 60, training(record, "game", "--suite", "atari100k", "--task", "Boxing")),
    ]
    steps = [step for step in steps if re.search(args.steps, step[0])]
    late = left_out({name: needed for name, needed, _ in steps}, args.seconds)
    for name in late:
        reason = f"{args.seconds:.0f} s are too few for all; --steps '^{name}$' --out FOLDER does it alone"
        record.found["steps"][name] = {"status": "skipped", "seconds": 0.0, "reason": reason}
    steps = [step for step in steps if step[0] not in late]
    for at, (name, weight, do) in enumerate(steps):
        record.step(name, weight, sum(step[1] for step in steps[at:]), do)
    found = record.found
    found["seconds"] = round(time.monotonic() - began, 1)
    record.write()
    (folder / "record.md").write_text(markdown(found))
    print(f"wrote {folder}/record.json and record.md after {found['seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
