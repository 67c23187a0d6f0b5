"""The files of the replay log: chunks of compressed, checksummed records of rows.

Axes: P bytes of a packed row (`rows.RowLayout`), K rows of a record.

A chunk is a header (magic, length, checksum, JSON with the layout of the rows) and then records; a record is
K consecutive rows: magic, sizes, checksum, payload. The payload is the zlib stream of the packed rows, each
XORed with the row before it in its chunk. The checksum of a record also covers the checksum before it, so
that the last one stands for the whole log.

Compression, measured on random play (64x64x3, one environment, records of 64 rows), bytes and us per row:

                 Pong       Breakout   Gopher     Alien      noise
    zlib 1       168, 23    230, 17    373, 27    749, 40    12292, 287
    XOR, zlib 1  153, 26    110, 23    330, 27    333, 28    12292, 290
    XOR, zlib 6  106, 39     64, 57    287, 74    268, 74    12292, 316

zstandard takes a fifth of the time, but that time is 2% of an Atari step, and it is one more dependency. With
several environments, XOR finds the previous frame even where zlib's window of 32 KiB does not reach it.
"""

import json
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hdfast.replay.rows import RowLayout
from hdfast.runtime.errors import RunError, disk_errors

VERSION = 1
CHUNK_MAGIC = b"hdfrows\n"
CHUNK_HEADER = struct.Struct("<8sII")  # magic, bytes of JSON, crc of the JSON
RECORD_MAGIC = b"HDFR"
RECORD_HEADER = struct.Struct("<4sII")  # magic, bytes of payload, rows; the crc follows
CRC = struct.Struct("<I")
_ANEW = "restore it from a copy, or begin another run from what this one has learnt, by --init-from"
_EARLIER = "go on with the earlier environment, or begin another run: another --logdir or --seed"


class ReplayError(RunError):
    """The log does not hold the rows that are needed, or may have lost some."""

    def __init__(
        self, what: str, *, where: object = "", hint: str = _ANEW, details: Sequence[str] = ()
    ) -> None:
        super().__init__(what, where=where, hint=hint, details=details)


def chunks_of(directory: Path) -> list[Path]:
    """The chunks in a directory, in order. Raises: RunError."""
    with disk_errors(directory, "read the replay"):
        return sorted(directory.glob("rows-" + "[0-9]" * 12 + ".log"))


def chunk_path(directory: Path, first_row: int) -> Path:
    """The file of the chunk that begins with a row."""
    return directory / f"rows-{first_row:012d}.log"


def first_row_of(path: Path) -> int:
    """The row that a chunk begins with, from its file's name."""
    return int(path.stem.removeprefix("rows-"))


def chunk_header(layout: RowLayout, first_row: int, crc: int) -> bytes:
    """The header of a chunk; crc: the checksum of the record before it."""
    fields = {"version": VERSION, "first_row": first_row, "crc": crc, "layout": layout.to_json()}
    text = json.dumps(fields).encode()
    return CHUNK_HEADER.pack(CHUNK_MAGIC, len(text), zlib.crc32(text)) + text


def read_header(path: Path, file: BinaryIO) -> dict[str, Any] | None:
    """The fields of a chunk's header, which `file` is behind then; None if it is torn. Raises ReplayError."""
    header = file.read(CHUNK_HEADER.size)
    if len(header) < CHUNK_HEADER.size:
        return None
    magic, nbytes, crc = CHUNK_HEADER.unpack(header)
    text = file.read(min(nbytes, os.fstat(file.fileno()).st_size))
    if magic == CHUNK_MAGIC and len(text) < nbytes:
        return None
    if magic != CHUNK_MAGIC or zlib.crc32(text) != crc:
        raise damaged(path, 0)
    fields = json.loads(text)
    if fields["version"] != VERSION:
        raise ReplayError(f"version {fields['version']}, this hdfast reads version {VERSION}", where=path)
    return fields


