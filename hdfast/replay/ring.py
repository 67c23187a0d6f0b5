"""The ring of rows: what the agent has experienced, at hand for training, and safe on disk.

Axes: N environments, R ring slots per environment, T window length, B windows. The row that environment n
returned at its agent step k lies in row `n * R + k % R` of the storage; all environments advance together.

`add` belongs to the host, once per agent step. `sample` is device operations only: static shapes, no
synchronisation, no Python branch on data, so that a CUDA graph can hold it. The number of rows is a device
tensor, and the uniform numbers come from a device generator (`Replay.generator`), which the owner of a graph
registers with it. Both run in the order of the current stream.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from hdfast.replay.chunk import ReplayError
from hdfast.replay.log import ReplayLog
from hdfast.replay.rows import STARTS, RowLayout
from hdfast.replay.transfer import RowTransfer, WindowPrefetch, host_view
from hdfast.runtime.device import restore_generator
from hdfast_kernels import gather_windows

if TYPE_CHECKING:
    from hdfast.envs.base import ArraySpec

DEVICE_SHARE = 0.5  # of the free device memory: the most that a ring placed by "auto" may take
_AHEAD = "ahead."  # in a state: then batch, length, and the starts of windows that are being fetched


class Replay:
    """The newest `capacity` rows, sampled in windows; with a `directory`, every row is also logged there.

    specs: observation keys and "action", "reward", "is_first", "is_last", "is_terminal", of one environment.
    capacity: rows of all environments together, rounded down to a multiple of num_envs.
    device: where windows are needed.
    place: "device" keeps the ring there; "host" keeps it in host memory and brings each batch over while the
        device is busy with the one before (see `stage`); "auto" is "host" only for a CUDA device on which the
        ring would take more than half of what is free.
    checkpoints: how many of the newest states must stay loadable while the next one is being saved; rows that
        none of them needs are deleted from the log.

    A `directory` is for writing: `load_state_dict` deletes the rows that follow its state, and the first `add` to a
    replay for which no state was loaded deletes all. To read the rows of a run use `hdfast.replay.episodes`. The folder
    of a run that another process holds is refused; that of a run which nobody holds is not.

    The ring is allocated at once; in host memory its pages cost nothing until they are written.
    Raises ValueError or TypeError for impossible specs or sizes, RunError if the directory cannot be made or
    the run is in use by another process.
    """

    def __init__(
        self,
        specs: Mapping[str, ArraySpec],
        *,
        num_envs: int,
        capacity: int,
        device: torch.device | str = "cpu",
        directory: Path | None = None,
        seed: int = 0,
        place: Literal["auto", "device", "host"] = "auto",
        checkpoints: int = 2,
    ) -> None:
        if not 1 <= num_envs <= capacity:
            raise ValueError(f"replay: capacity {capacity} is no row for each of {num_envs} environments")
        self.num_envs = num_envs
        self.ring = capacity // num_envs
        self.device = torch.device(device)
        self.rows_added = 0  # per environment
        self._layout = RowLayout(specs, num_envs)
        nbytes = self.ring * self._layout.packed_nbytes
        self.place = place if place != "auto" else _place(self.device, nbytes)
        home = self.device if self.place == "device" else torch.device("cpu")
        self.generator = torch.Generator(home).manual_seed(seed)
        self._storage = {
            key: torch.empty(
                num_envs * self.ring, *spec.shape, dtype=self._layout.torch_dtypes[key], device=home
            )
            for key, spec in self._layout.specs.items()
        }
        self._by_env: dict[str, Any] = {
            key: host_view(rows.unflatten(0, (num_envs, self.ring))) for key, rows in self._storage.items()
        }
        self._rows_added = torch.zeros((), dtype=torch.int64, device=home)
        self._transfer = RowTransfer(self._layout, home)
        self._prefetch: dict[tuple[int, int], WindowPrefetch] = {}
        self._log: ReplayLog | None = None
        if directory is not None:  # one more for the position being saved, and one spare
            self._log = ReplayLog(directory, self._layout, self.ring, positions=checkpoints + 2)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole ring, whether written yet or not."""
        return sum(rows.nbytes for rows in self._storage.values())

    @property
    def generators(self) -> tuple[torch.Generator, ...]:
        """The generators that a CUDA graph of `sample` must register; none where `stage` draws, outside the graph."""
        return (self.generator,) if self.place == "device" else ()

    def describe(self) -> str:
        """One line for the start of a run: rows, bytes, place."""
        rows, where = self.num_envs * self.ring, self._rows_added.device
        batches = f", batches prefetched to {self.device}" if self.place == "host" else ""
        return f"replay: room for {rows:,} rows, {self.nbytes / 1e9:.2f} GB on {where}{batches}"

    def ready(self, length: int) -> bool:
        """Whether there is a window of `length` rows to sample."""
        return 1 <= length <= min(self.rows_added, self.ring)

    def add(self, rows: Mapping[str, np.ndarray]) -> None:
        """Append one row of every environment: numpy arrays (N, ...) of exactly the specs' shapes and dtypes.

        Raises ValueError or TypeError and adds nothing if the rows are wrong. Raises RunError, DiskFullError
        if the disk fails; the row is then in the ring, and the log writes it once the disk works again.
        """
        self._layout.check(rows)
        if self._log is not None and self.rows_added == 0:
            self._log.start()
        for prefetch in self._prefetch.values():
            prefetch.wait()
        packed, views = self._transfer.put(rows)
        slot = self.rows_added % self.ring
        for key, view in views.items():
            self._by_env[key][:, slot] = view
        self._count(self.rows_added + 1)
        if self._log is not None:
            self._log.append(packed)

    def stage(self, batch: int, length: int) -> None:
        """Prepare what the next `sample(batch, length)` returns, and begin to fetch the batch after it.

        Call it outside of a graph before every sample, or every replay of a graph that contains one. Does nothing
        unless place is "host", where a batch is drawn one call ahead, without the rows added in between.
        """
        if self.place == "device":
            return
        self._require(length)
        prefetch = self._prefetch_of(batch, length)
        if prefetch.pending is None:
            prefetch.begin(self._draw(batch, length))
        prefetch.finish()
        prefetch.begin(self._draw(batch, length))

    def sample(self, batch: int, length: int) -> dict[str, Tensor]:
        """Windows (T, B, ...) of every key, and the storage rows "starts" (B,) int64 at which they begin.

        Uniform over all windows of all environments that do not cross the write head; they may cross
        episodes. In the first row of every window `is_first` is set, because what came before it is not in
        the batch.

        The tensors are new, or, if place is "host", those of the last `stage`, which the next one overwrites.
        Raises ValueError if no window is ready, RuntimeError if place is "host" and nothing is staged.
        """
        self._require(length)
        if self.place == "device":
            return self._gather(self._draw(batch, length), length)
        if (batch, length) not in self._prefetch:
            raise RuntimeError(f"replay on the host: call stage({batch}, {length}) before sample")
        return dict(self._prefetch[batch, length].windows)

    def gather(self, starts: Tensor, length: int) -> dict[str, Tensor]:
        """The windows that start at storage rows `starts` (B,), as `sample` gives them, in new tensors.

        They stay the same until `add` overwrites one of their rows.
        """
        windows = self._gather(starts.to(self._rows_added.device), length)
        return {key: rows.to(self.device) for key, rows in windows.items()}

    def flush(self) -> None:
        """Make all rows added so far durable on disk; call it before a checkpoint is written."""
        if self._log is not None:
            self._log.flush()

    def state_dict(self) -> dict[str, Tensor]:
        """Counters, checksum of the log, generator state, and the windows that `stage` has drawn ahead.

        The rows themselves stay in the log, flushed. Windows ahead that newer rows have overwritten in part are left
        out: another batch is drawn in their place when the state is loaded.
        """
        rows, crc = self._log.position() if self._log is not None else (self.rows_added, 0)
        state = {"rows_added": rows, "ring": self.ring, "log_crc": crc}
        tensors = {key: torch.tensor(value) for key, value in state.items()}
        ahead = {
            f"{_AHEAD}{batch}.{length}": prefetch.pending
            for (batch, length), prefetch in self._prefetch.items()
            if prefetch.pending is not None and self._holds(prefetch.pending, length)
        }
        return tensors | ahead | {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state_dict` was called on: read its rows from the log, and delete there those added later.

        The ring may differ in size from the saved one, as long as these rows fill neither more than once.

        Raises ReplayError if the log does not hold these rows, or the state is of another kind of replay.
        """
        rows, ring, crc = (int(state[key]) for key in ("rows_added", "ring", "log_crc"))
        if ring != self.ring and rows > min(ring, self.ring):
            raise ReplayError(
                f"replay: the checkpoint has {ring} rows per environment, this run {self.ring}",
                hint="give the earlier --replay settings, or begin another run",
            )
        if self._log is None and rows:
            raise ReplayError(
                f"replay: the checkpoint has {rows} rows, and there is no log to read them from"
            )
        for prefetch in self._prefetch.values():
            prefetch.drop()
        self._count(0)
        if self._log is not None:
            self._log.load(rows, crc, self._restore)
        self._count(rows)
        restore_generator(self.generator, state["generator"])
        if self.place == "host" and ring == self.ring:
            for key in filter(lambda key: key.startswith(_AHEAD), state):
                batch, length = map(int, key.removeprefix(_AHEAD).split("."))
                self._prefetch_of(batch, length).begin(state[key].cpu())

    def close(self) -> None:
        """Flush, close the log, and end the threads."""
        for prefetch in self._prefetch.values():
            prefetch.close()
        if self._log is not None:
            self._log.close()

    def _count(self, rows_added: int) -> None:
        self.rows_added = rows_added
        self._rows_added.fill_(rows_added)

    def _require(self, length: int) -> None:
        if not self.ready(length):
            stored = min(self.rows_added, self.ring)
            raise ValueError(f"replay: no window of {length} rows, there are {stored} per environment")

    def _prefetch_of(self, batch: int, length: int) -> WindowPrefetch:
        if (batch, length) not in self._prefetch:
            gather = functools.partial(self._gather, length=length)
            self._prefetch[batch, length] = WindowPrefetch(gather, self.device)
        return self._prefetch[batch, length]

    def _holds(self, starts: Tensor, length: int) -> bool:
        """Whether windows that were drawn earlier are still whole."""
        count = min(self.rows_added, self.ring)
        after_oldest = (starts % self.ring - (self.rows_added - count)) % self.ring
        return bool((after_oldest + length <= count).all())

    def _draw(self, batch: int, length: int) -> Tensor:
        """Storage rows (B,) int64 of uniformly drawn windows."""
        count = self._rows_added.clamp(max=self.ring)
        oldest = self._rows_added - count
        valid = count - (length - 1)  # windows per environment
        uniform = torch.rand(batch, dtype=torch.float64, device=valid.device, generator=self.generator)
        window = (uniform * (valid * self.num_envs)).long()  # in float64 the product stays below N * valid
        env = window.div(valid, rounding_mode="floor")
        return env * self.ring + (oldest + window - env * valid) % self.ring

    def _gather(self, starts: Tensor, length: int) -> dict[str, Tensor]:
        ring = self.ring
        windows = {key: gather_windows(rows, starts, length, ring) for key, rows in self._storage.items()}
        windows["is_first"][0].fill_(True)
        return windows | {STARTS: starts}

    def _restore(self, first_row: int, packed: np.ndarray) -> None:
        """Put logged rows, uint8 (K, P), where they were."""
        slot = first_row % self.ring
        to_end = self.ring - slot
        if len(packed) > to_end:
            self._restore(first_row + to_end, packed[to_end:])
        rows = torch.from_numpy(packed[:to_end]).to(self._rows_added.device)
        for key, view in self._layout.unpack(rows).items():
            # (K, N, ...) -> (N, K, ...)
            self._by_env[key][:, slot : slot + len(rows)] = host_view(view.transpose(0, 1))


def _place(device: torch.device, nbytes: int) -> Literal["device", "host"]:
    if device.type != "cuda":
        return "device"
    gc.collect()  # frees what an earlier run left, and what PyTorch keeps of it
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return "device" if nbytes <= DEVICE_SHARE * free else "host"
