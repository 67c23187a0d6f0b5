"""Prints the tables of the suites that have runs, from those that are finished, beside the published scores.

Or writes the learning curves of all runs, finished or not (--curves).
"""

import csv
import io
import json
import math
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from hdfast import suites
from hdfast.config import Config
from hdfast.loop import RESUMABLE_CHANGES
from hdfast.runtime import errors, rundir
from hdfast.runtime.arguments import Arguments, given_path
from hdfast.runtime.console import Console
from hdfast.runtime.errors import ConfigError, RunError, disk_errors
from hdfast.runtime.files import plain, replacing

CURVES = (  # the columns of --curves
    "suite",
    "task",
    "seed",
    "agent_steps",
    "frames",
    "seconds",
    "score",
    "standard_error",
    "success",
)


@dataclass(frozen=True)
class TaskScores:
    """The finished runs of one task: seed -> final score, and share of episodes solved where the task says so."""

    task: suites.Task
    scores: Mapping[int, float]
    success: Mapping[int, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean score over seeds; NaN if no run is finished."""
        return _mean(self.scores.values())


def collect(
    logdir: Path, suite: suites.Suite, tasks: Sequence[suites.Task] | None = None
) -> list[TaskScores]:
    """Reads the final evaluation of every finished run of `tasks` below `logdir`.

    By default these are all tasks of the suite, and what else was trained of it. A run that cannot be read is warned
    of, and left out. A task whose seeds differ in what they compute is warned of.
    """
    found = []
    for task in tasks if tasks is not None else (*suite.tasks, *_others(logdir, suite)):
        scores, success, configs, precisions = {}, {}, [], set()
        for seed, path in _runs(logdir, suite, task):
            try:
                record = rundir.read(path)
            except RunError as error:  # the others' results are there all the same
                errors.warn(str(error))
                continue
            if (summary := record.summary) is not None:
                configs.append(rundir.filled(record.config, Config().to_dict()))
                scores[seed] = float(summary["score"])
                if "success" in summary:
                    success[seed] = float(summary["success"])
                if "precision" in summary:
                    precisions.add(str(summary["precision"]))
        computed = [f"precision ({' and '.join(sorted(precisions))})"] if len(precisions) > 1 else []
        if fields := [*_differing(configs), *computed]:
            errors.warn(f"{suite.name} {task.name}: its seeds differ in {', '.join(fields)}")
        found.append(TaskScores(task, scores, success))
    return found


def curves(logdir: Path, suite: suites.Suite) -> list[dict[str, Any]]:
    """Every evaluation of every run of `suite` below `logdir`, finished or not: the columns of CURVES that are known.

    A last line that was torn is left out; what else is damaged is warned of, and left out.
    """
    found = []
    for task in (*suite.tasks, *_others(logdir, suite)):
        for seed, path in _runs(logdir, suite, task):
            try:
                lines = _evaluations(path / "scores.jsonl")
            except RunError as error:
                errors.warn(str(error))
                continue
            run = {"suite": suite.name, "task": task.name, "seed": seed}
            found += [{**{name: line[name] for name in CURVES if name in line}, **run} for line in lines]
    return found


def write_curves(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows of `curves` as CSV, by suite, task, seed and agent steps, atomically.

    Raises: DiskFullError, RunError.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, CURVES, lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: [row[name] for name in CURVES[:4]]))
    with disk_errors(path, "write the curves"):
        target = Path(os.path.realpath(path))  # a link stays one
        if target.exists() and not target.is_file():
            raise RunError("cannot write the curves: it is there, and not a file", where=path)
        with replacing(target) as file:
            file.write(text.getvalue().encode())


def with_runs(logdir: Path) -> list[suites.Suite]:
    """The suites that have runs below `logdir`, finished or not."""
    return [s for s in suites.SUITES.values() if any((logdir / s.name).glob("*/seed*/config.json"))]


def _runs(logdir: Path, suite: suites.Suite, task: suites.Task) -> Iterator[tuple[int, Path]]:
    """Seed and directory of the runs of a task, finished or not."""
    for path in sorted((logdir / suite.name / task.folder).glob("seed*")):
        seed = path.name.removeprefix("seed")
        if seed.isdecimal() and (path / "config.json").exists():
            yield int(seed), path


def _differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fields in which configurations differ, of those that decide what is computed; not the seed."""
    ignore = {"seed", *RESUMABLE_CHANGES}
    lines = [line for other in configs[1:] for line in rundir.difference(configs[0], other, ignore)]
    return list(dict.fromkeys(line.partition(":")[0] for line in lines))


def _evaluations(path: Path) -> list[dict[str, Any]]:
    """The evaluations in a scores.jsonl; none if there is no file. Raises: RunError when it cannot be read."""
    found, damaged = [], []
    with disk_errors(path, "read the scores"):
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for line in lines:
        if not line.endswith(b"\n"):
            continue  # it is being written, or its writer was killed
        try:
            entry = json.loads(line)
            if entry["kind"] != "evaluation":
                continue
            numbers = [entry[name] for name in CURVES[4:] if name in entry]
            if type(entry["agent_steps"]) is not int or not all(map(_is_number, [entry["score"], *numbers])):
                raise ValueError(line)
        except (ValueError, LookupError, TypeError):
            damaged.append(line)
        else:
            found.append(entry)
    if damaged:
        errors.warn(f"{path}: {_count(damaged, 'damaged line')} left out")
    return found


def _is_number(value: object) -> bool:
    return type(value) in (int, float) or value in ("NaN", "Infinity", "-Infinity")


def _others(logdir: Path, suite: suites.Suite) -> list[suites.Task]:
    """Tasks that were trained and do not stand in the suite's list."""
    listed, tasks = {task.folder for task in suite.tasks}, {}
    for path in sorted((logdir / suite.name).glob("*/seed*/config.json")):
        if path.parent.parent.name in listed:
            continue
        try:
            name = rundir.read(path.parent).config.get("task")
            if not isinstance(name, str):
                raise rundir.damaged(path, f"config.task is {name!r:.50}, right is a str")
        except RunError as error:
            errors.warn(str(error))
            continue
        tasks[name] = suite.task(name)
    return list(tasks.values())


def table(suite: suites.Suite, rows: Sequence[TaskScores]) -> Table:
    """Score, success, human-normalised score and published ones per task, then mean, median and IQM of the normalised.

    The aggregates of the published methods are over the tasks that are finished here, so that columns compare.
    """
    human = any(row.task.human is not None for row in rows)
    solved = any(row.success for row in rows)
    view = Table(box=box.SIMPLE_HEAD)
    view.add_column("task")
    optional = [*(["success"] if solved else []), *(["human-norm."] if human else [])]
    for name in ("seeds", "score", *optional, *suite.methods):
        view.add_column(name, justify="right")
    for row in rows:
        cells = [row.task.name, str(len(row.scores)), _number(row.mean)]
        if solved:
            cells.append(f"{_mean(row.success.values()):.0%}" if row.success else "-")
        if human:
            known = row.task.human is not None and row.scores
            cells.append(f"{suites.human_normalized(row.task, row.mean):.3f}" if known else "-")
        for method in suite.methods:
            seeds = row.task.published.get(method)
            cells.append(_number(sum(seeds) / len(seeds)) if seeds else "-")
        view.add_row(*cells)
    done = {row.task.name: list(row.scores.values()) for row in rows if row.scores}
    ours = suite.aggregate(done) if done else None
    if ours is None:
        return view
    published = [
        suite.aggregate({k: v for k, v in suite.published(method).items() if k in done})
        for method in suite.methods
    ]
    view.add_section()
    for name in ("mean", "median", "iqm"):
        others = [f"{getattr(p, name):.3f}" if p else "-" for p in published]
        view.add_row(f"human-norm. {name}", str(len(done)), "", f"{getattr(ours, name):.3f}", *others)
    return view


def as_dict(suite: suites.Suite, rows: Sequence[TaskScores]) -> dict[str, Any]:
    """The same for JSON: per task the scores and success rates by seed, and the aggregates."""
    done = {row.task.name: list(row.scores.values()) for row in rows if row.scores}
    aggregate = suite.aggregate(done) if done else None
    success = {row.task.name: {str(k): v for k, v in row.success.items()} for row in rows if row.success}
    return {
        "suite": suite.name,
        "tasks": {row.task.name: {str(k): v for k, v in row.scores.items()} for row in rows},
        "success": success or None,
        "human_normalized": None if aggregate is None else vars(aggregate),
    }


def show(suite: suites.Suite, rows: Sequence[TaskScores]) -> None:
    """Prints the table; as wide as its content when the output is not a terminal."""
    console = Console()
    console.print(f"{suite.name}: score of the final evaluation, mean over seeds", highlight=False)
    console.print(table(suite, rows), width=None if console.is_terminal else 120)


def main() -> None:
    parser = Arguments("python -m hdfast.report", __doc__)
    parser.add_argument("--suite", help="which suite, all that have runs if left out")
    parser.add_argument("--logdir", type=given_path, default=Path("runs"), help="folder that holds all runs")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--json", action="store_true", help="print JSON instead: one suite, or a list of them"
    )
    instead.add_argument(
        "--curves",
        type=given_path,
        metavar="FILE",
        help="write every evaluation of every run to it as CSV instead",
    )
    args = parser.parse_args()
    chosen = [suites.get(args.suite)] if args.suite is not None else []
    with disk_errors(args.logdir, "read the folder"):
        if not args.logdir.is_dir():
            raise ConfigError(f"there is no folder {args.logdir}", where="--logdir")
    if not (chosen := chosen or with_runs(args.logdir)):
        hint = "a run is <logdir>/<suite>/<task>/seed<k>, of python -m hdfast.train --logdir"
        raise RunError("there are no runs in this folder", where=args.logdir, hint=hint)
    if args.curves is not None:
        rows = [row for suite in chosen for row in curves(args.logdir, suite)]
        if not rows:
            of = "" if args.suite is None else f" of {args.suite}"
            hint = "a run evaluates every --eval.every agent steps, and at its end"
            raise RunError(f"there are no evaluations{of} in this folder", where=args.logdir, hint=hint)
        write_curves(args.curves, rows)
        runs = {(row["suite"], row["task"], row["seed"]) for row in rows}
        sys.stdout.write(f"{_count(rows, 'evaluation')} of {_count(runs, 'run')}: {args.curves}\n")
        return
    found = [(suite, collect(args.logdir, suite)) for suite in chosen]
    if args.json:
        about = [as_dict(suite, rows) for suite, rows in found]
        sys.stdout.write(json.dumps(plain(about if args.suite is None else about[0]), indent=2) + "\n")
    else:
        for suite, rows in found:
            show(suite, rows)


def _count(things: Collection[Any], name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    if abs(value) >= 1e12:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


if __name__ == "__main__":
    errors.main(main)
