"""SIGINT, SIGTERM and SIGHUP as a request to stop at the next step, instead of an exception in the middle of one."""

import signal
from types import FrameType, TracebackType
from typing import Self

from hdfast.runtime.errors import Interrupted


class StopRequest:
    """While open, remembers the first SIGINT, SIGTERM or SIGHUP; a second one stops the process at once.

    SIGHUP, of a terminal that closes, comes from the kernel and again from the shell: more of them change nothing.
    Where it is ignored (`nohup`) it stays ignored.

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
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore(*self._before)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum = signum
            self._restore(signal.SIGINT, signal.SIGTERM)

    def _restore(self, *signums: int) -> None:
        for signum in signums:
            if signum in self._before:
                signal.signal(signum, self._before.pop(signum))
