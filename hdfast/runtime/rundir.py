"""The directory of one run, `<logdir>/<suite>/<task>/seed<k>/`: its lock, its config, whether it is finished.

config.json: {"config": as first resolved, "created": provenance, "resumed": [provenance + "changed", ...]}.
finished.json: {"summary": {"score": number, ...}, "time": ...}, written when the run is done.
backends.json: how the last session computed.
"""

import contextlib
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

import hdfast
from hdfast.runtime.errors import CheckpointError, ConfigError, RunError, disk_errors
from hdfast.runtime.files import filled, plain, utc, write_json
from hdfast.runtime.lock import hold, release
from hdfast.runtime.record import difference, has_begun, path_of, read, read_json, refused

OPENING = {"config.json", "backends.json", "lock"}  # files that exist before a run begins
FOLDERS = ("checkpoints", "replay", "tensorboard", "videos")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class RunDir:
    """A run's directory, held by this process until `close`; a context manager.

    path: the directory. checkpoints, replay: its folders.
    summary: what `mark_finished` was given, None before that.
    """

    def __init__(self, path: Path, summary: dict[str, Any] | None, lock: int) -> None:
        self.path, self.summary, self._lock = path, summary, lock
        self._made: list[Path] = []  # folders that `open` made, the run's own first
        self._grown: dict[str, Any] | None = None  # what config.json is to hold once the run has grown
        self.checkpoints, self.replay = path / "checkpoints", path / "replay"

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
            lock = hold(path)
            try:
                origin = {**provenance(), "device": plain(dict(device or {}), "device")}
                opened = cls._open_locked(path, requested, ignore, growing, defaults or {}, origin, lock)
                opened._made = made
                return opened
            except BaseException:
                release(lock)
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
        grown = {name: requested[name] for name in growing if requested[name] > saved[name]}
        lines = refused(saved, requested, finished, ignore, growing)
        # Until its first checkpoint a run has learnt nothing, and its config may still change.
        if record is None or (lines and not begun and not finished):
            write_json(path / "config.json", {"config": requested, "created": origin, "resumed": []})
            return cls(path, None, lock)
        if lines:
            hint = (
                f"give the saved values, as --config {path} does, or another --logdir or --seed for a new run"
            )
            raise ConfigError("this run has another config", where=path, hint=hint, details=lines)
        if grown and finished and not begun:
            hint = "restore them, or give another --logdir or --seed for a new run"
            raise CheckpointError("it is finished, but its checkpoints are gone", where=path, hint=hint)
        if record.summary is not None and not grown:
            return cls(path, record.summary, lock)
        resumed = [*record.resumed, {**origin, "changed": difference(saved, requested, {"seeds"})}]
        written = {"config": {**record.config, **grown}, "created": record.created, "resumed": resumed}
        opened = cls(path, None, lock)
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
            write_json(self.path / "finished.json", {"summary": self.summary, "time": utc()})

    def note_backends(self, how: Mapping[str, Any]) -> list[str]:
        """Write backends.json; returns the `difference` from the last session. how: JSON-able."""
        path = self.path / "backends.json"
        with disk_errors(path, "write the file"):
            try:
                before = read_json(path)
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
            release(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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
        "time": utc(),
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
