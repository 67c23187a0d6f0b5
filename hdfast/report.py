"""Prints a table of the finished runs of every suite, beside the published scores.

Several folders, such as runs with and without harmony, are compared side by side (--logdir A B). --curves writes the
learning curves of all runs, finished or not, as numbers or as a plot, where thin lines are seeds, and a thick one is
their mean, in a band of its standard error.
"""

import argparse
import csv
import io
import json
import math
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from hdfast import suites
from hdfast.results import CURVES, KEYS, collect, curves, differences, with_runs
from hdfast.runtime import entry, errors
from hdfast.runtime.arguments import Arguments, given_path
from hdfast.runtime.console import Console
from hdfast.runtime.errors import ConfigError, RunError, disk_errors
from hdfast.runtime.files import plain, replacing
from hdfast.tables import TaskScores, as_dict, side_by_side, table, title

PICTURES = ("png", "pdf", "svg")


def write_curves(path: Path, rows: Sequence[Mapping[str, Any]], folders: Sequence[str] = ()) -> None:
    """Writes rows of `curves` as a picture or as CSV, by suite, task, seed and agent steps, atomically.

    path: that of a picture if it ends like one of PICTURES.
    folders: the rows come in this order, and then have a first column `logdir` that names the folder.

    Raises: DiskFullError, RunError; ConfigError for another ending.
    """

    def order(row: Mapping[str, Any]) -> list[Any]:
        return [*([folders.index(row["logdir"])] if folders else []), *(row[name] for name in KEYS)]

    ordered, names = sorted(rows, key=order), list(map(str, folders))
    if (kind := path.suffix.removeprefix(".").lower()) not in ("", "csv", *PICTURES):
        endings = ", ".join(f".{one}" for one in (*PICTURES, "csv"))
        raise ConfigError(
            f"nothing is written as .{kind}", where=f"--curves {path}", hint=f"expected {endings}"
        )
    if kind in PICTURES:
        from hdfast.plots import draw_curves, save  # slow to import

        picture = io.BytesIO()
        save(draw_curves(ordered, names), picture, kind)
        content = picture.getvalue()
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, (*(["logdir"] if folders else []), *CURVES), lineterminator="\n")
        writer.writeheader()
        writer.writerows(ordered)
        content = text.getvalue().encode()
    with disk_errors(path, "write the curves"):
        target = Path(os.path.realpath(path))  # a link stays one
        if target.exists() and not target.is_file():
            raise RunError("cannot write the curves: it is there, and not a file", where=path)
        with replacing(target) as file:
            file.write(content)


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
        help="folder that holds all runs, or the variants of a sweep, or several to compare (default: runs)",
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
        help="write every evaluation of every run to it instead: a plot if it ends in .png, .pdf or .svg, or CSV",
    )
    args = parser.parse_args()
    chosen = [suites.get(args.suite)] if args.suite is not None else []
    folders = [one for folder in getattr(args, "logdir", [Path("runs")]) for one in _variants(folder)]
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


def _variants(folder: Path) -> list[Path]:
    """A folder, or those of a sweep's variants in it, in the order of the numbers in their names; or all of these."""
    with disk_errors(folder, "read the folder"):
        if not folder.is_dir():
            return [folder]
        inside = [one for one in folder.iterdir() if "=" in one.name and one.is_dir() and with_runs(one)]
        own = [folder] if with_runs(folder) or not inside else []
    return [*own, *sorted(inside, key=_natural)]


def _natural(path: Path) -> list[tuple[float, str]]:
    """A key by which 64 comes before 128, and 1e-2 before 1e-1."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", path.name)
    return [(float(part), "") if k % 2 else (math.inf, part) for k, part in enumerate(parts)]


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
        whole = [parent for folder in folders if (parent := _folder_of_runs(folder))]
        hint = "a run is <logdir>/<suite>/<task>/seed<k>, of python -m hdfast.train --logdir"
        if whole:
            hint = f"--logdir {whole[0]} is the folder that holds {folders[0]}"
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
            sys.stdout.write("".join(f"{line}\n" for line in differences(list(runs), suite)))


def _write_json(about: Any) -> None:
    sys.stdout.write(json.dumps(plain(about), indent=2) + "\n")


def _folder_of_runs(inside: Path) -> Path | None:
    """The logdir that a suite's folder, a task's or a run belongs to; None if it is none of these."""
    for above, files in (1, "*/seed*/config.json"), (2, "seed*/config.json"), (3, "config.json"):
        if any(inside.glob(files)):
            return (
                inside.parents[above - 1]
                if len(inside.parents) >= above
                else inside.resolve().parents[above - 1]
            )
    return None


def _these(folders: Collection[Path]) -> str:
    return "this folder" if len(folders) == 1 else "these folders"


def _names(folders: Collection[Path]) -> str:
    return ", ".join(map(str, folders))


def _count(things: Collection[Any], name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


if __name__ == "__main__":
    entry.main(main)
