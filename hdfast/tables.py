"""The tables of a suite: final scores of its tasks, their spread over seeds, and the aggregates of all of them."""

import math
import os
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from hdfast import suites

_WIDEST = 80  # letters of all folders' names that may stand beside each other
AGGREGATES = ("mean", "median", "iqm")


@dataclass(frozen=True)
class TaskScores:
    """The finished runs of one task: seed -> final score, and share of episodes solved if the task reports it.

    precisions: the types that their matrix work was in, as far as known.
    """

    task: suites.Task
    scores: Mapping[int, float]
    success: Mapping[int, float] = field(default_factory=dict)
    precisions: frozenset[str] = frozenset()

    @property
    def mean(self) -> float:
        """Mean score over seeds; NaN if no run is finished."""
        return _mean(self.scores.values())

    @property
    def standard_error(self) -> float:
        """Standard error of that mean; NaN if fewer than two runs are finished."""
        return _standard_error(self.scores.values())

    @property
    def normalized(self) -> tuple[float, float] | None:
        """Mean human-normalised score and its standard error; None if no human was measured or no run has finished."""
        if self.task.human is None or self.task.random is None or not self.scores:
            return None
        scale = self.task.human - self.task.random
        return suites.human_normalized(self.task, self.mean), self.standard_error / scale


def title(suite: suites.Suite, found: Collection[Sequence[TaskScores]]) -> str:
    """One line on what the tables of one or several folders show, and how they write a spread if there is one."""
    spread = " ± standard error" if any(len(row.scores) > 1 for rows in found for row in rows) else ""
    interval = "; [95% bootstrap interval]" if any(map(suite.interval, _comparable(suite, found))) else ""
    others = {
        name for rows in found for row in rows if row.task.published for name in row.precisions - {"float32"}
    }
    precision = (
        f"; in {' and '.join(sorted(others))}, where published scores are of float32" if others else ""
    )
    return f"{suite.name}: score of the final evaluation, mean over seeds{spread}{interval}{precision}"


def table(suite: suites.Suite, rows: Sequence[TaskScores]) -> Table:
    """Score, success, human-normalised score and published ones per task, then mean, median and IQM over tasks.

    Means over two seeds or more have a standard error, and aggregates of only such tasks a 95% interval. The
    aggregates of the published methods are over the tasks that are finished here, so that columns are comparable.
    """
    human = any(row.task.human is not None for row in rows)
    solved = any(row.success for row in rows)
    view = Table(box=box.SIMPLE_HEAD)
    view.add_column("task")
    optional = [*(["success"] if solved else []), *(["human-norm."] if human else [])]
    for name in ("seeds", "score", *optional, *suite.methods):
        view.add_column(name, justify="right")
    for row in rows:
        cells = [row.task.name, str(len(row.scores)), _score(row)]
        if solved:
            cells.append(_success(row))
        if human:
            cells.append("-" if row.normalized is None else _spread(*row.normalized, "{:z.3f}"))
        for method in suite.methods:
            seeds = row.task.published.get(method)
            cells.append(_number(sum(seeds) / len(seeds)) if seeds else "-")
        view.add_row(*cells)
    done = _done(suite, rows)
    if (ours := _aggregates(suite, done)) is None:
        return view
    published = [
        suite.aggregate({k: v for k, v in suite.published(method).items() if k in done})
        for method in suite.methods
    ]
    view.add_section()
    for name in AGGREGATES:
        others = [f"{getattr(p, name):z.3f}" if p else "-" for p in published]
        place = ["score", *optional].index(str(suite.measure))
        cells = ["" if k != place else ours[name] for k in range(1 + len(optional))]
        view.add_row(f"{suite.measure} {name}", str(len(done)), *cells, *others)
    return view


def side_by_side(suite: suites.Suite, found: Mapping[str, Sequence[TaskScores]]) -> Table:
    """Score of each folder per task, success where it is known, then the aggregates of each folder.

    Rows are the tasks that any folder has finished. The aggregates are over the tasks that every folder has finished,
    ignoring folders that have finished none, so that columns are comparable.

    Args:
        found: name of the folder -> what `collect` finds in it.
    """
    tasks = {row.task.name: row.task for rows in found.values() for row in rows}
    by_name = [{row.task.name: row for row in rows} for rows in found.values()]
    solved = any(row.success for rows in found.values() for row in rows)
    comparable = _comparable(suite, found.values())
    aggregates = [_aggregates(suite, done) for done in comparable]
    names = short(list(found))
    if sum(map(len, names)) * (1 + solved) > _WIDEST:
        return _as_rows(suite, names, by_name, tasks, solved, aggregates, comparable)
    view = Table(box=box.SIMPLE_HEAD)
    view.add_column("task")
    view.add_column("seeds", justify="right")
    for name in (*names, *([f"{folder}, success" for folder in names] if solved else [])):
        view.add_column(Text(name), justify="right")
    for name, task in tasks.items():
        rows = [folder.get(name, TaskScores(task, {})) for folder in by_name]
        if any(row.scores for row in rows):
            success = map(_success, rows) if solved else []
            view.add_row(name, _counts([len(row.scores) for row in rows]), *map(_score, rows), *success)
    if not any(aggregates):
        return view
    view.add_section()
    for name in AGGREGATES:
        cells = [texts[name] if texts else "-" for texts in aggregates]
        view.add_row(f"{suite.measure} {name}", str(max(map(len, comparable))), *cells)
    return view


