"""The best rates of this machine, measured: benchmarks are reported as a share of them."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from hdfast.runtime.graphs import no_collection
from hdfast_kernels import linear

TRIES = 10  # of which the best counts
ALIGNED = 512  # bytes, to a multiple of which PyTorch places a tensor on CUDA
WARMUPS, REPLAYS = 3, 20  # calls before a capture, and replays in a row
THREADS = torch.get_num_threads()  # before a narrow model limits them: peaks are measured with all


def synchronised(function: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """`function`, followed by a wait for all that it starts on the device."""

    def run() -> None:
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def in_a_row(function: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], int]:
    """`function` as in a run, and how many times one call does it; the call waits for the device.

    On CUDA a call is several replays of a CUDA graph, so that launches and the wait hardly count; data that fits stays
    in the second-level cache. If it cannot be captured, a call does it once, launch by launch.
    """
    if device.type != "cuda":
        return synchronised(function, device), 1
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    torch.cuda.synchronize(device)  # its inputs are complete
    try:
        with torch.cuda.stream(stream):
            for _ in range(WARMUPS):
                function()
            torch.cuda.synchronize(device)
            with _no_waiting():  # a failed capture would make PyTorch's own generator unusable
                function()
            # The outer block restores the previous stream. Other threads do not matter to the capture.
            capture = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
            with no_collection(), capture:
                function()
    except RuntimeError:
        torch.cuda.synchronize(device)
        return synchronised(function, device), 1
    return synchronised(lambda: [graph.replay() for _ in range(REPLAYS)], device), REPLAYS


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """Inside the block, operations for which the host waits, such as multinomial, raise RuntimeError."""
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
    """GB/s of a copy larger than the caches, reads plus writes; measured once per process."""
    source = torch.ones(256 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy, calls = in_a_row(lambda: target.copy_(source), device)
    copy()
    return 2 * source.nbytes * calls / min(seconds(copy) for _ in range(TRIES)) / 1e9


def launches(function: Callable[[], Any], device: torch.device) -> int:
    """How many kernels, copies and fills `function` starts on a CUDA device; 0 on any other."""
    if device.type != "cuda":
        return 0
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        function()
        torch.cuda.synchronize(device)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in found.events())


@functools.cache
def copy_seconds(device: torch.device, nbytes: int, pieces: int) -> float:
    """Time of so many copies, one after another, that read and write `nbytes` in all or some more; the least of tries.

    On CUDA they run as an op does, see `in_a_row`. It is what an op can reach that moves as much in as many launches.
    Each begins where memory is aligned, as a tensor of its own would.
    """
    size = -(-nbytes // (2 * pieces * ALIGNED)) * ALIGNED
    source = torch.ones(pieces, size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    pairs = list(zip(target, source, strict=True))
    copy, calls = in_a_row(lambda: [to.copy_(piece) for to, piece in pairs], device)
    copy()
    return min(seconds(copy) for _ in range(TRIES)) / calls


@functools.cache
@all_threads()
def gemm_gflop_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of a product of two large square matrices; a multiplication and an addition count as two.

    The best of PyTorch's product, ours, and a 1x1 convolution of the same size, which on a CPU use different libraries.
    Measured once per process.
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
