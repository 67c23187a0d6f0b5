"""rich's console on an output that may go away while a run goes on."""

import errno
import os
import sys
from typing import Any, TextIO

from rich import console

from hdfast.runtime.errors import closed_terminal


def say(text: str) -> None:
    """A line of a run that has no progress line yet."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Console(console.Console):
    """What is printed when nobody can read it any more does not harm a run.

    A pipe that is closed (`... | head`, `... | tee` after Ctrl-C) raises BrokenPipeError once, later output is dropped.
    Of a terminal that is closed nothing is said at all: SIGHUP tells it, to those that do not ignore it.

    stream: where to write, stdout if None.
    """

    def __init__(self, stream: TextIO | None = None, **options: Any) -> None:
        super().__init__(file=_Lasting(sys.stdout if stream is None else stream), **options)

    def on_broken_pipe(self) -> None:
        """Raises BrokenPipeError, where rich would exit with code 1."""
        self.quiet = True
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class _Lasting:
    """A text stream that drops what a closed terminal does not take."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with closed_terminal():
            self._stream.write(text)

    def flush(self) -> None:
        with closed_terminal():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
