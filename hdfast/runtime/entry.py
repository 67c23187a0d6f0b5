"""How a command begins and ends: `main` makes one line and an exit code of what goes wrong in it.

The exit codes are those of `hdfast.runtime.errors`.
"""

import contextlib
import errno
import io
import logging
import os
import re
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn, TextIO

from hdfast.runtime import output
from hdfast.runtime.errors import (
    MAKE_ROOM,
    NO_ROOM,
    DiskFullError,
    HdfastError,
    Interrupted,
    MissingLibraryError,
    OutputFullError,
    RunError,
    tell_warnings,
    warn,
    writing_output,
)

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


class _Warnings(logging.Handler):
    """Reports log records like all other warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        warn(record.getMessage())


def main(door: Callable[[], int | None]) -> NoReturn:
    """Run a door and exit with its return value (None is 0), or after one line with its HdfastError's code.

    A full disk (also under a file that takes the output), too little memory, too many open files, a missing package:
    one line wherever they occur. Ctrl-C gives 130, a closed pipe (`... | head`) silently with 141; a closed terminal
    changes nothing. Every other exception keeps its traceback. Python's warnings, and log records of level WARNING and
    above, of any package, are a line each.
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
        if error.errno == errno.EMFILE:
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            what = f"too many open files: this process may have {limit}"
            return _report(RunError(what, hint="`ulimit -n` allows more, and fewer --env.num-envs need less"))
        if error.errno not in NO_ROOM:
            raise
        return _report(DiskFullError(f"{error.strerror}", where=error.filename or "", hint=MAKE_ROOM))


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
