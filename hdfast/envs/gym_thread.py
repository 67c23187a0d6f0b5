"""The thread that makes, steps and closes environments of gymnasium, and may hang in one for ever."""

import math
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any

GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.2


class GymThread:
    """Runs calls one after another on one thread: OpenGL contexts belong to the thread that made them.

    A call that never returns holds up neither the caller nor the end of the process.

    stop: called while waiting for an answer; raises when nobody wants it any more.
    """

    def __init__(self, stop: Callable[[], object]) -> None:
        self._stop = stop
        self._left = False  # a caller gave up before the answer came
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="gymnasium", daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Queues a call, which begins when those before it have answered."""
        answer: Future[Any] = Future()
        self._calls.put((answer, call))
        return answer

    def wait(self, answer: Future[Any], *, last: bool = False) -> None:
        """Returns when a call has answered.

        last: the call closes the environments. If an earlier wait was given up (by Ctrl-C, or as below), this one lasts
            GRACE_SECONDS at most, and ends as soon as `stop` raises.

        Raises: what `stop` raises, if no answer comes within GRACE_SECONDS of its first raising; TimeoutError at the
            end of the GRACE_SECONDS of a `last` call.
        """
        hurried = last and self._left
        end = time.monotonic() + GRACE_SECONDS if hurried else math.inf
        try:
            while not futures.wait([answer], _POLL_SECONDS).done:
                try:
                    self._stop()
                except Exception:
                    end = min(end, time.monotonic() + GRACE_SECONDS)
                    if hurried or time.monotonic() >= end:
                        raise
                if time.monotonic() >= end:
                    raise TimeoutError
        except BaseException:
            self._left = True
            raise

    def end(self) -> None:
        """No more calls."""
        self._calls.put(None)

    def _run(self) -> None:
        while (job := self._calls.get()) is not None:
            answer, call = job
            try:
                result = call()
            except BaseException as error:
                answer.set_exception(error)
            else:
                answer.set_result(result)
            del job, answer, call  # an environment must not live on in them
