"""From `--device` and `--precision` to a torch device and dtype, and what to record about the machine."""

import os
import platform
import zlib
from pathlib import Path
from typing import Any

import torch

from hdfast.runtime.errors import ConfigError, MissingLibraryError, suggest
from hdfast_kernels import dispatch, native

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_CPUINFO = Path("/proc/cpuinfo")
_CPU_BFLOAT16 = {"avx512_bf16", "amx_bf16"}  # x86 flags of bfloat16 matrix work in hardware
_CUDA_BFLOAT16 = (8, 0)  # compute capability from which tensor cores take bfloat16
_spared: list[int] = []  # how many threads there were each time that `prepare_device` limited them


def resolve_device(name: str) -> torch.device:
    """The device meant by "auto", "cpu", "cuda" or "cuda:N"; auto is the current CUDA device if there is one.

    Raises: ConfigError when there is no such name or device here.
    """
    if name == "auto":
        return resolve_device("cuda" if torch.cuda.is_available() else "cpu")
    kind, colon, index = name.partition(":")
    if name == "cpu":
        return torch.device("cpu")
    if kind != "cuda" or (colon and not index.isdecimal()):
        raise ConfigError(
            f"no device {name!r}{suggest(name, ['auto', 'cpu', 'cuda', 'cuda:0'])}", where="--device"
        )
    if not torch.cuda.is_available():
        raise ConfigError(
            f"{name!r} cannot be used: {_why_no_cuda()}", where="--device", hint="--device cpu works"
        )
    count = torch.cuda.device_count()
    if colon and int(index) >= count:
        there = ", ".join(f"'cuda:{i}'" for i in range(count))
        raise ConfigError(f"no device {name!r}", where="--device", hint=f"CUDA devices here: {there}")
    return torch.device("cuda", int(index) if colon else torch.cuda.current_device())


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix work: "float32", "bfloat16", or "auto": bfloat16 where hardware multiplies it.

    Raises: ConfigError on another name.
    """
    if name == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    if name not in PRECISIONS:
        raise ConfigError(f"no precision {name!r}{suggest(name, ['auto', *PRECISIONS])}", where="--precision")
    return PRECISIONS[name]


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products run in hardware: CUDA 8.0 and up, x86 with AVX512-BF16 or AMX-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= _CUDA_BFLOAT16
    return bool(_CPU_BFLOAT16 & set(_cpuinfo().get("flags", "").split()))


def prepare_device(device: torch.device, little_work: bool) -> None:
    """Makes a CUDA device the current one, on which Triton launches; on the CPU, keeps memory and limits the threads.

    On CUDA, convolutions and products in float32 then compute in float32: cuDNN would use TF32 with its 10 bits of
    mantissa, and so would cuBLAS where the environment or the calling script allows it. Sums of bfloat16 products stay
    in float32, where cuBLAS would round partial sums of long ones.

    On the CPU the process keeps freed memory for later tensors: new pages would be a third of the time of an update in
    float32. If an update is little work (`Config.little_work`), PyTorch gets one thread, unless OMP_NUM_THREADS is
    set: two gain little there on idle cores, and on busy ones they wait for each other. An update of the demo on two
    busy cores: 31 ms of CPU and 45-74 ms of wall time on one thread, 400-1,040 ms and 650-2,140 ms on two. A later
    call for more work restores the earlier number of threads.

    Raises: MissingLibraryError if the C++ module of the CPU cannot be used, with the command that builds it;
        ConfigError if HDFAST_ISA names an instruction set that cannot run here.
    """
    _limit_threads(little_work and device.type == "cpu")
    if device.type == "cuda":
        if device.index is not None:  # otherwise it is the current one
            torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        return
    if dispatch.native_built():
        try:
            native.keep_freed_memory()
        except native.IsaError as error:
            raise ConfigError(str(error)) from error
        except dispatch.BackendError as error:
            raise MissingLibraryError(str(error)) from error


def check_graph(wish: str, device: torch.device) -> None:
    """Raises: ConfigError if graphs are asked for ("on", "overlap") on a device that has none."""
    if wish in ("on", "overlap") and device.type != "cuda":
        raise ConfigError(
            "a CUDA graph needs a CUDA device", where="--train.graph", hint="leave it out on the CPU"
        )


def ready_device(name: str, little_work: bool, graph: str) -> torch.device:
    """The device that a run asks for, prepared. Raises: as `resolve_device`, `prepare_device` and `check_graph`."""
    device = resolve_device(name)
    prepare_device(device, little_work)
    check_graph(graph, device)
    return device


def _limit_threads(to_one: bool) -> None:
    """Limits PyTorch to one thread, or restores the number it had before the last limit."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    threads = torch.get_num_threads()
    if to_one and threads > 1:
        _spared.append(threads)
        torch.set_num_threads(1)
    elif not to_one and threads == 1 and _spared:
        torch.set_num_threads(_spared[-1])
        _spared.clear()


def restore_generator(generator: torch.Generator, state: torch.Tensor) -> None:
    """Restores a generator's saved state; if that is of another kind of device, seeds the generator from it.

    state: (bytes,) uint8, of `get_state`.
    """
    if state.shape == generator.get_state().shape:
        generator.set_state(state.cpu())
    else:
        generator.manual_seed(zlib.crc32(state.cpu().numpy().tobytes()))


def describe_device(device: torch.device) -> dict[str, Any]:
    """What a reader of results wants to know, in JSON's types: name, memory, cores, instruction set of native ops."""
    about: dict[str, Any] = {"device": str(device), "bfloat16": has_bfloat16(device)}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        about |= {
            "name": card.name,
            "memory_bytes": card.total_memory,
            "multiprocessors": card.multi_processor_count,
            "capability": f"{card.major}.{card.minor}",
            "cuda": torch.version.cuda,
        }
    else:
        about |= {
            "name": _cpuinfo().get("model name") or platform.processor() or platform.machine(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "instruction_set": _instruction_set(),
        }
    return about


def _instruction_set() -> str | None:
    """What the native ops run on, such as "avx2"; None where they cannot run."""
    try:
        return native.isa()
    except dispatch.BackendError:
        return None


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; empty where there is no such file."""
    if not _CPUINFO.exists():
        return {}
    first, _, _ = _CPUINFO.read_text().partition("\n\n")
    return {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())
    }


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    return f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU or driver"
