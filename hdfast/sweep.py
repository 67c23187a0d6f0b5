"""Trains every task of a suite with several seeds, each run in a process of its own, and prints the suite's table.

Flags after `--` are passed on to `hdfast.train`. With --vary, every combination of values has a folder of its own below
the logdir, and the table shows them side by side. A run's output goes to train.log in its directory. The same command
resumes all unfinished runs. Ctrl-C, or killing the sweep, stops all runs, each with a checkpoint.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from hdfast import config, config_file, envs, init_from, report, results, suites, variants
from hdfast.agent.custom import with_options
from hdfast.flags import field_names
from hdfast.jobs import Job, LocalPool, RayPool, ending, run
from hdfast.runtime import entry
from hdfast.runtime.arguments import Arguments, natural, positive
from hdfast.runtime.console import Console
from hdfast.runtime.device import resolve_device
from hdfast.runtime.errors import ConfigError, RunError
from hdfast.runtime.record import path_of
from hdfast.runtime.signals import StopRequest

OWN_FLAGS = ("--suite", "--task", "--seed", "--seeds", "--dry-run", "--help", "-h")


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
            with_options(one)
            if one.device != "auto":  # which needs no look, and so no GPU in this process
                resolve_device(one.device)
    at_a_time = min(args.jobs, len(jobs))  # cores are shared among those that run
    pool = RayPool(args.ray) if args.ray else LocalPool(at_a_time, args.devices, threads=threads)
    say = functools.partial(Console(highlight=False).print, markup=False, soft_wrap=True)
    with StopRequest() as stop:
        failed = run(pool, jobs, at_a_time, stop, say)
    found = {str(folder): results.collect(folder, suite, tasks) for folder in folders}
    if len(found) > 1:
        report.compare(suite, found)
    else:
        report.show(suite, *found.values())
    if failed:
        logs = {job.name: job.log for job in jobs}
        details = [f"{name}: {ending(code)}: {_last_line(logs[name])}" for name, code in failed.items()]
        raise RunError(f"{len(failed)} of {len(jobs)} runs failed", details=details)


if __name__ == "__main__":
    entry.main(main)
