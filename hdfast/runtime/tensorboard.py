"""TensorBoard event files: scalars by agent step, and animated GIFs as image summaries.

The calling thread writes one record per log step, so that a full disk is noticed where it can be reported.
"""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hdfast.runtime.errors import MissingLibraryError, disk_errors
from hdfast.runtime.files import write_all

_PREFIX = "events.out.tfevents."


class TensorBoard:
    """A new event file in `directory`.

    resumed_at: agent steps of the checkpoint the run goes on from; TensorBoard then hides what earlier files
        of the directory hold beyond it (all of it when None).
    again: it also hides what they hold of `resumed_at` itself, because the caller writes that again.
    settings: what TensorBoard's HParams tab compares runs by, of any values; all but numbers are shown as text.

    Raises: MissingLibraryError, DiskFullError, RunError.
    """

    def __init__(
        self,
        directory: Path,
        *,
        resumed_at: int | None = None,
        again: bool = False,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.plugins.hparams.summary_v2 import hparams_pb
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            hint = "pip install tensorboard, or --log.no-tensorboard"
            raise MissingLibraryError(f"cannot import tensorboard: {error}", hint=hint) from error
        self._event, self._summary = event_pb2, summary_pb2
        with disk_errors(directory, "write TensorBoard files"):
            directory.mkdir(parents=True, exist_ok=True)
            earlier = any(directory.iterdir())
            name = f"{_PREFIX}{_next_number(directory):010d}.{socket.gethostname()}.{os.getpid()}"
            self.path = directory / name
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._records = RecordWriter(_Whole(self._file))
        try:
            self._write(file_version="brain.Event:2")
            if earlier:
                first_step = 0 if resumed_at is None else resumed_at + (not again)
                self._write(first_step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
            if settings:
                shown = {k: v if isinstance(v, int | float) else str(v) for k, v in settings.items()}
                self._write(resumed_at or 0, summary=hparams_pb(shown))
        except BaseException:
            self.close()
            raise

    def scalars(self, agent_steps: int, values: Mapping[str, float]) -> None:
        """One point of each curve, at x = agent_steps."""
        points = [self._summary.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(agent_steps, summary=self._summary.Summary(value=points))

    def gif(self, agent_steps: int, tag: str, gif: bytes) -> None:
        """An animated GIF (bytes of the file) among the images."""
        width, height = (int.from_bytes(gif[at : at + 2], "little") for at in (6, 8))
        image = self._summary.Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=gif
        )
        self._write(agent_steps, summary=self._summary.Summary(value=[{"tag": tag, "image": image}]))

    def sync(self) -> None:
        """Make what was written durable."""
        with disk_errors(self.path, "write TensorBoard files"):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file. Closing twice is allowed."""
        self._file.close()

    def _write(self, agent_steps: int = 0, **content: Any) -> None:
        event = self._event.Event(wall_time=time.time(), step=agent_steps, **content)
        with disk_errors(self.path, "write TensorBoard files"):
            self._records.write(event.SerializeToString())


def _next_number(directory: Path) -> int:
    """The time in seconds, or more if earlier files have that: files are read by name, and clocks may be set back."""
    numbers = (path.name.removeprefix(_PREFIX).partition(".")[0] for path in directory.glob(f"{_PREFIX}*"))
    return max([int(time.time()), *(int(number) + 1 for number in numbers if number.isdecimal())])


class _Whole:
    """An unbuffered file whose write takes all it is given."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: bytes) -> None:
        write_all(self._file, data)
