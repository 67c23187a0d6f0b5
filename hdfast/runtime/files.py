"""Files that exist as a whole or not at all, and the JSON form of a run's data."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

PARTIAL = ".partial"  # suffix of a file being written; one that is left over belongs to an interrupted write


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file beside `path` that replaces it, durably and at once, when the block succeeds.

    If the block raises, or the process dies, `path` is what it was before.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_directory(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_all(file: RawIOBase, data: bytes) -> None:
    """Write all of `data` to an unbuffered file, a single write of which may take only a part."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def utc() -> str:
    """The time, as a run's files write it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def is_number(value: object) -> bool:
    """Whether a value read from JSON is a number, or one of the strings that `plain` writes for others."""
    return type(value) in (int, float) or value in ("NaN", "Infinity", "-Infinity")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    text = json.dumps(plain(value), indent=2, allow_nan=False)
    with replacing(path) as file:
        file.write(text.encode() + b"\n")


def plain(value: Any, name: str = "value") -> Any:
    """`value` in JSON's own types: tuples and arrays become lists, paths, NaN and infinities strings.

    The strings "NaN", "Infinity" and "-Infinity" are what `float()` and JavaScript's `Number()` read back.

    Raises: TypeError naming the entry that has no such form.
    """
    match value:
        case None | bool() | str():
            return value
        case np.bool_() | np.integer():
            return value.item()
        case int():
            return int(value)
        case np.floating() if math.isfinite(value):
            return float(str(value))  # the shortest decimal that reads back as this float32
        case float() | np.floating():
            if math.isfinite(value):
                return float(value)
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        case Mapping():
            for key in value:
                if not isinstance(key, str):
                    raise TypeError(f"{name}: JSON keys are strings, got {key!r}")
            return {key: plain(entry, f"{name}.{key}") for key, entry in value.items()}
        case list() | tuple():
            return [plain(entry, f"{name}[{i}]") for i, entry in enumerate(value)]
        case np.ndarray():
            return plain(list(value), name)
        case Path():
            return str(value)
    raise TypeError(f"{name}: {type(value).__name__} has no JSON form")


def filled(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The nested `config` with the fields of `defaults` that it lacks."""
    whole = {**defaults, **config}
    for name, default in defaults.items():
        if isinstance(default, Mapping) and isinstance(whole[name], Mapping):
            whole[name] = filled(whole[name], default)
    return whole