def _as_rows(
    suite: suites.Suite,
    names: Sequence[str],
    by_name: Sequence[Mapping[str, TaskScores]],
    tasks: Mapping[str, suites.Task],
    solved: bool,
    aggregates: Sequence[Mapping[str, str] | None],
    comparable: Sequence[Mapping[str, Sequence[float]]],
) -> Table:
    """`side_by_side` for folders whose names are too long to stand beside each other: one below the other."""
    view = Table(box=box.SIMPLE_HEAD)
    view.add_column("task")
    view.add_column("folder", overflow="fold")
    for name in ("seeds", "score", *(["success"] if solved else [])):
        view.add_column(name, justify="right")
    for task in tasks:
        label = task
        for name, folder in zip(names, by_name, strict=True):
            if (row := folder.get(task)) is not None and row.scores:
                view.add_row(
                    label, Text(name), str(len(row.scores)), _score(row), *([_success(row)] if solved else [])
                )
                label = ""
        if not label:
            view.add_section()
    for kind in AGGREGATES if any(aggregates) else ():
        label = f"{suite.measure} {kind}"
        for name, texts, done in zip(names, aggregates, comparable, strict=True):
            if texts:
                view.add_row(label, Text(name), str(len(done)), texts[kind])
                label = ""
        view.add_section()
    return view


def short(folders: Sequence[str]) -> list[str]:
    """The names of folders without that of the one that holds them all."""
    if len(folders) < 2:
        return list(folders)
    full = [os.path.abspath(folder) for folder in folders]
    above = os.path.commonpath(full)
    return [os.path.basename(above) if one == above else os.path.relpath(one, above) for one in full]


def as_dict(suite: suites.Suite, rows: Sequence[TaskScores]) -> dict[str, Any]:
    """The same for JSON: scores and success rates per task and seed, their standard errors, and the aggregates."""
    done = _done(suite, rows)
    aggregate, ends = suite.aggregate(done) if done else None, suite.interval(done)
    success = {row.task.name: {str(k): v for k, v in row.success.items()} for row in rows if row.success}
    errors = {}
    for row in rows:
        if len(row.scores) > 1:
            errors[row.task.name] = {"score": row.standard_error}
            if len(row.success) > 1:
                errors[row.task.name]["success"] = _standard_error(row.success.values())
            if row.normalized is not None:
                errors[row.task.name]["human_normalized"] = row.normalized[1]
    return {
        "suite": suite.name,
        "tasks": {row.task.name: {str(k): v for k, v in row.scores.items()} for row in rows},
        "success": success or None,
        "standard_error": errors or None,
        "aggregate": None if aggregate is None else {"of": suite.measure, **vars(aggregate)},
        "interval": ends and {name: [getattr(end, name) for end in ends] for name in AGGREGATES},
    }


def _done(suite: suites.Suite, rows: Sequence[TaskScores]) -> dict[str, list[float]]:
    """Task name -> final results, of the tasks that have any: what the suite aggregates, else scores."""
    results = {
        row.task.name: row.success if suite.measure == "success" else row.scores for row in rows if row.scores
    }
    return {name: list(runs.values()) for name, runs in results.items() if runs}


def _comparable(suite: suites.Suite, found: Collection[Sequence[TaskScores]]) -> list[dict[str, list[float]]]:
    """`_done` of each folder, restricted to the tasks finished in every folder that has finished any."""
    done = [_done(suite, rows) for rows in found]
    common = set.intersection(*(set(scores) for scores in done if scores)) if any(done) else set()
    return [{name: runs for name, runs in scores.items() if name in common} for scores in done]


def _counts(counts: Sequence[int]) -> str:
    """One number if all are the same, otherwise all of them."""
    return " / ".join(map(str, counts if len(set(counts)) > 1 else counts[:1]))


def _aggregates(suite: suites.Suite, done: Mapping[str, Sequence[float]]) -> dict[str, str] | None:
    """Each aggregate as text, with its interval where there is one; None if there is nothing to aggregate.

    A single task has aggregates only if they are of another number than its own.
    """
    found = suite.aggregate(done) if len(done) > (suite.measure != "human-norm.") else None
    if found is None:
        return None
    ends = suite.interval(done)
    cells = {}
    for name in AGGREGATES:
        value = getattr(found, name)
        form, fine = {"human-norm.": ("{:z.2f}", "{:z.3f}"), "success": ("{:.0%}", "{:.0%}")}.get(
            suite.measure or "", (_format(value), _format(value))
        )
        interval = ", ".join(form.format(getattr(end, name)) for end in ends or ())
        cells[name] = fine.format(value) + (f" [{interval}]" if interval else "")
    return cells


def _score(row: TaskScores) -> str:
    return _spread(row.mean, row.standard_error, _format(row.mean))


def _success(row: TaskScores) -> str:
    values = row.success.values()
    return _spread(_mean(values), _standard_error(values), "{:.0%}") if values else "-"


def _spread(mean: float, error: float, form: str) -> str:
    """`mean ± error`, or the mean alone where the error is not known."""
    return form.format(mean) + ("" if math.isnan(error) else f" ± {form.format(error)}")


def _number(value: float) -> str:
    return _format(value).format(value)


def _format(value: float) -> str:
    """The number format of a score of this size, and of its error."""
    size = abs(value)
    if math.isnan(size):
        return "-"
    if size >= 1e12:
        return "{:.3g}"
    if 0 < size < 0.1:
        return "{:z.2g}"
    return "{:,.0f}" if size >= 1000 else "{:z.1f}" if size >= 10 else "{:z.2f}"


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _standard_error(values: Collection[float]) -> float:
    """Of the mean of values; NaN for fewer than two."""
    if len(values) < 2:
        return math.nan
    if not all(map(math.isfinite, values)):
        return math.nan
    try:
        return math.sqrt(statistics.variance(values) / len(values))  # exactly 0 for equal numbers
    except OverflowError:
        return math.inf
