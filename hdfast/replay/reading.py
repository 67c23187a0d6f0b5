"""The data of a run, episode by episode, for whoever wants to look at it or to learn from it elsewhere.

Axes: K rows of a record, N environments, T rows of an episode.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from hdfast.replay.chunk import ChunkReader, ReplayError, chunks_of, damaged, first_row_of, read_header
from hdfast.replay.rows import SCALAR_KEYS, RowLayout
from hdfast.runtime.errors import RunError, disk_errors

_LAST_KEYS = ("action", *SCALAR_KEYS)  # in an episode, after the observations


def episodes(run: str | Path) -> Iterator[dict[str, np.ndarray]]:
    """The episodes in the replay of the run in directory `run`, in the order in which they ended.

    The run may be in training, stopped or finished; nothing of it is written or locked. The returns, in a notebook::

        whole = (e for e in episodes("runs/demo/Catch/seed0") if e["is_first"][0] and e["is_last"][-1])
        returns = [e["reward"].sum() for e in whole]

    Each is a dict of new arrays, in the run's own names, shapes and dtypes:

        observations: (T, ...), by name, such as "image" (T, H, W, C) uint8; the first is that of the reset.
        action: (T,) int32, or (T, A) float32 in [-1, 1], chosen at that row. That of a row with is_last did nothing.
        reward: (T,) float32, for having come to that row; 0 at the reset.
        is_first, is_last, is_terminal: (T,) bool; an episode that is_last but not is_terminal was cut by a time limit.

    Every row that is stored comes exactly once, so some episodes are pieces:

        without is_last at the end: one under way, which comes at the end of all, or one that the run was stopped in.
        without is_first at the beginning: the first of an environment, once the oldest rows have been dropped. A
            run drops those beyond `--replay.capacity`, at a checkpoint and by whole files of 16 MB.

    Rows are written by the megabyte and at every checkpoint: the newest of a run in training are not there yet, nor
    is a block that is being written. What a killed run wrote after its last checkpoint is there until it is resumed.

    Files that come later are not read. Memory holds the episodes that are under way in each environment.

    Raises:
        RunError: there is no run, it has no rows yet, or they cannot be read. ConfigError: a directory of several runs.
        ReplayError (a RunError), after the episodes before it: a file is damaged or missing, or the run was meanwhile
            resumed from an earlier checkpoint.
    """
    from hdfast.runtime import record  # it needs safetensors, which learning alone does not

    path = Path(run).expanduser()
    record.read_one(path)
    chunks = chunks_of(path / "replay")
    if not chunks:
        hint = "a run writes them by the megabyte, and at every checkpoint"
        raise RunError("there are no rows here", where=path / "replay", hint=hint)
    return _episodes(chunks)


def _episodes(chunks: Sequence[Path]) -> Iterator[dict[str, np.ndarray]]:
    held: list[list[dict[str, np.ndarray]]] = []  # of each environment, what there is of its episode
    following = None  # the row that comes next
    for row, block in _blocks(chunks):
        is_first, is_last = block["is_first"], block["is_last"]
        if row != following:  # the run has dropped what was between
            yield from map(_joined, filter(None, held))
            held = [[] for _ in is_first[0]]
        count, envs = is_first.shape
        following = row + count
        # An episode ends before a row: 0 because its last row is_last, 1 because the row is_first.
        ends = np.zeros((count + 1, 2, envs), bool)
        ends[1:, 0], ends[:-1, 1] = is_last, is_first
        begin = [0] * envs
        for end, _, env in [*np.argwhere(ends).tolist(), *((count, 0, env) for env in range(envs))]:
            if begin[env] < end:
                held[env].append({key: rows[begin[env] : end, env].copy() for key, rows in block.items()})
                begin[env] = end
            if held[env] and ends[end, :, env].any():
                yield _joined(held[env])
                held[env] = []
    yield from map(_joined, filter(None, held))


def _joined(pieces: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    if len(pieces) == 1:
        return pieces[0]
    return {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}


def _blocks(chunks: Sequence[Path]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """The rows (K, N, ...) of one record after the other by key, and the number of the first of each."""
    layout: RowLayout | None = None
    before: ChunkReader | None = None  # of the chunk before, unless the run has dropped it
    for path in chunks:
        with disk_errors(path, "read the replay"):
            try:
                file = path.open("rb")
            except FileNotFoundError:
                if any(other < path for other in chunks_of(path.parent)):
                    what = "the file is gone: the run went back to an earlier checkpoint, or it was deleted"
                    raise ReplayError(what, where=path, hint="read the run again") from None
                before = None  # the run drops its oldest files
                continue
        with file:
            with disk_errors(path, "read the replay"):
                if (header := read_header(path, file)) is None:
                    if path == chunks[-1]:
                        return
                    raise damaged(path, 0)
                layout = layout or RowLayout.from_json(header["layout"])
                file.seek(0)
                row, crc = (before.row, before.crc) if before else (first_row_of(path), None)
                before = ChunkReader(path, file, layout, row, crc)
            while True:
                with disk_errors(path, "read the replay"):
                    packed = before.read()
                if packed is None:
                    break
                arrays = layout.unpack(torch.from_numpy(packed))
                names = [*(key for key in arrays if key not in _LAST_KEYS), *_LAST_KEYS]
                yield before.row - len(packed), {key: arrays[key].numpy() for key in names}
