"""Starting processes that are timed, and taking turns with them; `turns` has their side."""

import contextlib
import json
import select
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hdfast.runtime.errors import RunError


class Worker:
    """A process that does an update whenever it is asked to; as a context manager it is ended at last.

    Args:
        name: its name in errors.
        command, cwd, env: how it is started; `settings` become its last argument, as JSON.
        limit_s: seconds that it may take to start, and for each answer.

    Raises:
        RunError: it cannot be started, ends (told with the last line of its output), or does not answer in time.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        settings: Mapping[str, Any],
        *,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        limit_s: float = 1800.0,
    ):
        self.name, self.limit_s = name, limit_s
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - until close
        try:
            self._process = subprocess.Popen(
                [*command, json.dumps(settings)],
                cwd=cwd,
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                bufsize=0,
            )
        except OSError as error:
            self._said.close()
            raise RunError(f"cannot start {command[0]}: {error.strerror}", where=name) from error
        try:
            self.about = self._answer()
        except BaseException:
            self.close(wait_s=0.0)
            raise

    def update(self) -> float:
        """Makes it do an update. Returns: the seconds it took."""
        with contextlib.suppress(BrokenPipeError):  # `_answer` finds out what has become of it
            self._process.stdin.write(b"update\n")
        return self._answer()["seconds"]

    def close(self, wait_s: float = 5.0) -> None:
        """Ends the process, by force if it has not ended by itself within `wait_s` seconds."""
        self._process.stdin.close()  # which ends its turns
        try:
            self._process.wait(wait_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._said.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self) -> dict[str, Any]:
        line, until = b"", time.monotonic() + self.limit_s
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise RunError(f"no answer within {self.limit_s:g} seconds", where=self.name)
            if not (more := self._process.stdout.read(1 << 16)):
                raise RunError(
                    f"ended with exit code {self._process.wait()}: {self._last()}", where=self.name
                )
            line += more
        return json.loads(line)

    def _last(self) -> str:
        self._said.seek(0)
        lines = [line for line in self._said.read().splitlines() if line.strip()]
        return lines[-1].strip() if lines else "no output"


def take_turns(workers: Sequence[Worker], rounds: int, warmups: int) -> list[list[float]]:
    """Seconds of `rounds` updates of every worker, one each per round; every other round is in reverse order."""
    times: list[list[float]] = [[] for _ in workers]
    for number in range(warmups + rounds):
        order = list(enumerate(workers))
        for i, worker in order if number % 2 == 0 else reversed(order):
            taken = worker.update()
            if number >= warmups:
                times[i].append(taken)
    return times
