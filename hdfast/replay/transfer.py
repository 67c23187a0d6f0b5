"""Transfers between host and training device: rows in and, if the ring stays on the host, windows to learn from.

Axes: N environments, P bytes of a packed row, T window length, B windows.

On CUDA everything passes through pinned memory, and the host never waits for work that it has only just
queued.
"""

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from hdfast.replay.rows import RowLayout

ROWS_IN_FLIGHT = 4  # then the host waits until the oldest has left its pinned buffer


def host_view(tensor: Tensor) -> Tensor | np.ndarray:
    """The tensor, as numpy if it is on the host, where torch would use all its threads to copy a single row."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


class RowTransfer:
    """Takes one row of every environment, packed, to `device`."""

    def __init__(self, layout: RowLayout, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        buffers = ROWS_IN_FLIGHT if self._cuda else 1
        self._host = torch.zeros(buffers, layout.packed_nbytes, dtype=torch.uint8, pin_memory=self._cuda)
        self._packed = [buffer.numpy() for buffer in self._host]
        self._arrays = [
            {key: view.numpy() for key, view in layout.unpack(buffer).items()} for buffer in self._host
        ]
        self._device = self._host[0].to(device)  # on the CPU the buffer itself
        self._views = {key: host_view(view) for key, view in layout.unpack(self._device).items()}
        self._sent = [torch.cuda.Event() for _ in self._host] if self._cuda else []
        self._next = 0

    def put(self, rows: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, Tensor | np.ndarray]]:
        """The packed row on the host, uint8 (P,), and its arrays (N, ...) on the device, until the next."""
        buffer, self._next = self._next, (self._next + 1) % len(self._packed)
        if self._cuda:
            self._sent[buffer].synchronize()
        for key, array in self._arrays[buffer].items():
            array[...] = rows[key]
        if self._cuda:
            self._device.copy_(self._host[buffer], non_blocking=True)
            self._sent[buffer].record(torch.cuda.current_stream(self._device.device))
        return self._packed[buffer], self._views


class WindowPrefetch:
    """Brings windows of one shape from a ring on the host to `device`, the next batch while the device works.

    gather: from starts (B,) int64 on the host to a dict of host tensors (T, B, ...); it runs in a thread.
    pending: starts of the batch that has been begun and not finished, if there is one.
    windows: the batch of the last `finish`, in tensors that stay where they are, as a CUDA graph needs them.
        While a batch is on its way, a graph can be captured only with capture_error_mode="thread_local".
    """

    def __init__(self, gather: Callable[[Tensor], dict[str, Tensor]], device: torch.device) -> None:
        self.windows: dict[str, Tensor] = {}
        self._gather = gather
        self._cuda = device.type == "cuda"
        self._pinned: dict[str, Tensor] = {}
        self._arriving: dict[str, Tensor] = {}
        self._device = device
        if self._cuda:
            self._stream, self._sent, self._taken = _stream(device), torch.cuda.Event(), torch.cuda.Event()
            self._device = self._stream.device  # with its index
        # Each thread has its own current device, which is at first the first card.
        begin = functools.partial(torch.cuda.set_device, self._device) if self._cuda else None
        self._thread = ThreadPoolExecutor(1, "replay-prefetch", initializer=begin)
        self._fetching: Future[None] | None = None
        self.pending: Tensor | None = None

    def begin(self, starts: Tensor) -> None:
        """Gather and send the windows at `starts` in the background."""
        self.pending, self._fetching = starts, self._thread.submit(self._fetch, starts)

    def wait(self) -> None:
        """Wait until the ring is not being read."""
        if self._fetching is not None:
            self._fetching.result()

    def finish(self) -> None:
        """Put the batch under way into `windows`, in the order of the current stream."""
        self.drop()
        if self._cuda:
            torch.cuda.current_stream(self._device).wait_event(self._sent)
        for key, arriving in self._arriving.items():
            self.windows[key].copy_(arriving)
        if self._cuda:
            self._taken.record(torch.cuda.current_stream(self._device))

    def drop(self) -> None:
        """Forget the batch under way."""
        self.wait()
        self.pending = self._fetching = None

    def close(self) -> None:
        self._thread.shutdown()
        if self._cuda:
            self._sent.synchronize()  # after that, PyTorch may reuse the memory of `_arriving`

    def _fetch(self, starts: Tensor) -> None:
        gathered = self._gather(starts)
        if not self.windows:
            for key, rows in gathered.items():
                self._pinned[key] = torch.empty_like(rows, pin_memory=self._cuda)
                self._arriving[key] = torch.empty_like(rows, device=self._device)
                self.windows[key] = torch.empty_like(rows, device=self._device)
            if self._cuda:  # earlier work may still be using the memory of `_arriving`
                self._stream.wait_stream(torch.cuda.current_stream(self._device))
        if self._cuda:
            self._sent.synchronize()  # the batch before has left the pinned buffers
            self._stream.wait_event(self._taken)  # and `windows` has been filled from it
        with torch.cuda.stream(self._stream) if self._cuda else nullcontext():
            for key, rows in gathered.items():
                self._pinned[key].copy_(rows)
                self._arriving[key].copy_(self._pinned[key], non_blocking=True)
            if self._cuda:
                self._sent.record(self._stream)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all prefetches to a device: of many, one would be the stream on which graphs are captured."""
    return torch.cuda.Stream(device)
