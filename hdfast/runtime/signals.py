"""SIGINT, SIGTERM and SIGHUP as a request to stop at the next step, instead of an exception in the middle of one."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from hdfast.runtime.errors import Interrupted, OutputFullError

# Handlers by signal, the last to be set first in the list: what forked processes get, such as an environment's own.
# terminate() is to end them, and the terminal's signals are not.
in_forked: list[dict[int, Any]] = []
_forking = threading.local()


def _before_fork() -> None:
    if in_forked:  # a signal that comes before the handlers are set would be forgotten
        _forking.mask = signal.pthread_sigmask(
            signal.SIG_BLOCK, [signum for each in in_forked for signum in each]
        )


def _after_fork() -> None:
    if (mask := vars(_forking).pop("mask", None)) is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _in_forked() -> None:
    while in_forked:
        for signum, handler in in_forked.pop().items():
            signal.signal(signum, handler)
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_forked)


class StopRequest:
    """While open, remembers the first SIGINT, SIGTERM or SIGHUP; a second one stops the process at once.

    When a terminal closes, SIGHUP comes from the kernel and again from the shell: repeats change nothing.
    If it is ignored (`nohup`), it stays ignored.

    A context manager. In any thread but the main one, where handlers cannot be set, it notices no signal.

    say: gets a line about what the first signal does and a second one would do, at any point of the main thread.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._at_once = False
        self.say: Callable[[str], object] = lambda text: None
        self._before: dict[int, Any] = {}  # handlers, by signal
        self._in_forked: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.signum is not None

    def check(self) -> None:
        """Raises Interrupted if a signal has come, KeyboardInterrupt after a second SIGINT."""
        if self._at_once:
            raise KeyboardInterrupt
        if self.signum is not None:
            raise Interrupted(self.signum)

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                before = self._before[signum] = signal.signal(signum, self._handle)
                self._in_forked[signum] = before if signum == signal.SIGTERM else signal.SIG_IGN
        in_forked.append(self._in_forked)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        in_forked[:] = [each for each in in_forked if each is not self._in_forked]
        for signum in self._before:
            signal.signal(signum, self._before[signum])

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum = signum
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if signum != signal.SIGHUP:  # its terminal is gone
                name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
                # It may interrupt other output, or find no reader: neither is an error of the run.
                with contextlib.suppress(OSError, RuntimeError, OutputFullError):
                    self.say(f"stopping with a checkpoint; a second {name} stops it at once, without one")
        elif signum == signal.SIGINT:
            self._at_once = True
            raise KeyboardInterrupt
