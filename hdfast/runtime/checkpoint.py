"""Checkpoints: a safetensors file each, written beside and renamed, checksummed, loaded without running code.

The checksum is BLAKE2b over the whole file, its own digits read as zeros: names, dtypes, shapes, bytes, meta.
Tensors are streamed to disk one at a time, so saving needs host memory for the largest of them only.
"""

import contextlib
import hashlib
import json
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch

from hdfast.runtime import errors
from hdfast.runtime.errors import CheckpointError, RunError, disk_errors
from hdfast.runtime.files import PARTIAL, replacing

SUFFIX = ".safetensors"
_NAME = re.compile(r"(\d+)" + re.escape(SUFFIX))
_DIGITS = 64
_LENGTH = struct.Struct("<Q")  # length of the JSON header, with which a safetensors file begins
_PREFIX = b'{"__metadata__":{"checksum":"'
_CHECKSUM_AT = _LENGTH.size + len(_PREFIX)
_CHUNK_BYTES = 1 << 22

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Checkpoint:
    """What `load_latest` or `load` found."""

    tensors: dict[str, torch.Tensor]
    meta: dict[str, Any]
    number: int
    path: Path

    @property
    def run(self) -> Path:
        """The directory of the run whose checkpoints/ it is in."""
        return self.path.parent.parent

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors whose names begin with the prefix, without it."""
        return {k.removeprefix(prefix): t for k, t in self.tensors.items() if k.startswith(prefix)}


def save(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    meta: Mapping[str, Any],
    *,
    number: int,
    keep: int = 2,
) -> Path:
    """Write checkpoint `number` and remove all but the `keep` newest; returns its path once it is durable.

    tensors: any shape, device and memory format; they come back contiguous, with equal bits.
    meta: JSON-able (a tuple comes back as a list).
    number: grows with the run, e.g. agent steps. A file with a higher number could not be loaded, or the run
        would have gone on from it: it is removed too.

    One process at a time may save into a directory (RunDir's lock sees to it).

    Raises: DiskFullError, RunError (unwritable), TypeError (a tensor or meta that has no stored form); after each of
    these the earlier checkpoints are intact.
    """
    path = directory / f"{number:010d}{SUFFIX}"
    header, ordered = _header(tensors, meta)
    with disk_errors(path, "write the checkpoint"):
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(f"*{SUFFIX}{PARTIAL}"):
            leftover.unlink()
        with replacing(path) as file:
            checksum = hashlib.blake2b(header, digest_size=_DIGITS // 2)
            file.write(header)
            for tensor in ordered:
                data = _bytes_of(tensor)
                checksum.update(data)
                file.write(data)
            file.seek(_CHECKSUM_AT)
            file.write(checksum.hexdigest().encode())
        found = numbered(directory)
        stale = [n for n in found if n > number] + [n for n in found if n <= number][keep:]
        for old in stale:
            found[old].unlink()
    return path


def load_latest(directory: Path, *, warn: Callable[[str], None] = errors.warn) -> Checkpoint | None:
    """The newest checkpoint in `directory` that is whole, on the CPU; None when there is none at all.

    Each damaged one is reported to `warn` and skipped for the one before. Only reads: safe beside a writer, which may
    remove a file that is about to be read once there are newer ones.

    Raises: CheckpointError when there are checkpoints and all are damaged.
    """
    damaged: dict[Path, str] = {}
    while rest := {n: path for n, path in numbered(directory).items() if path not in damaged}:
        number, path = next(iter(rest.items()))
        try:
            return _load(path, number)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            if isinstance(error, FileNotFoundError) and not os.path.lexists(path):
                continue  # look again at those that exist now
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError | IsADirectoryError):
                # It may be readable the next time; going on from the one before would cut off its rows of replay.
                raise RunError(f"cannot read the checkpoint: {error.strerror}", where=path) from error
            damaged[path] = f"{path.name}: {error}"
            before = "; trying the one before" if len(rest) > 1 else ""
            warn(f"{path}: checkpoint is damaged ({error}){before}")
            continue
    if damaged:
        hint = "restore one from a copy, or remove the run's directory to start anew"
        raise CheckpointError(
            "no checkpoint can be loaded", where=directory, hint=hint, details=list(damaged.values())
        )
    return None


def load(path: Path) -> Checkpoint:
    """The checkpoint in the file `path`, on the CPU.

    Raises: CheckpointError where it is damaged, and where there is none, with those that there are.
    """
    match = _NAME.fullmatch(path.name)
    try:
        return _load(path, int(match[1]) if match else 0)
    except FileNotFoundError:
        there = [other.name for other in numbered(path.parent).values()]
        hint = f"there are {', '.join(there)}" if there else ""
        raise CheckpointError("there is no such checkpoint", where=path, hint=hint) from None
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"checkpoint is damaged ({error})", where=path) from None


def _load(path: Path, number: int) -> Checkpoint:
    with open(path, "rb") as file:
        meta = _verify(file)
        # By descriptor, as safetensors takes no path that is not UTF-8, and a writer may remove the file.
        return Checkpoint(safetensors.torch.load_file(f"/proc/self/fd/{file.fileno()}"), meta, number, path)


def numbered(directory: Path) -> dict[int, Path]:
    """The checkpoints in a directory, whole or damaged, newest first."""
    names = os.listdir(directory) if directory.is_dir() else []
    found = {int(match[1]): directory / match[0] for match in map(_NAME.fullmatch, names) if match}
    return dict(sorted(found.items(), reverse=True))


def _header(tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> tuple[bytes, list[torch.Tensor]]:
    """The file up to its data, with zeros for the checksum, and the tensors in the order of the data."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"tensor {name!r}: {tensor.dtype} has no stored form")
    # Large elements first keeps every tensor aligned, as safetensors itself orders them.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries: dict[str, Any] = {"__metadata__": {"checksum": "0" * _DIGITS, "meta": json.dumps(dict(meta))}}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text, [tensors[name] for name in names]


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data


def _verify(file: BinaryIO) -> dict[str, Any]:
    """Check a file against its checksum and return its meta. Raises: ValueError saying what is wrong."""
    start = file.read(_CHECKSUM_AT)
    if len(start) < _CHECKSUM_AT or not start.endswith(_PREFIX):
        raise ValueError("it does not begin like a checkpoint")
    written = file.read(_DIGITS)
    checksum = hashlib.blake2b(start + b"0" * _DIGITS, digest_size=_DIGITS // 2)
    for chunk in _chunks(file):
        checksum.update(chunk)
    if checksum.hexdigest().encode() != written:
        raise ValueError("its checksum does not match")
    file.seek(0)
    (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
    return json.loads(json.loads(file.read(length))["__metadata__"]["meta"])


def _chunks(file: Any) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    while count := file.readinto(buffer):
        yield buffer[:count]


@contextlib.contextmanager
def fitting(path: Path, differing: Sequence[str] = (), hint: str = "") -> Iterator[None]:
    """Turns torch's error about other names or shapes of parameters into one line about the checkpoint at `path`.

    differing: lines about known differences from training, given before a parameter's shape.
    hint: what would be right, if known.

    Raises: CheckpointError for that error; every other passes.
    """
    try:
        yield
    except RuntimeError as error:
        first, *rest = str(error).splitlines() or [""]
        if "loading state_dict" not in first:
            raise
        example = rest[-1] if rest else first
        if not hint and not differing:
            hint = "is its environment, its config.json or the code of its learner another than in training?"
        details = [*differing, example.strip()]
        raise CheckpointError(
            "the checkpoint does not fit", where=path, hint=hint, details=details
        ) from error
