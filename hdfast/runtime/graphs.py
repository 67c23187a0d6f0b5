"""CUDA-graph capture of one function with static shapes: the only place that captures."""

from collections.abc import Callable, Iterable

import torch


class CapturedStep:
    """Calls `step()` eagerly a few times, then captures it as one CUDA graph and replays that.

    `step` takes nothing and returns nothing: it reads and writes tensors that live as long as this object, has static
    shapes, no host synchronisation and no Python branch on data. The eager calls are real steps; they also let
    lazily made buffers and library handles come into being outside of the capture.

    Args:
        step: the function.
        generators: every generator it draws from; their states advance with each replay as they would eagerly.
        warmup: eager calls before the capture.

    Raises:
        RuntimeError: at the capturing call, if `step` does something a graph cannot hold.
    """

    def __init__(self, step: Callable[[], None], *, generators: Iterable[torch.Generator], warmup: int = 3):
        self.step, self.generators, self.warmup = step, tuple(generators), warmup
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = torch.cuda.Stream()

    def __call__(self) -> None:
        """One step."""
        if self.graph is not None:
            self.graph.replay()
            return
        if self.warmup > 0:
            self.warmup -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.step()
            torch.cuda.current_stream().wait_stream(self.stream)
            return
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph, stream=self.stream):
            self.step()
        self.graph = graph
        self.graph.replay()  # the capture itself computed nothing
