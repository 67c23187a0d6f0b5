"""What one grid barrier costs, measured by a kernel that does nothing but wait at barriers."""

import torch
import triton
import triton.language as tl

from hdfast_kernels.rssm_observe_kernels import grid_barrier


@triton.jit
def loading_barrier(counter, target):
    """`grid_barrier`, but all threads ask, by a load; what they see is the same, and no shared memory is between."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")
    while tl.load(counter, volatile=True) < target:
        pass
    tl.debug_barrier()


@triton.jit
def barrier_loop(counter, BARRIERS: tl.constexpr, LOADS: tl.constexpr):
    """Every program of the grid waits for all others BARRIERS times."""
    programs = tl.num_programs(0)
    for i in range(BARRIERS):
        if LOADS:
            loading_barrier(counter, (i + 1) * programs)
        else:
            grid_barrier(counter, (i + 1) * programs)


def barrier_us(
    programs: int = 64, barriers: int = 2_000, repeats: int = 5, *, loads: bool = False, warps: int = 8
) -> float:
    """Median µs of one barrier among `programs` co-resident programs, on the current CUDA device.

    loads: whether they ask by loads, see `loading_barrier`.
    """
    counter = torch.zeros(1, dtype=torch.int32, device="cuda")
    times = []
    for _ in range(repeats + 1):  # the first one compiles
        counter.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        barrier_loop[(programs,)](
            counter, BARRIERS=barriers, LOADS=loads, num_warps=warps, launch_cooperative_grid=True
        )
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / barriers)
    return sorted(times[1:])[repeats // 2]
