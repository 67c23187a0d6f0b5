"""What this machine reaches at its best, measured: the rates that benchmarks are a share of."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from hdfast_kernels import linear

TRIES = 10  # the best of them counts
WARMUPS, REPLAYS = 3, 20  # calls before a capture, and replays in a row
THREADS = torch.get_num_threads()  # before a narrow model limits them: peaks are those of the machine


def synchronised(function: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """`function`, to the end of what it starts on the device."""

    def run() -> None:
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def in_a_row(function: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], int]:
    """`function` as a run has it, and how often it is done in one call, which ends when all is done.

    On CUDA several replays of a CUDA graph, so that neither launches nor the wait for the end count; once, launch by
    launch, where it cannot be captured. What it works on is then in the second-level cache if it fits there.
    """
    if device.type != "cuda":
        return synchronised(function, device), 1
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    torch.cuda.synchronize(device)  # what it works on is there
    try:
        with torch.cuda.stream(stream):
            for _ in range(WARMUPS):
                function()
            torch.cuda.synchronize(device)
            with _no_waiting():  # a capture that fails would leave PyTorch's own generator of no more use
                function()
            with torch.cuda.graph(graph, stream=stream):  # the outer block goes back to the stream before
                function()
    except RuntimeError:
        torch.cuda.synchronize(device)
        return synchronised(function, device), 1
    return synchronised(lambda: [graph.replay() for _ in range(REPLAYS)], device), REPLAYS


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """Inside, a RuntimeError is raised where the host would wait for the device, as it does in multinomial."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


@contextlib.contextmanager
def all_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
@all_threads()
def copy_gb_per_second(device: torch.device) -> float:
    """What a copy of more than the caches hold moves, reads and writes together; measured once in a process."""
    source = torch.ones(256 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy, calls = in_a_row(lambda: target.copy_(source), device)
    copy()
    return 2 * source.nbytes * calls / min(seconds(copy) for _ in range(TRIES)) / 1e9


@functools.cache
@all_threads()
def gemm_gflop_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """What a product of two large square matrices reaches; a multiplication and an addition count as two.

    The best of PyTorch's product, ours and a 1x1 convolution of the same size: on a CPU they go to different libraries.
    Measured once in a process.
    """
    n = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    image = a.T.reshape(1, n, n // 32, 32).contiguous(
        memory_format=torch.channels_last
    )  # n pixels of n channels
    kernel = b.T.reshape(n, n, 1, 1).contiguous()
    best = float("inf")
    for product in (lambda: a @ b, lambda: linear(a, b), lambda: F.conv2d(image, kernel)):
        run = synchronised(product, device)
        run()
        best = min(best, *(seconds(run) for _ in range(TRIES)))
    return 2 * n**3 / best / 1e9
