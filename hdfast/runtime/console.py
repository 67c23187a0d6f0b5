"""rich's console on an output that may be absent, go away during a run, or lack a character."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from rich import console
from rich.text import Text

from hdfast.runtime.errors import OutputFullError, writing_output
from hdfast.runtime.output import encodable


def say(text: str) -> None:
    """A line of a run that has no progress line yet."""
    stream = _Lasting(sys.stdout)
    stream.write(text + "\n")
    stream.flush()


class Console(console.Console):
    """A console whose output may lose its reader without harm to a run.

    A pipe that is closed (`... | head`, `... | tee` after Ctrl-C) raises BrokenPipeError once, a file on a full disk
    OutputFullError; later output is dropped.
    A closed terminal raises nothing: SIGHUP reports it to those that do not ignore it.
    Characters that the output's encoding lacks become ASCII, in a str before it is laid out.

    stream: where to write, stdout if None; nothing is written if that is closed.
    """

    def __init__(self, stream: TextIO | None = None, **options: Any) -> None:
        super().__init__(file=_Lasting(sys.stdout if stream is None else stream), **options)  # type: ignore[arg-type]

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(encodable(text, self.encoding), **options)

    def on_broken_pipe(self) -> None:
        """Raises BrokenPipeError, where rich would exit with code 1."""
        self.quiet = True
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class _Nowhere(io.TextIOBase):
    """Stands for a stream that is closed."""

    def write(self, text: str) -> int:
        return len(text)


class _Lasting:
    """A text stream that drops what a closed terminal does not take, or everything if there is no stream."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = _Nowhere() if stream is None else stream

    def write(self, text: str) -> None:
        with self._until_full():
            self._stream.write(encodable(text, getattr(self._stream, "encoding", None) or "utf-8"))

    def flush(self) -> None:
        with self._until_full():
            self._stream.flush()

    @contextlib.contextmanager
    def _until_full(self) -> Iterator[None]:
        try:
            with writing_output():
                yield
        except OutputFullError:
            self._stream = _Nowhere()
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