class RecordWriter:
    """Turns rows into records. The work is done row by row, so that no `add` is slow."""

    def __init__(self, layout: RowLayout) -> None:
        self.rows = 0  # in the record that is being filled
        self._last = np.zeros(layout.packed_nbytes, np.uint8)
        self._delta = np.zeros(layout.packed_nbytes, np.uint8)
        self._begin()

    @property
    def nbytes(self) -> int:
        """Bytes of the record that is being filled, uncompressed."""
        return self.rows * self._last.size

    def add(self, packed: np.ndarray) -> None:
        """Take one packed row, uint8 (P,), which is copied."""
        np.bitwise_xor(packed, self._last, out=self._delta)
        self._last[:] = packed
        self._pieces.append(self._zlib.compress(self._delta.data))
        self.rows += 1

    def finish(self, crc: int) -> tuple[bytes, int]:
        """The record and its checksum; crc: the checksum before it."""
        payload = b"".join([*self._pieces, self._zlib.flush()])
        header = RECORD_HEADER.pack(RECORD_MAGIC, len(payload), self.rows)
        crc = zlib.crc32(payload, zlib.crc32(header, crc))
        self._begin()
        return b"".join([header, CRC.pack(crc), payload]), crc

    def begin_chunk(self) -> None:
        """Forget the rows so far: the next one begins a new chunk."""
        self._last[:] = 0
        self._begin()

    def _begin(self) -> None:
        self.rows = 0
        self._zlib = zlib.compressobj(level=1, wbits=-zlib.MAX_WBITS)
        self._pieces: list[bytes] = []


class ChunkReader:
    """The records of one chunk, one after the other.

    row: the first row that is expected; crc: the checksum of the record before it, None if that is not known.
    Raises ReplayError if the chunk is damaged or holds something else.
    """

    def __init__(self, path: Path, file: BinaryIO, layout: RowLayout, row: int, crc: int | None) -> None:
        self._path, self._file = path, file
        self._nbytes = os.fstat(file.fileno()).st_size
        if (header := read_header(path, file)) is None:
            raise damaged(path, 0)
        if header["layout"] != layout.to_json():
            others = _others(header["layout"], layout.to_json())
            what = f"holds rows of another environment: {others}"
            raise ReplayError(what, where=path, hint=_EARLIER)
        if header["first_row"] != row or crc not in (None, header["crc"]):
            raise ReplayError("the replay is damaged before this chunk", where=path)
        self.row = row  # after the last one read
        self.crc: int = header["crc"]
        self._last = np.zeros(layout.packed_nbytes, np.uint8)

    def read(self) -> np.ndarray | None:
        """The next record's rows, uint8 (K, P); None at the end or at a torn record."""
        begin = self._file.tell()
        header, stored_crc = self._file.read(RECORD_HEADER.size), self._file.read(CRC.size)
        if len(stored_crc) < CRC.size:
            return None
        magic, nbytes, rows = RECORD_HEADER.unpack(header)
        if magic != RECORD_MAGIC:
            raise damaged(self._path, begin)
        within = self._file.tell() + nbytes <= self._nbytes
        payload = self._file.read(nbytes) if within else b""
        if len(payload) < nbytes:  # also if it was cut off while it was read
            return None
        crc = zlib.crc32(payload, zlib.crc32(header, self.crc))
        if stored_crc != CRC.pack(crc):
            raise damaged(self._path, begin)
        numbers = np.frombuffer(bytearray(zlib.decompress(payload, -zlib.MAX_WBITS)), np.uint8)
        packed = numbers.reshape(rows, self._last.size)
        for row in packed:
            row ^= self._last
            self._last = row
        self.row, self.crc = self.row + rows, crc
        return packed


def damaged(path: Path, byte: int) -> ReplayError:
    """The error to raise about a chunk."""
    return ReplayError(f"the replay is damaged at byte {byte}", where=path)


def _others(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """How two layouts differ, as `state float32 (3,), now float32 (4,)`; see `RowLayout.to_json`."""

    def parts(layout: Mapping[str, Any]) -> dict[str, str]:
        rows = {key: f"{np.dtype(dtype)} {tuple(shape)}" for key, (dtype, *shape) in layout["keys"].items()}
        return {"environments": str(layout["num_envs"]), **rows}

    before, now = parts(stored), parts(wanted)
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return "; ".join(f"{name} {before.get(name, 'absent')}, now {now.get(name, 'absent')}" for name in names)
