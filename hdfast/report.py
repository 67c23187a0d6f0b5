"""Prints the tables of the suites that have runs, from those that are finished, beside the published scores."""

import json
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from hdfast import suites
from hdfast.runtime import errors, rundir
from hdfast.runtime.arguments import Arguments, given_path
from hdfast.runtime.console import Console
from hdfast.runtime.errors import ConfigError, RunError, disk_errors
from hdfast.runtime.files import plain


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
    of, and left out.
    """
    found = []
    for task in tasks if tasks is not None else (*suite.tasks, *_others(logdir, suite)):
        scores, success = {}, {}
        for path in sorted((logdir / suite.name / task.folder).glob("seed*")):
            seed = path.name.removeprefix("seed")
            if not seed.isdecimal() or not (path / "config.json").exists():
                continue
            try:
                summary = rundir.read(path).summary
            except RunError as error:  # the others' results are there all the same
                errors.warn(str(error))
                continue
            if summary is not None:
                scores[int(seed)] = float(summary["score"])
                if "success" in summary:
                    success[int(seed)] = float(summary["success"])
        found.append(TaskScores(task, scores, success))
    return found


def with_runs(logdir: Path) -> list[suites.Suite]:
    """The suites that have runs below `logdir`, finished or not."""
    return [s for s in suites.SUITES.values() if any((logdir / s.name).glob("*/seed*/config.json"))]


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
    parser.add_argument(
        "--json", action="store_true", help="print JSON instead: one suite, or a list of them"
    )
    args = parser.parse_args()
    chosen = [suites.get(args.suite)] if args.suite is not None else []
    with disk_errors(args.logdir, "read the folder"):
        if not args.logdir.is_dir():
            raise ConfigError(f"there is no folder {args.logdir}", where="--logdir")
    if not (chosen := chosen or with_runs(args.logdir)):
        hint = "a run is <logdir>/<suite>/<task>/seed<k>, of python -m hdfast.train --logdir"
        raise RunError("there are no runs in this folder", where=args.logdir, hint=hint)
    found = [(suite, collect(args.logdir, suite)) for suite in chosen]
    if args.json:
        about = [as_dict(suite, rows) for suite, rows in found]
        sys.stdout.write(json.dumps(plain(about if args.suite is None else about[0]), indent=2) + "\n")
    else:
        for suite, rows in found:
            show(suite, rows)


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
