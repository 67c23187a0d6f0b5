"""Prints a table of the finished runs of every suite, beside the published scores.

Several folders, such as runs with and without harmony, are compared side by side (--logdir A B). --curves writes the
learning curves of all runs, finished or not.
"""

import argparse
import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from hdfast import suites
from hdfast.config import Config
from hdfast.loop import RESUMABLE_CHANGES
from hdfast.runtime import errors, rundir
from hdfast.runtime.arguments import Arguments, given_path
from hdfast.runtime.console import Console
from hdfast.runtime.errors import ConfigError, RunError, disk_errors
from hdfast.runtime.files import plain, replacing
from hdfast.tables import TaskScores, as_dict, side_by_side, table, title

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


def collect(
    logdir: Path,
    suite: suites.Suite,
    tasks: Sequence[suites.Task] | None = None,
    *,
    label: str = "",
) -> list[TaskScores]:
    """Reads the final evaluation of every finished run of `tasks` below `logdir`.

    By default these are all tasks of the suite, and any others trained in it. A run that cannot be read, or whose
    folder was copied, moved or renamed, is left out with a warning. A warning, which begins with `label`, also names
    each task whose seeds differ in what they compute.
    """
    found = []
    for task in tasks if tasks is not None else (*suite.tasks, *_others(logdir, suite)):
        scores, success, configs = {}, {}, []
        precisions, episodes = set(), set()
        for seed, path in _runs(logdir, suite, task):
            try:
                record = rundir.read(path)
            except RunError as error:  # the others' results can still be shown
                errors.warn(str(error))
                continue
            if (summary := record.summary) is not None:
                configs.append(rundir.filled(record.config, Config().to_dict()))
                scores[seed] = float(summary["score"])
                if "success" in summary:
                    success[seed] = float(summary["success"])
                if "precision" in summary:
                    precisions.add(str(summary["precision"]))
                if "episodes" in summary:
                    episodes.add(str(summary["episodes"]))
        found_out = {"precision": precisions, "eval.episodes": episodes}
        computed = [f"{k} ({' and '.join(sorted(v))})" for k, v in found_out.items() if len(v) > 1]
        if fields := [*_differing(configs), *computed]:
            errors.warn(f"{label}{suite.name} {task.name}: its seeds differ in {', '.join(fields)}")
        found.append(TaskScores(task, scores, success))
    return found


def curves(logdir: Path, suite: suites.Suite) -> list[dict[str, Any]]:
    """Every evaluation of every run of `suite` below `logdir`, finished or not: the columns of CURVES that are known.

    A torn last line is left out; other damage, and a run whose folder was copied, moved or renamed, is left out with
    a warning.
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


def write_curves(path: Path, rows: Sequence[Mapping[str, Any]], folders: Sequence[str] = ()) -> None:
    """Writes rows of `curves` as CSV, by suite, task, seed and agent steps, atomically.

    folders: the rows come in this order, and then have a first column `logdir` that names the folder.

    Raises: DiskFullError, RunError.
    """

    def order(row: Mapping[str, Any]) -> list[Any]:
        return [*([folders.index(row["logdir"])] if folders else []), *(row[name] for name in CURVES[:4])]

    text = io.StringIO()
    writer = csv.DictWriter(text, (*(["logdir"] if folders else []), *CURVES), lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=order))
    with disk_errors(path, "write the curves"):
        target = Path(os.path.realpath(path))  # a link stays one
        if target.exists() and not target.is_file():
            raise RunError("cannot write the curves: it is there, and not a file", where=path)
        with replacing(target) as file:
            file.write(text.getvalue().encode())


def with_runs(logdir: Path) -> list[suites.Suite]:
    """The suites that have runs below `logdir`, finished or not."""
    return [s for s in suites.SUITES.values() if any((logdir / s.name).glob("*/seed*/config.json"))]


class _Astray(RunError):
    """A run in a place that does not match its configuration: its folder was copied, moved or renamed."""


def _runs(logdir: Path, suite: suites.Suite, task: suites.Task) -> Iterator[tuple[int, Path]]:
    """Seed and directory of the runs of a task, finished or not; warns of one that belongs elsewhere."""
    for seed, path in _seeds(logdir / suite.name / task.folder):
        try:
            if _task_of(path, suite, seed).name != task.name:
                continue  # two names may share a folder
        except _Astray as error:
            errors.warn(str(error))
            continue
        except RunError:
            pass  # reported where the unreadable file is needed
        yield seed, path


def _seeds(folder: Path) -> Iterator[tuple[int, Path]]:
    """Seed and directory of everything that looks like a run in the folder of a task."""
    for path in sorted(folder.glob("seed*")):
        seed = path.name.removeprefix("seed")
        if seed.isdecimal() and (path / "config.json").exists():
            yield int(seed), path


def _task_of(path: Path, suite: suites.Suite, seed: int) -> suites.Task:
    """The task of the run of a suite and a seed in directory `path`.

    Raises: _Astray where it is of another suite or seed, or belongs in the folder of another task; RunError where
    its configuration cannot be read.
    """
    config = {"suite": suite.name, "seed": seed, **rundir.read(path).config}
    for field in ("suite", "task"):
        if not isinstance(value := config.get(field), str):
            raise rundir.damaged(path / "config.json", f"config.{field} is {value!r:.50}, expected a str")
    try:
        of = suites.get(config["suite"])
        task = of.task(config["task"])
    except suites.UnknownName as error:
        raise _Astray(f"left out: {error}", where=path) from None
    if (of.name, task.folder, config["seed"]) != (suite.name, path.parent.name, seed):
        what = f"left out: it holds {of.name} {task.name} seed {config['seed']}"
        raise _Astray(what, where=path, hint="was it copied, moved or renamed?")
    return task


def _differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fields that decide what is computed, except the seed, in which configurations differ."""
    ignore = {"seed", *RESUMABLE_CHANGES}
    lines = [line for other in configs[1:] for line in rundir.difference(configs[0], other, ignore)]
    return list(dict.fromkeys(line.partition(":")[0] for line in lines))


