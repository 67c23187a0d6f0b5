"""Errors a user can fix, each with one clear line and one exit code; `main` wraps every door.

Exit codes: 0 done, 1 the run cannot go on, 2 the request is wrong, 3 no usable checkpoint, 4 no room on disk,
5 losses are not finite, 6 a library is missing, 128 + n stopped by signal n (129 SIGHUP, 130 SIGINT, 143 SIGTERM).
"""

import contextlib
import difflib
import errno
import io
import logging
import os
import re
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn, TextIO

from hdfast.runtime import output

# What hdfast is installed with: name in an import -> name that pip knows.
PACKAGES = {"PIL": "pillow"} | {
    name: name
    for name in (
        "envpool",
        "gymnasium",
        "matplotlib",
        "numpy",
        "rich",
        "safetensors",
        "tensorboard",
        "torch",
        "tyro",
    )
}
_MAKE_ROOM = "make room and run it again"
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
            raise OutputFullError(what, hint=_MAKE_ROOM) from error
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
            raise DiskFullError(f"cannot {doing}: {reason}", where=path, hint=_MAKE_ROOM) from error
        raise RunError(f"cannot {doing}: {reason}", where=path, hint=hint) from error


def missing_package(error: ImportError) -> MissingLibraryError | None:
    """The error for one of PACKAGES that is missing or cannot be imported; None for any other import."""
    wanted = (error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and wanted in PACKAGES:
        return MissingLibraryError(f"hdfast needs {wanted}", hint=f"pip install {PACKAGES[wanted]}")
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    importing = [name.partition(".")[0] for name in modules if not name.startswith("importlib")]
    for package in (wanted, *importing[-1:]):
        if package in PACKAGES:
            again = "" if isinstance(error, ModuleNotFoundError) else "--force-reinstall "
            hint = f"pip install {again}{PACKAGES[package]}"
            return MissingLibraryError(f"{package} does not load: {error}", hint=hint)
    return None


def _memory(error: BaseException) -> RunError | None:
    """The error for too little memory, of this machine or of its GPU; None for any other error."""
    text = str(error)
    if not (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's
        or (isinstance(error, RuntimeError) and "can't allocate memory" in text)
    ):
        return None
    wanted = re.search(r"[Tt]ried to allocate (.*?)\.(?: |$)", text)
    what = f"there is not enough memory{f' for {wanted[1]}' if wanted else ''}"
    hint = "a smaller --size, --replay.batch, --replay.length or --replay.capacity takes less"
    return RunError(what, hint=hint)


def begin() -> None:
    """From now on, a missing package and Ctrl-C end the process as in `main`, even before `main` runs."""
    output.prepare()

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, ImportError) and (told := missing_package(error)) is not None:
            sys.exit(_report(told))  # allowed in an excepthook: it sets the exit code
        if isinstance(error, KeyboardInterrupt):
            sys.exit(_report(Interrupted(signal.SIGINT, hint="")))
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = tell


def tell_warnings() -> None:
    """From now on, a Python warning of this process is one line, without location and colours."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        text = re.sub(r"\x1b\[\d*m", "", str(message))
        warn(re.sub(r"^WARN: ", "", text))  # gymnasium's

    warnings.showwarning = show


class _Warnings(logging.Handler):
    """Reports log records like all other warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        warn(record.getMessage())


def main(door: Callable[[], int | None]) -> NoReturn:
    """Run a door and exit with its return value (None is 0), or after one line with its HdfastError's code.

    A full disk (also under a file that takes the output), too little memory, a missing package: one line wherever
    they occur. Ctrl-C gives 130, a closed pipe (`... | head`) silently with 141; a closed terminal changes nothing.
    Every other exception keeps its traceback. Python's warnings, and log records of level WARNING and above, of any
    package, are a line each.
    What stdout and stderr cannot take is no error, see `output.prepare`.
    """
    output.prepare()
    tell_warnings()
    logging.basicConfig(handlers=[_Warnings()], level=logging.WARNING)
    try:
        code = _code_of(door)
        with contextlib.suppress(OutputFullError), writing_output():  # already reported
            sys.stdout.flush()
    except BrokenPipeError:
        if not _is_broken(sys.stdout):
            raise
        code = 128 + signal.SIGPIPE
    for stream in (sys.stdout, sys.stderr):
        if not _is_flushed(stream) or _is_broken(stream):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # so that the flush at exit works
    sys.exit(code)


def _code_of(door: Callable[[], int | None]) -> int | str:
    code: int | str
    told: HdfastError | None
    try:
        try:
            code = door() or 0
        except SystemExit as ended:  # from --help
            code = ended.code or 0
        with writing_output():
            sys.stdout.flush()
        return code
    except HdfastError as error:
        return _report(error)
    except ImportError as error:
        if (told := missing_package(error)) is None:
            raise
        return _report(told)
    except KeyboardInterrupt:
        return _report(Interrupted(signal.SIGINT, hint=""))
    except (MemoryError, RuntimeError) as error:
        if (told := _memory(error)) is None:
            raise
        return _report(told)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        return _report(DiskFullError(f"{error.strerror}", where=error.filename or "", hint=_MAKE_ROOM))


def _report(error: HdfastError) -> int:
    with contextlib.suppress(BrokenPipeError, OutputFullError), writing_output():
        sys.stdout.flush()  # so that what came before the error is read before it
    with contextlib.suppress(BrokenPipeError, OutputFullError), writing_output():
        sys.stderr.write("".join([f"error: {error}\n", *(f"  {line}\n" for line in error.details)]))
        sys.stderr.flush()
    return error.exit_code


def _is_flushed(stream: TextIO) -> bool:
    try:
        stream.flush()
    except OSError:
        return False
    return True


def _is_broken(stream: TextIO) -> bool:
    """Whether a stream is a pipe that nobody reads any more, or a closed terminal."""
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)
    except io.UnsupportedOperation:  # a stream in memory
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))
