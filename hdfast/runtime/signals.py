"""SIGINT and SIGTERM as a request to stop at the next step, instead of an exception in the middle of one."""

import signal
from types import FrameType, TracebackType
from typing import Self

from hdfast.runtime.errors import Interrupted


class StopRequest:
    """While open, remembers the first SIGINT or SIGTERM; a second one stops the process at once.

    A context manager, for the main thread: signal handlers can be set nowhere else.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, object] = {}

    def __bool__(self) -> bool:
        return self.signum is not None

    def check(self) -> None:
        """Raises Interrupted if a signal has come."""
        if self.signum is not None:
            raise Interrupted(self.signum)

    def __enter__(self) -> Self:
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before.clear()
