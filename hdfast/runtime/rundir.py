"""The directory of one run, `<logdir>/<suite>/<task>/seed<k>/`: its lock, its config, whether it is finished.

config.json: {"config": as first resolved, "created": provenance, "resumed": [provenance + "changed", ...]}.
finished.json: {"summary": {"score": number, ...}, "time": ...}, written when the run is done.
backends.json: how the last session computed.
"""

import contextlib
import fcntl
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch

import hdfast
from hdfast.runtime import checkpoint, errors
from hdfast.runtime.errors import CheckpointError, ConfigError, RunError, disk_errors
from hdfast.runtime.files import is_number, plain, write_json

OPENING = {"config.json", "backends.json", "lock"}  # files that exist before a run begins
FOLDERS = ("checkpoints", "replay", "tensorboard", "videos")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ABSENT = "(absent)"

State = Literal["new", "resumable", "finished"]


@dataclass(frozen=True)
class Record:
    """What a run's directory says about the run."""

    path: Path
    config: dict[str, Any]
    created: dict[str, Any]
    resumed: list[dict[str, Any]]
    summary: dict[str, Any] | None  # None until the run is finished


class RunDir:
    """A run's directory, held by this process until `close`; a context manager.

    path: the directory. checkpoints, replay, tensorboard, videos: its folders.
    state: "new", "resumable" or "finished" when it was opened.
    summary: what `mark_finished` was given, None before that.
    """

    def __init__(self, path: Path, state: State, summary: dict[str, Any] | None, lock: int) -> None:
        self.path, self.state, self.summary, self._lock = path, state, summary, lock
        self._made: list[Path] = []  # folders that `open` made, the run's own first
        self._grown: dict[str, Any] | None = None  # what config.json is to hold once the run has grown
        self.checkpoints, self.replay, self.tensorboard, self.videos = (path / name for name in FOLDERS)

    @classmethod
    def open(
        cls,
        logdir: Path,
        suite: str,
        task: str,
        seed: int,
        config: Mapping[str, Any],
        *,
        ignore: Collection[str] = (),
        growing: Collection[str] = (),
        defaults: Mapping[str, Any] | None = None,
        device: Mapping[str, Any] | None = None,
        warn: Callable[[str], None] = errors.warn,
    ) -> Self:
        """Create the run's directory, or open the one that is there, and lock it.

        config: the resolved configuration, nested and JSON-able.
        ignore: dotted fields that may differ on resuming ("device", "log.every"); "log" covers all below it.
        growing: top-level numbers that may be larger on resuming; a finished run then goes on. From `grow` on they
            are the run's own, and it is no longer finished. For a finished run they may be smaller, too.
        defaults: values of the fields that a saved config lacks, because they are newer than it.
        device: `describe_device(...)`, kept with the provenance.

        Raises: ConfigError when the run has checkpoints of another config, one detail line per field; RunError
        when the directory cannot be used or another process holds it; DiskFullError.
        """
        for what, name in (("suite", suite), ("task", task)):
            if not _NAME.fullmatch(name):
                raise ConfigError(
                    f"{what} {name!r} cannot name a folder", hint="use letters, digits, '.', '_', '-'"
                )
        path = path_of(logdir, suite, task, seed)
        requested = plain(dict(config), "config")
        with disk_errors(path, "use the run's directory", hint="choose another --logdir"):
            _check_is_directory(path)
            made = [folder for folder in (path, *path.parents) if not folder.exists()]
            path.mkdir(parents=True, exist_ok=True)
            lock = _lock(path, warn)
            try:
                origin = {**provenance(), "device": plain(dict(device or {}), "device")}
                opened = cls._open_locked(path, requested, ignore, growing, defaults or {}, origin, lock)
                opened._made = made
                return opened
            except BaseException:
                os.close(lock)
                raise

    @classmethod
    def _open_locked(
        cls,
        path: Path,
        requested: dict[str, Any],
        ignore: Collection[str],
        growing: Collection[str],
        defaults: Mapping[str, Any],
        origin: dict[str, Any],
        lock: int,
    ) -> Self:
        for name in FOLDERS:
            (path / name).mkdir(exist_ok=True)
        record = read(path) if (path / "config.json").exists() else None
        begun = has_begun(path)
        if record is None and begun:
            hint = "restore config.json or remove the directory"
            raise RunError("there are checkpoints but no config.json", where=path, hint=hint)
        finished = record is not None and record.summary is not None
        saved = filled(record.config, defaults) if record is not None else requested
        if finished:  # to be shorter than it is asks for nothing
            ignore = {*ignore, *(name for name in growing if requested[name] < saved[name])}
        grown = {name: requested[name] for name in growing if requested[name] > saved[name]}
        lines = difference(saved, requested, {*ignore, *grown})
        # Until its first checkpoint a run has learnt nothing, and its config may still change.
        if record is None or (lines and not begun and not finished):
            write_json(path / "config.json", {"config": requested, "created": origin, "resumed": []})
            return cls(path, "new", None, lock)
        if lines:
            hint = "give the saved values, or another --logdir or --seed for a new run"
            raise ConfigError("this run has another config", where=path, hint=hint, details=lines)
        if grown and finished and not begun:
            hint = "restore them, or give another --logdir or --seed for a new run"
            raise CheckpointError("it is finished, but its checkpoints are gone", where=path, hint=hint)
        if record.summary is not None and not grown:
            return cls(path, "finished", record.summary, lock)
        resumed = [*record.resumed, {**origin, "changed": difference(saved, requested)}]
        written = {"config": {**record.config, **grown}, "created": record.created, "resumed": resumed}
        opened = cls(path, "resumable", None, lock)
        if grown:
            opened._grown = written
        else:
            write_json(path / "config.json", written)
        return opened

    def grow(self) -> None:
        """Makes the larger values that the run was opened with (`growing`) its own, and a finished run unfinished.

        Call it once the run has gone beyond its old end. Until then nothing on disk is changed: the larger value may
        be a mistake, or the session may fail to begin.
        """
        if self._grown is None:
            return
        with disk_errors(self.path, "let the run grow"):
            # In this order: otherwise a kill in between leaves the longer run finished, with the shorter one's score.
            (self.path / "finished.json").unlink(missing_ok=True)
            write_json(self.path / "config.json", self._grown)
        self._grown = None

    def mark_finished(self, summary: Mapping[str, Any]) -> None:
        """Write finished.json: from now on this run is skipped. summary: JSON-able."""
        self.grow()
        self.summary = plain(dict(summary), "summary")
        with disk_errors(self.path, "mark the run finished"):
            write_json(self.path / "finished.json", {"summary": self.summary, "time": _now()})

    def note_backends(self, how: Mapping[str, Any]) -> list[str]:
        """Write backends.json; returns the `difference` from the last session. how: JSON-able."""
        path = self.path / "backends.json"
        with disk_errors(path, "write the file"):
            try:
                before = _read_json(path)
            except (FileNotFoundError, ValueError):
                before = {}
            write_json(path, plain(dict(how), "how"))
        return difference({name: before.get(name, value) for name, value in how.items()}, how)

    def discard_unbegun(self) -> None:
        """Removes the directory if `open` made it and the run has written nothing of its own into it since."""
        if not self._made:
            return
        # Renamed first: whoever begins the run now makes a new one.
        aside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            self.path.rename(aside)
            if not {path.name for path in aside.rglob("*") if not path.is_dir()} <= OPENING:
                aside.rename(self.path)
                return
            shutil.rmtree(aside)
            for folder in self._made[1:]:
                folder.rmdir()  # fails if it holds another run

    def close(self) -> None:
        """Release the lock. Closing twice is allowed."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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
            about = _read_json(path / "config.json", config=dict, created=dict, resumed=list)
        except ValueError as error:
            raise damaged(path / "config.json", str(error)) from None
        finished = path / "finished.json"
        summary = _read_summary(finished) if finished.exists() else None
    return Record(path, about["config"], about["created"], about["resumed"], summary)


def chosen(path: str | Path) -> checkpoint.Checkpoint:
    """The newest checkpoint of the run in directory `path`, or the one whose file it is. Expands `~`, locks nothing.

    Raises: RunError: there is no run. ConfigError: it holds runs instead. CheckpointError: it has no checkpoint yet or
    none of that name, or what it has is damaged.
    """
    path = Path(path).expanduser()
    if path.suffix == checkpoint.SUFFIX:
        return checkpoint.load(path if path.parent.name else path.absolute())
    with disk_errors(path, "read the run"):
        below = [] if (path / "config.json").exists() else sorted(path.glob("**/config.json"))
    if below:
        hint = f"try {below[0].parent}"
        raise ConfigError(f"this is not a run, it holds {len(below)}", where=path, hint=hint)
    read(path)
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


def provenance() -> dict[str, Any]:
    """Where and with what a run is made: versions, commit, host, command line and UTC time."""
    return {
        "hdfast": hdfast.__version__,
        "commit": _commit(Path(hdfast.__file__).parent),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "command": sys.argv,
        "time": _now(),
    }


def _commit(package: Path) -> str | None:
    """The commit of `package`, "-dirty" appended when edited since; None when git does not track it."""
    track = ["ls-files", "--error-unmatch", "__init__.py"]
    name = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        for arguments in (track, name):
            git = ["git", "-C", str(package), *arguments]
            answer = subprocess.run(
                git, capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return answer


def _check_is_directory(path: Path) -> None:
    for part in (*reversed(path.parents), path):
        if part.exists() and not part.is_dir():
            raise RunError("this is a file, not a directory", where=part, hint="choose another --logdir")


def _lock(path: Path, warn: Callable[[str], None]) -> int:
    """A descriptor that holds the lock on `path` until it is closed or the process ends, however it ends."""
    descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 4096).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        hint = "wait for it, stop it, or choose another --logdir"
        raise RunError(f"this run is in use by {holder}", where=path, hint=hint) from None
    except OSError as error:
        warn(f"{path}: cannot lock ({error.strerror}); make sure that no other process uses this run")
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {_now()}\n".encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def damaged(path: Path, why: str, *, hint: str = "restore it or remove the run's directory") -> RunError:
    """The error to raise about a damaged file of a run."""
    return RunError(f"the file is damaged ({why})", where=path, hint=hint)


def _read_json(path: Path, **kinds: type) -> dict[str, Any]:
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
        summary = _read_json(path, summary=dict)["summary"]
        for name, value in {"score": None, **summary}.items():
            if name in ("score", "success") and not is_number(value):
                raise ValueError(f"{name} is {value!r:.50}, expected a number")
    except ValueError as error:
        raise damaged(path, str(error), hint="remove it, and the run's command writes it anew") from None
    return summary


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def filled(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The nested `config` with the fields of `defaults` that it lacks."""
    whole = {**defaults, **config}
    for name, default in defaults.items():
        if isinstance(default, Mapping) and isinstance(whole[name], Mapping):
            whole[name] = filled(whole[name], default)
    return whole


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    fields = []
    for name, value in config.items():
        nested = isinstance(value, Mapping) and value
        fields += _flat(value, f"{prefix}{name}.") if nested else [(prefix + name, value)]
    return fields


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
