"""The append-only log of rows on disk, from which a killed run gets its replay back.

Axes: P bytes of a packed row (`rows.RowLayout`), K rows of a record; the files are described in `chunk`.

Rows are written in records of BLOCK_BYTES; `flush` makes everything so far durable. A checkpoint keeps a
`position` and gets back, by `load`, exactly the rows it was saved with, or a ReplayError. A kill loses what
came after the last flush; whatever follows a checkpoint's position, torn or whole, is cut off.
"""

import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np

from hdfast.replay.chunk import (
    ChunkReader,
    RecordWriter,
    ReplayError,
    chunk_header,
    chunk_path,
    chunks_of,
    first_row_of,
)
from hdfast.replay.rows import RowLayout
from hdfast.runtime import errors
from hdfast.runtime.errors import disk_errors
from hdfast.runtime.files import sync_directory
from hdfast.runtime.lock import refuse_held

BLOCK_BYTES = 1 << 20  # packed; 85 rows of one Atari environment
CHUNK_BYTES = 16 << 20  # on disk; deleted as a whole when no checkpoint can need it any more


class ReplayLog:
    """The log of one run in `directory`, which is created. Begin with `start` or with `load`.

    ring: how many rows before a position `load` must find.
    positions: how many of the newest positions must stay loadable; rows that none of them needs are deleted.

    Raises RunError if another process holds the run whose folder `directory` is: both would cut and write its rows.

    Every method raises RunError if the disk fails, DiskFullError if it is full. After a failed write nothing is
    lost: the rows wait in memory for the next `append` or `flush`. After a failed fsync the kernel may have
    dropped them, so every later `flush` fails too, with ReplayError, and no checkpoint can come to rely on them.
    """

    def __init__(self, directory: Path, layout: RowLayout, ring: int, positions: int) -> None:
        self.directory = Path(directory)
        self._layout, self._ring = layout, ring
        self._record = RecordWriter(layout)
        self._rows = 0  # in sealed records, whether written or not
        self._crc = 0  # of the last sealed record
        self._chunk: Path | None = None  # where sealed records go; None: the next one begins a chunk
        self._chunk_nbytes = 0
        self._unwritten: deque[tuple[Path, bytes]] = deque()
        self._file: int | None = None  # descriptor of _file_path
        self._file_path: Path | None = None
        self._file_nbytes = 0
        self._synced = True
        self._sync_failed = False
        self._positions: deque[int] = deque(maxlen=positions)
        hint = "hdfast.replay.episodes reads its rows, and changes nothing"
        refuse_held(self.directory.absolute().parent, hint=hint)
        with disk_errors(self.directory, "create the replay"):
            self.directory.mkdir(parents=True, exist_ok=True)
            sync_directory(self.directory.parent)

    def start(self) -> None:
        """Begin at row 0. Deletes the rows of an earlier attempt, which are useless without a checkpoint."""
        if chunks := chunks_of(self.directory):
            errors.warn(f"{self.directory}: deleting rows that no checkpoint was loaded for")
            self._cut(chunks, None, 0)

    def append(self, packed: np.ndarray) -> None:
        """Append one packed row, uint8 (P,), which is copied. If this raises, it has been appended."""
        self._record.add(packed)
        if self._record.nbytes >= BLOCK_BYTES:
            self._seal()
            self._write()

    def flush(self) -> None:
        """Make every row appended so far durable."""
        self._seal()
        self._write()
        self._sync()

    def position(self) -> tuple[int, int]:
        """Flush, and return what `load` takes: the number of rows and the checksum of the log so far."""
        self.flush()
        if not self._positions or self._positions[-1] != self._rows:
            self._positions.append(self._rows)
        if len(self._positions) == self._positions.maxlen:
            self._prune(self._positions[0] - self._ring)
        return self._rows, self._crc

    def load(self, rows: int, crc: int, store: Callable[[int, np.ndarray], None]) -> None:
        """Hand the rows that the ring held at position (rows, crc) to `store`, then cut off what follows it.

        `store(first_row, packed)` gets consecutive blocks, uint8 (K, P). Nothing is cut until all has been
        read. Raises ReplayError if a row is missing or damaged, or the position is from another log.
        """
        self._forget()
        oldest = max(rows - self._ring, 0)
        chunks = chunks_of(self.directory)
        needed = [path for path in chunks if first_row_of(path) < rows]
        while len(needed) > 1 and first_row_of(needed[1]) <= oldest:
            del needed[0]
        first = (needed or chunks)[0] if rows and chunks else None
        found, found_crc, end = first_row_of(first) if first else 0, None, 0
        if found > oldest:
            raise ReplayError(
                f"the replay begins at row {found}, row {oldest} is needed", where=self.directory
            )
        for path in needed:
            with disk_errors(path, "read the replay"), path.open("rb") as file:
                reader = ChunkReader(path, file, self._layout, found, found_crc)
                while reader.row < rows and (packed := reader.read()) is not None:
                    first_row = reader.row - len(packed)
                    skip = max(oldest - first_row, 0)
                    if skip < len(packed):
                        store(first_row + skip, packed[skip:])
                found, found_crc, end = reader.row, reader.crc, file.tell()
        if found < rows:
            raise ReplayError(
                f"the replay ends at row {found}, the checkpoint at {rows}", where=self.directory
            )
        if found > rows or (rows and found_crc != crc):
            raise ReplayError("not the replay that this checkpoint was saved with", where=self.directory)
        self._cut(chunks, needed[-1] if needed else None, end)
        self._rows, self._crc = rows, crc
        self._positions.clear()
        self._positions.append(rows)

    def close(self) -> None:
        """Flush and close the file."""
        try:
            self.flush()
        finally:
            self._forget()

    def _forget(self) -> None:
        """Close the file and drop what was not written to it; the next record begins a chunk."""
        if self._file is not None:
            os.close(self._file)
        self._file = self._file_path = self._chunk = None
        self._synced = True
        self._unwritten.clear()
        self._record.begin_chunk()

    def _seal(self) -> None:
        """End the record that is being filled and queue it for `_write`."""
        if self._record.rows == 0:
            return
        first_row, before = self._rows, self._crc
        self._rows += self._record.rows
        data, self._crc = self._record.finish(before)
        if self._chunk is None:
            self._chunk = chunk_path(self.directory, first_row)
            self._chunk_nbytes = 0
            data = chunk_header(self._layout, first_row, before) + data
        self._unwritten.append((self._chunk, data))
        self._chunk_nbytes += len(data)
        if self._chunk_nbytes >= CHUNK_BYTES:
            self._chunk = None
            self._record.begin_chunk()

    def _write(self) -> None:
        while self._unwritten:
            path, data = self._unwritten[0]
            if path != self._file_path:
                self._open(path)
            assert self._file is not None
            self._synced = False
            with disk_errors(path, "write the replay"):
                try:
                    _write_at(self._file, data, self._file_nbytes)
                except OSError:
                    with suppress(OSError):  # otherwise the next try overwrites the tail, or load cuts it
                        os.ftruncate(self._file, self._file_nbytes)
                    raise
            self._file_nbytes += len(data)
            self._unwritten.popleft()

    def _open(self, path: Path) -> None:
        self._sync()
        with disk_errors(path, "create the replay"):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        if self._file is not None:
            os.close(self._file)
        self._file, self._file_path, self._file_nbytes = file, path, 0

    def _sync(self) -> None:
        if self._sync_failed:
            raise ReplayError("the disk failed before, rows of the replay may be lost", where=self.directory)
        if self._synced:
            return
        assert self._file is not None
        assert self._file_path is not None
        self._sync_failed = True
        with disk_errors(self._file_path, "write the replay"):
            os.fsync(self._file)
            sync_directory(self.directory)
        self._sync_failed = False
        self._synced = True

    def _prune(self, needed: int) -> None:
        """Delete the chunks that end before row `needed`, oldest first."""
        for path, following in pairwise(chunks_of(self.directory)):
            if first_row_of(following) <= needed:
                with disk_errors(path, "delete the replay"):
                    path.unlink()

    def _cut(self, chunks: list[Path], last: Path | None, end: int) -> None:
        """Delete the chunks after `last`, newest first so that no gap arises, and its bytes from `end` on."""
        for path in reversed(chunks):
            if last is None or path > last:
                with disk_errors(path, "delete the replay"):
                    path.unlink()
        if last is not None:
            with disk_errors(last, "write the replay"), last.open("r+b") as file:
                file.truncate(end)
                os.fsync(file.fileno())
        with disk_errors(self.directory, "write the replay"):
            sync_directory(self.directory)


def _write_at(file: int, data: bytes, offset: int) -> None:
    """Write all of data, going on after a write that a signal or a full disk cut short."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(file, rest, offset)
        rest, offset = rest[written:], offset + written
