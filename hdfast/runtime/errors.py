"""Errors a user can fix, each with one clear line and one exit code.

Exit codes: 0 done, 1 the run cannot go on, 2 the request is wrong, 3 no usable checkpoint, 4 no room on disk,
5 losses are not finite, 6 a library is missing, 128 + n stopped by signal n (129 SIGHUP, 130 SIGINT, 143 SIGTERM).
"""

import contextlib
import difflib
import errno
import re
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

MAKE_ROOM = "make room and run it again"
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class HdfastError(Exception):
    """Something the user can fix. `str(error)` is one line: "<where>: <what>; <hint>".

    what: what is wrong, with the value that was got.
    where: the file, field or environment it is about.
    hint: the nearest right value, or the command that fixes it.
    details: further lines, printed indented below the first (the fields in which two configs differ).
    """

    exit_code = 1

    def __init__(self, what: str, *, where: object = "", hint: str = "", details: Sequence[str] = ()) -> None:
        super().__init__(what)
        self.what, self.where, self.details = what, str(where), tuple(details)
        self.hint = hint.removeprefix("; ")
        for line in self.details:
            self.add_note(f"  {line}")  # below the error in a traceback

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        text = f"{text}; {self.hint}" if self.hint else text
        return " ".join(text.split())


class ConfigError(HdfastError):
    """The request itself is wrong: a wrong name or value, or a missing device."""

    exit_code = 2


class RunError(HdfastError):
    """The run cannot start or go on: its directory is unusable or in use by another process."""


class EnvError(RunError):
    """An environment raises, or returns what does not fit its spaces."""


class CheckpointError(HdfastError):
    """There is no usable checkpoint: none yet, a damaged one, or one that does not fit."""

    exit_code = 3


class DiskFullError(HdfastError):
    """No room to write; what was on disk before is intact."""

    exit_code = 4


class OutputFullError(DiskFullError):
    """No room for the output of the process in the file that takes it."""


class CallbackError(HdfastError):
    """What a caller's own function raised."""


class NonFiniteError(HdfastError):
    """Losses stayed NaN or infinite beyond the limit."""

    exit_code = 5


class MissingLibraryError(HdfastError):
    """A Python package or system library is missing; the hint names the command that installs it."""

    exit_code = 6


class Interrupted(HdfastError):
    """The run was asked to stop by a signal and saved itself. Exit code 128 + signal number."""

    def __init__(self, signum: int, *, hint: str = "the same command resumes it") -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}", hint=hint)
        self.args = (signum,)  # pickle calls the class with these
        self.exit_code = 128 + signum


def suggest(name: str, choices: Iterable[str]) -> str:
    """The end of a message on a wrong name: "; did you mean 'a' or 'b'?", or all choices when none is near.

    Append it directly to the message, `f"no task {name!r}{suggest(name, tasks)}"`, or into `hint=`.
    Case is ignored when comparing. Returns "" when there are no choices.
    """
    choices = list(dict.fromkeys(choices))
    folded = {choice.casefold(): choice for choice in reversed(choices)}
    near = [folded[key] for key in difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.6)]
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    if not choices:
        return ""
    shown = ", ".join(map(repr, choices[:12]))
    return f"; choose from {shown}" + (f" and {len(choices) - 12} more" if len(choices) > 12 else "")


def warn(text: str) -> None:
    """Print one warning line to stderr, if there is one."""
    if sys.stderr is None:
        return
    with writing_output():
        sys.stderr.write(f"warning: {' '.join(text.split())}\n")
        sys.stderr.flush()


@contextlib.contextmanager
def writing_output() -> Iterator[None]:
    """Ignores the EIO of a write to a closed terminal in the block: SIGHUP reports that, not an error.

    Raises: OutputFullError if the output goes into a file that the disk has no room for.
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            what = f"what this process says cannot be written: {error.strerror}"
            raise OutputFullError(what, hint=MAKE_ROOM) from error
        if error.errno != errno.EIO:
            raise


@contextlib.contextmanager
def disk_errors(path: str | Path, doing: str, *, hint: str = "") -> Iterator[None]:
    """Turn an OSError in the block into one clear line about `path`; `doing` reads like "write the log".

    Raises: DiskFullError when there is no room (device, quota or file size limit), else RunError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in NO_ROOM:
            raise DiskFullError(f"cannot {doing}: {reason}", where=path, hint=MAKE_ROOM) from error
        raise RunError(f"cannot {doing}: {reason}", where=path, hint=hint) from error


def tell_warnings() -> None:
    """From now on, a Python warning of this process is one line, without location and colours."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        text = re.sub(r"\x1b\[\d*m", "", str(message))
        warn(re.sub(r"^WARN: ", "", text))  # gymnasium's

    warnings.showwarning = show