def _otherwise(folders: Sequence[Path], suite: suites.Suite) -> list[str]:
    """One line per folder on how its runs differ from the first folder's, judged by the first run of each."""
    configs = {}
    for folder in folders:
        for seed, path in (run for task in sorted((folder / suite.name).glob("*")) for run in _seeds(task)):
            with contextlib.suppress(RunError):  # already reported
                _task_of(path, suite, seed)
                configs[folder] = rundir.filled(rundir.read(path).config, Config().to_dict())
                break
    first, own = next(iter(configs.items()), (None, {}))
    ignore = {"seed", *RESUMABLE_CHANGES}
    lines = {folder: rundir.difference(own, config, ignore) for folder, config in configs.items()}
    return [f"{folder} against {first}: {', '.join(found)}" for folder, found in lines.items() if found]


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
    """Trained tasks that are not in the suite's list; warns of a folder that belongs to no task."""
    listed = {task.folder for task in suite.tasks}
    tasks: dict[str, suites.Task] = {}
    for folder in sorted((logdir / suite.name).glob("*")):
        found, astray = {}, []
        for seed, path in () if folder.name in listed else _seeds(folder):
            try:
                task = _task_of(path, suite, seed)
            except _Astray as error:
                astray.append(error)
            except RunError as error:
                errors.warn(str(error))
            else:
                found[task.name] = task
        if astray and not found:  # of one among others `_runs` warns
            one = astray[0]
            errors.warn(str(RunError(one.what, where=folder, hint=one.hint)))
        tasks |= found
    return list(tasks.values())


def show(suite: suites.Suite, rows: Sequence[TaskScores]) -> None:
    """Prints the table; with room for 120 columns when the output is not a terminal.

    Tasks without a finished run are left out, unless there are published scores to show.
    """
    shown = [row for row in rows if row.scores or row.task.published]
    _print(title(suite, [shown]), table(suite, shown) if shown else "no run is finished yet\n")


def compare(suite: suites.Suite, found: Mapping[str, Sequence[TaskScores]]) -> None:
    """Prints the table of several folders; found: name of the folder -> what `collect` finds in it."""
    finished = any(row.scores for rows in found.values() for row in rows)
    view = side_by_side(suite, found) if finished else "no run is finished yet\n"
    _print(title(suite, found.values()), view)


def _print(heading: str, view: Table | str) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)
    console.print(heading, highlight=False, markup=False, soft_wrap=True)
    console.print(view)


