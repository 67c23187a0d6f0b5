"""Finds the kernels, and whether to use CUDA graphs, that are correct and fastest for a run on this machine.

The result is remembered and used by later runs. On CUDA the first run does this by itself, on the CPU only this command
does. All flags but --again are those of `hdfast.train`, and select the run whose update is tried.
"""

import os
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from hdfast import config as configs
from hdfast.agent.learner import check_backends
from hdfast.config import Config
from hdfast.runtime import entry
from hdfast.runtime.arguments import Arguments
from hdfast.runtime.console import Console
from hdfast.runtime.device import describe_device, ready_device, resolve_precision
from hdfast.runtime.errors import ConfigError, Interrupted, RunError
from hdfast.runtime.signals import StopRequest
from hdfast.streams import make_envs
from hdfast.tuning.choice import Choice, Job, path_of, remembered
from hdfast.tuning.search import (
    CAPTURING,
    DEFINITION,
    EAGER_TIMES,
    FINE,
    INSTEAD,
    OVERLAPPING,
    TIMES,
    TOGETHER,
    TuningError,
)
from hdfast.tuning.settle import find, summary

PATIENCE = 6.0  # times as long as a run waits: on a CPU an update may take seconds, and nothing is held up
TIMING = (TIMES, EAGER_TIMES, FINE, INSTEAD)


def tune(config: Config, console: Console, *, again: bool) -> Choice:
    """What is remembered for the first task of a run; if nothing is, or `again`, what a search finds, step by step.

    Raises: HdfastError, as a run of this config would; RunError if not even plain PyTorch can be tried.
    """
    configs.check_no_dry_run(config)
    device = ready_device(config.device, config.little_work, config.train.graph)
    check_backends(device)
    forced = os.environ.get("HDFAST_BACKEND")
    if forced and device.type == "cpu":  # on CUDA there are graphs to try
        what = f"HDFAST_BACKEND={forced} decides what ops run on, so that nothing is left to find"
        raise ConfigError(what, hint="unset it to find the fastest")
    dtype = resolve_precision(config.precision, device)
    task = config.tasks[0]
    with make_envs(config, task, num_envs=config.env.num_envs, stream="tune") as env:
        seen = dict(env.obs_specs), env.actions
    job = Job(*seen, config, device, dtype)
    shape = f"{config.size}, B{config.replay.batch} T{config.replay.length} H{config.behavior.horizon}"
    precision = str(dtype).removeprefix("torch.")

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    begun: set[str] = set()

    def tell(line: Mapping[str, Any]) -> None:
        if line.get("begin") in TIMING:
            if line["begin"] not in begun:
                say(f"  {line['begin']} ...")
            begun.add(line["begin"])
        elif "end" in line and not (line["end"] in TIMING and line["right"]):
            say(f"  {line['end']}: {'right' if line['right'] else 'no: ' + str(line.get('why'))}")
        for name, told in line.get("tried", {}).items():
            say(f"  {name}: {'right' if told['right'] else 'no: ' + told['why']}")

    say(f"{describe_device(device)['name']}, {task.name}, {shape}, {precision}")
    if not again and remembered(job.key) is not None:
        say(f"  as found before, from {path_of(job.key)}; --again tries it again")
    with StopRequest() as stop:
        try:
            return find(job, check=stop.check, waits=say, tell=tell, again=again, patience=PATIENCE)
        except Interrupted as error:
            kept = "what was remembered stays" if remembered(job.key) is not None else "nothing is remembered"
            raise Interrupted(*error.args, hint=kept) from None
        except TuningError as error:
            raise RunError(f"not even plain PyTorch could be tried: {error}") from error


def table(choice: Choice) -> Table:
    """A line for every op that was tried: whether it is right, what it gains, what it runs on."""
    rows = Table("op", "right", "time of an update without it", "runs on", box=box.SIMPLE_HEAD)
    without = choice.report.get(FINE, {}).get("without", {})
    for op, line in choice.report.items():
        if op in (DEFINITION, TOGETHER, CAPTURING, OVERLAPPING, *TIMING):
            continue
        worth = f"{without[op]:.2f}" if op in without else ""
        runs = "as by default" if choice.ops is None else choice.ops.get(op, "reference")
        rows.add_row(op, "yes" if line["right"] else "no", worth, runs)
    for name, line in choice.report.get(INSTEAD, {}).get("tried", {}).items():
        worth = f"{line['without']:.2f}" if "without" in line else ""
        rows.add_row(name, "yes" if line["right"] else "no", worth, "")
    if graph := choice.report.get(CAPTURING):
        right = "yes" if graph["right"] else "no"
        rows.add_row("update and act", right, "", "CUDA graph" if choice.graph else "eager")
    if overlap := choice.report.get(OVERLAPPING):
        apart, together = overlap.get("ms", {}).values() or (0.0, 0.0)
        worth = f"{apart / together:.2f}" if together else ""
        runs = "beside each other" if choice.overlap else "one after the other"
        rows.add_row("halves of two updates", "yes" if overlap["right"] else "no", worth, runs)
    return rows


def main() -> None:
    parser = Arguments("python -m hdfast.tune", __doc__)
    parser.usage = "%(prog)s [options] [flags of hdfast.train]"
    parser.add_argument("--again", action="store_true", help="search again, even if a result is remembered")
    args, flags = parser.parse_known_args()
    config = configs.parse(flags, "python -m hdfast.tune", parser.own())
    console = Console()
    choice = tune(config, console, again=args.again)
    console.print(table(choice), width=None if console.is_terminal else 110)
    console.print(summary(choice), markup=False, soft_wrap=True)


if __name__ == "__main__":
    entry.main(main)
