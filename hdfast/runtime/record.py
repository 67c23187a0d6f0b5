"""What the directory of a run says, without locking it: its config and where it comes from, its result, its checkpoint.

The files are described in `rundir`, which writes them.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdfast.runtime import checkpoint
from hdfast.runtime.errors import CheckpointError, ConfigError, RunError, disk_errors
from hdfast.runtime.files import is_number

_ABSENT = "(absent)"


@dataclass(frozen=True)
class Record:
    """What a run's directory says about the run."""

    path: Path
    config: dict[str, Any]
    created: dict[str, Any]
    resumed: list[dict[str, Any]]
    summary: dict[str, Any] | None  # None until the run is finished


def path_of(logdir: Path, suite: str, task: str, seed: int) -> Path:
    """Where a run lives; task: the name of its folder."""
    return Path(logdir) / suite / task / f"seed{seed}"


def has_begun(path: Path) -> bool:
    """Whether the run in a directory has a checkpoint: until then it has learnt nothing."""
    return bool(checkpoint.numbered(path / "checkpoints"))


def read(path: Path) -> Record:
    """What a run's directory says, without locking it: for reports and evaluation, also beside the trainer.

    Raises: RunError when there is no run, or its JSON is damaged.
    """
    with disk_errors(path, "read the run"):
        if not (path / "config.json").exists():
            inside = (path.absolute().parent / "config.json").exists()  # such as checkpoints/
            hint = f"try {path.parent}" if inside else ""
            raise RunError("there is no run here (no config.json)", where=path, hint=hint)
        try:
            about = read_json(path / "config.json", config=dict, created=dict, resumed=list)
        except ValueError as error:
            raise damaged(path / "config.json", str(error)) from None
        finished = path / "finished.json"
        summary = _read_summary(finished) if finished.exists() else None
    return Record(path, about["config"], about["created"], about["resumed"], summary)


def read_one(path: Path) -> Record:
    """`read` of a directory that a user names. Raises also ConfigError: it holds runs instead."""
    with disk_errors(path, "read the run"):
        below = [] if (path / "config.json").exists() else sorted(path.glob("**/config.json"))
    if below:
        hint = f"try {below[0].parent}"
        raise ConfigError(f"this is not a run, it holds {len(below)}", where=path, hint=hint)
    return read(path)


def chosen(path: str | Path) -> checkpoint.Checkpoint:
    """The newest checkpoint of the run in directory `path`, or the one whose file it is. Expands `~`, locks nothing.

    Raises: RunError: there is no run. ConfigError: it holds runs instead. CheckpointError: it has no checkpoint yet or
    none of that name, or what it has is damaged.
    """
    path = Path(path).expanduser()
    if path.suffix == checkpoint.SUFFIX:
        path = path.resolve() if path.is_symlink() else path  # its run is where the file is
        return checkpoint.load(path if path.parent.name else path.absolute())
    read_one(path)
    if (found := checkpoint.load_latest(path / "checkpoints")) is None:
        hint = "the first is written after --checkpoint.seconds of training"
        raise CheckpointError("there is no checkpoint yet", where=path, hint=hint)
    return found


def difference(
    saved: Mapping[str, Any], requested: Mapping[str, Any], ignore: Collection[str] = ()
) -> list[str]:
    """One line per field in which two nested configs differ, "rssm.deter: 512 -> 1024", saved value first.

    Numbers are compared by value: 1 and 1.0 are the same.
    ignore: dotted fields left out, each with everything below it.
    """
    before, after = dict(_flat(saved)), dict(_flat(requested))
    lines = []
    for field in dict.fromkeys([*before, *after]):
        parts = field.split(".")
        if any(".".join(parts[:i]) in ignore for i in range(1, len(parts) + 1)):
            continue
        old, new = (json.dumps(side[field]) if field in side else _ABSENT for side in (before, after))
        values = [before.get(field), after.get(field)]
        if old != new and not (all(map(_is_number, values)) and values[0] == values[1]):
            lines.append(f"{field}: {old} -> {new}")
    return lines


def refused(
    saved: Mapping[str, Any],
    requested: Mapping[str, Any],
    finished: bool,
    ignore: Collection[str],
    growing: Collection[str],
) -> list[str]:
    """The differences (see `difference`) for which a run that has begun is not resumed.

    growing: fields that may grow. They may be less where the run is `finished`: that asks for nothing.
    """
    free = [name for name in growing if finished or requested[name] > saved[name]]
    return difference(saved, requested, {*ignore, *free})


def damaged(path: Path, why: str, *, hint: str = "restore it or remove the run's directory") -> RunError:
    """The error to raise about a damaged file of a run."""
    return RunError(f"the file is damaged ({why})", where=path, hint=hint)


def read_json(path: Path, **kinds: type) -> dict[str, Any]:
    """The fields of an object, each of its type. Raises: ValueError."""
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError(f"it is {content!r:.50}, expected a dict")
    for field, kind in kinds.items():
        if not isinstance(content.get(field), kind):
            raise ValueError(f"{field} is {content.get(field)!r:.50}, expected a {kind.__name__}")
    return content


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        summary = read_json(path, summary=dict)["summary"]
        for name, value in {"score": None, **summary}.items():
            if name in ("score", "success") and not is_number(value):
                raise ValueError(f"{name} is {value!r:.50}, expected a number")
    except ValueError as error:
        raise damaged(path, str(error), hint="remove it, and the run's command writes it anew") from None
    return summary


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    fields = []
    for name, value in config.items():
        nested = isinstance(value, Mapping) and value
        fields += _flat(value, f"{prefix}{name}.") if nested else [(prefix + name, value)]
    return fields
