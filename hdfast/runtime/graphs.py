"""CUDA graphs of functions with static shapes, and branches in them: the only place that captures."""

import contextlib
import functools
import gc
from collections.abc import Callable, Iterable, Iterator

import torch

from hdfast.runtime.device import check_graph

WARMUP = 3  # eager calls before the capture: kernels compile, libraries choose, late buffers are made


class CapturedStep:
    """Calls `step()` eagerly a few times, then captures it as one CUDA graph and replays that.

    `step` takes nothing and returns nothing: it reads and writes tensors that live as long as this object, has static
    shapes, no host synchronisation and no Python branch on data. What it reads is copied there before the call, in
    the order of the current stream. The eager calls are real steps.

    Args:
        step: the function.
        device: on which it runs.
        generators: every generator it draws from; their states advance with each replay as they would eagerly.
        warmup: eager calls before the capture.

    Raises:
        ConfigError: the device is no CUDA device.
        RuntimeError: at the capturing call, if `step` does something a graph cannot hold.
    """

    def __init__(
        self,
        step: Callable[[], None],
        *,
        device: torch.device,
        generators: Iterable[torch.Generator],
        warmup: int = WARMUP,
    ):
        check_graph("on", device)
        self.step, self.device, self.generators, self.warmup = step, device, tuple(generators), warmup
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = _stream(device)  # for the eager calls too: cuBLAS keeps a workspace for each stream

    def __call__(self) -> None:
        """One step, in the order of the current stream."""
        if self.graph is None:
            if self.warmup > 0:
                self.warmup -= 1
                self._eager()
                return
            self.graph = self._capture()  # which computes nothing
        self.graph.replay()

    def _eager(self) -> None:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            self.step()
        current.wait_stream(self.stream)

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        failure: Exception | None = None
        # torch.cuda.graph stays on its stream if a capture fails. Other threads go on meanwhile: replay may be
        # copying a batch from pinned memory that it allocates.
        capture = torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local")
        try:
            with torch.cuda.stream(self.stream), no_collection(), capture:
                try:
                    self.step()
                except Exception as error:
                    failure = error
                    raise
        except RuntimeError:
            if failure is None:
                raise
            raise failure from None  # not the error that the capture then could not be ended
        return graph


@contextlib.contextmanager
def beside(device: torch.device) -> Iterator[Callable[[], None]]:
    """Work inside the block runs on a side stream, beside the work after it, until the yielded function is called.

    In a capture the two become branches of one graph; if the device has no room for both at once, the branch after
    the block goes first. Memory freed by one branch is not reused by the other. On the CPU one runs after the other.
    """
    if device.type != "cuda":
        yield lambda: None
        return
    current, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield lambda: current.wait_stream(side)


# One stream of each for all captures on a device: PyTorch hands out 32 in turn, so that another could be the first
# again, or the one on which replay copies.
@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """In the block, Python frees no cycles: one may hold an older graph, whose destruction ends a capture."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