def main() -> None:
    parser = Arguments("python -m hdfast.report", __doc__)
    parser.add_argument("--suite", help="suite to report; all that have runs if left out")
    parser.add_argument(
        "--logdir",
        type=given_path,
        nargs="+",
        action="extend",
        default=argparse.SUPPRESS,  # "extend" would keep any other
        help="folder that holds all runs, or several to compare (default: runs)",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--json",
        action="store_true",
        help="print JSON instead: a suite, a list of suites, or for several folders a list with those of each",
    )
    instead.add_argument(
        "--curves",
        type=given_path,
        metavar="FILE",
        help="write every evaluation of every run to it as CSV instead",
    )
    args = parser.parse_args()
    chosen = [suites.get(args.suite)] if args.suite is not None else []
    folders = getattr(args, "logdir", [Path("runs")])
    runs = _suites_of(folders, chosen)
    if args.curves is not None:
        _save_curves(args.curves, runs, several=len(folders) > 1, of=args.suite)
        return
    if len(folders) > 1:
        _show_several(runs, as_json=args.json)
        return
    ((folder, there),) = runs.items()
    found = [(suite, collect(folder, suite)) for suite in there]
    if args.json:
        about = [as_dict(suite, rows) for suite, rows in found]
        _write_json(about if args.suite is None else about[0])
    else:
        for suite, rows in found:
            show(suite, rows)


def _suites_of(folders: Sequence[Path], chosen: Sequence[suites.Suite]) -> dict[Path, list[suites.Suite]]:
    """Folder -> which of the chosen suites have runs in it, or of all.

    Among several folders, those without runs are left out with a warning; a single one has what was chosen.

    Raises: ConfigError, DiskFullError, RunError.
    """
    found: dict[Path, list[suites.Suite]] = {}
    for folder in folders:
        with disk_errors(folder, "read the folder"):
            if not folder.is_dir():
                raise ConfigError(f"there is no folder {folder}", where="--logdir")
            if twice := [other for other in found if other.samefile(folder)]:
                raise ConfigError(f"{twice[0]} and {folder} are the same folder", where="--logdir")
        found[folder] = [suite for suite in with_runs(folder) if not chosen or suite in chosen]
    if len(folders) == 1 and chosen:
        return {folders[0]: list(chosen)}
    of = f" of {chosen[0].name}" if chosen else ""
    if not any(found.values()):
        hint = "a run is <logdir>/<suite>/<task>/seed<k>, of python -m hdfast.train --logdir"
        raise RunError(f"there are no runs{of} in {_these(folders)}", where=_names(folders), hint=hint)
    for folder, there in found.items():
        if not there:
            errors.warn(f"{folder}: there are no runs{of} in this folder")
    return {folder: there for folder, there in found.items() if there}


def _save_curves(
    path: Path, runs: Mapping[Path, Sequence[suites.Suite]], *, several: bool, of: str | None
) -> None:
    """Writes the curves of the runs, and says how many. Raises: DiskFullError, RunError."""
    rows = [
        {**({"logdir": str(folder)} if several else {}), **row}
        for folder, there in runs.items()
        for suite in there
        for row in curves(folder, suite)
    ]
    if not rows:
        of = "" if of is None else f" of {of}"
        hint = "a run evaluates every --eval.every agent steps, and at its end"
        raise RunError(f"there are no evaluations{of} in {_these(runs)}", where=_names(runs), hint=hint)
    write_curves(path, rows, [str(folder) for folder in runs] if several else [])
    evaluated = {(row.get("logdir"), row["suite"], row["task"], row["seed"]) for row in rows}
    sys.stdout.write(f"{_count(rows, 'evaluation')} of {_count(evaluated, 'run')}: {path}\n")


def _show_several(runs: Mapping[Path, Sequence[suites.Suite]], *, as_json: bool) -> None:
    """A table for each suite that a folder has runs of, or JSON with an object for each folder."""
    found = {
        str(folder): {suite.name: collect(folder, suite, label=f"{folder}: ") for suite in there}
        for folder, there in runs.items()
    }
    if as_json:
        about = [
            {"logdir": folder, "suites": [as_dict(suites.get(name), rows) for name, rows in tables.items()]}
            for folder, tables in found.items()
        ]
        _write_json(about)
        return
    for name, suite in suites.SUITES.items():
        if any(name in tables for tables in found.values()):
            compare(suite, {folder: tables.get(name, []) for folder, tables in found.items()})
            sys.stdout.write("".join(f"{line}\n" for line in _otherwise(list(runs), suite)))


def _write_json(about: Any) -> None:
    sys.stdout.write(json.dumps(plain(about), indent=2) + "\n")


def _these(folders: Collection[Path]) -> str:
    return "this folder" if len(folders) == 1 else "these folders"


def _names(folders: Collection[Path]) -> str:
    return ", ".join(map(str, folders))


def _count(things: Collection[Any], name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


if __name__ == "__main__":
    errors.main(main)
