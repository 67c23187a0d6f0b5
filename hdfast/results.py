"""What the runs below a folder have scored: the last evaluation of those that are finished, and every one of all."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hdfast import suites
from hdfast.config import RESUMABLE_CHANGES, with_defaults
from hdfast.runtime import errors
from hdfast.runtime.errors import RunError, disk_errors
from hdfast.runtime.files import is_number
from hdfast.runtime.record import damaged, difference, read
from hdfast.tables import TaskScores

# What is known of an evaluation: which it is, and what came of it.
KEYS = ("suite", "task", "seed", "agent_steps")
NUMBERS = ("frames", "seconds", "episodes", "score", "standard_error", "success")
CURVES = (*KEYS, *NUMBERS)
_APART = ("task", "seed", *RESUMABLE_CHANGES)  # what may differ between runs that are shown together


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
                record = read(path)
            except RunError as error:  # the others' results can still be shown
                errors.warn(str(error))
                continue
            if (summary := record.summary) is not None:
                configs.append(with_defaults(record.config))
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
        found.append(TaskScores(task, scores, success, frozenset(precisions)))
    return found


def curves(logdir: Path, suite: suites.Suite) -> list[dict[str, Any]]:
    """Every evaluation of every run of `suite` below `logdir`, finished or not: those of CURVES that are known.

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


def with_runs(logdir: Path) -> list[suites.Suite]:
    """The suites that have runs below `logdir`, finished or not."""
    return [s for s in suites.SUITES.values() if any((logdir / s.name).glob("*/seed*/config.json"))]


def differences(folders: Sequence[Path], suite: suites.Suite) -> list[str]:
    """One line per folder on how its runs differ from the first folder's, judged by the first run of each."""
    configs = {}
    for folder in folders:
        for seed, path in (run for task in sorted((folder / suite.name).glob("*")) for run in _seeds(task)):
            with contextlib.suppress(RunError):  # already reported
                _task_of(path, suite, seed)
                configs[folder] = with_defaults(read(path).config)
                break
    first, own = next(iter(configs.items()), (None, {}))
    lines = {folder: difference(own, config, _APART) for folder, config in configs.items()}
    return [f"{folder} against {first}: {', '.join(found)}" for folder, found in lines.items() if found]


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
    config = {"suite": suite.name, "seed": seed, **read(path).config}
    for field in ("suite", "task"):
        if not isinstance(value := config.get(field), str):
            raise damaged(path / "config.json", f"config.{field} is {value!r:.50}, expected a str")
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
    lines = [line for other in configs[1:] for line in difference(configs[0], other, _APART)]
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
            numbers = [entry[name] for name in NUMBERS if name in entry]
            if type(entry["agent_steps"]) is not int or not all(map(is_number, [entry["score"], *numbers])):
                raise ValueError(line)
        except (ValueError, LookupError, TypeError):
            damaged.append(line)
        else:
            found.append(entry)
    if damaged:
        errors.warn(f"{path}: {len(damaged)} damaged line{'s' * (len(damaged) > 1)} left out")
    return found


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
