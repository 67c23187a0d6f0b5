"""The C++ module of the CPU backend: loaded on first use, checked at the boundary.

The ops in `_native` take raw addresses, so that a call costs microseconds; what the op files pass goes
through `ptr`.
"""

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch  # before _native, so that both share torch's OpenMP threads
from torch import Tensor

from .dispatch import BUILD_COMMAND, FUSED_DTYPES, BackendError

SOURCES = Path(__file__).parents[1] / "csrc"  # where it is an editable install


class IsaError(BackendError):
    """HDFAST_ISA names an instruction set that is not compiled in or that this processor lacks."""


@functools.cache
def module() -> ModuleType:
    """`hdfast_kernels._native`, on the instruction set that HDFAST_ISA names, else on the best that can run here.

    Raises BackendError with the build command if it is missing or built from other sources; IsaError.
    """
    try:
        from . import _native  # type: ignore[attr-defined]
    except ImportError as error:
        message = f"the C++ module hdfast_kernels._native cannot be loaded ({error})"
        raise BackendError(f"{message}; build it with `{BUILD_COMMAND}`") from error
    # Ops pass addresses: a module that expects other arguments would read and write anywhere.
    if SOURCES.is_dir() and digest(SOURCES) != getattr(_native, "sources", ""):
        raise BackendError(
            f"the C++ module hdfast_kernels._native was built before {SOURCES} changed; "
            f"build it with `{BUILD_COMMAND}`"
        )
    if wish := os.environ.get("HDFAST_ISA"):
        if wish not in _native.isas():
            raise IsaError(f"HDFAST_ISA={wish} cannot run here; choose one of {', '.join(_native.isas())}")
        _native.force_isa(wish)
    return _native


def digest(folder: Path) -> str:
    """SHA-256 of the SHA-256 sums, in hexadecimal, of all C++ files below `folder`, as CMakeLists.txt makes it."""
    paths = sorted(str(path) for path in folder.rglob("*") if path.suffix in (".cpp", ".h"))
    each = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths]
    return hashlib.sha256("".join(each).encode()).hexdigest()


def ptr(tensor: Tensor) -> int:
    """The data address of a contiguous CPU tensor that is not lazily negated; ValueError for any other."""
    if tensor.is_neg():
        raise ValueError(
            "native ops take tensors as they are in memory, got one that is negated when it is read; "
            "use .resolve_neg()"
        )
    if not (tensor.is_cpu and tensor.is_contiguous()):
        got = f"{tensor.device} with shape {tuple(tensor.shape)} and strides {tensor.stride()}"
        raise ValueError(f"native ops take contiguous CPU tensors, got one on {got}")
    address = tensor.data_ptr()
    if not address and tensor.numel():
        raise ValueError(f"native ops take tensors with memory, got a {type(tensor).__name__} without")
    return address


def ptr_of_rows(rows: Tensor) -> int:
    """The data address of a CPU matrix with numbers side by side in a row, rows any distance apart; else ValueError."""
    if rows.ndim != 2 or (rows.stride(1) != 1 and rows.shape[1] != 1):
        raise ValueError(
            f"native ops take whole rows, got shape {tuple(rows.shape)}, strides {rows.stride()}"
        )
    return ptr(rows[:1])


def is_bf16(tensor: Tensor) -> bool:
    """True for bfloat16, False for float32; TypeError for any other dtype, which C++ would misread."""
    if tensor.dtype not in FUSED_DTYPES:
        raise TypeError(f"native ops take float32 or bfloat16, got {tensor.dtype}")
    return tensor.dtype == torch.bfloat16


def as_float(tensor: Tensor) -> Tensor:
    """The tensor as contiguous float32, itself if it already is."""
    return (tensor if tensor.dtype == torch.float32 else tensor.float()).contiguous()


def empty(*shape: int) -> Tensor:
    """An uninitialised float32 tensor on the CPU, whatever the default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def threads() -> int:
    """As many threads as PyTorch uses."""
    return torch.get_num_threads()


def isa() -> str:
    """The instruction set in use: generic, avx2, avx512 or amx."""
    return module().isa()


def isas() -> list[str]:
    """The instruction sets that can run on this machine, slowest first."""
    return module().isas()


@contextlib.contextmanager
def force_isa(name: str) -> Iterator[None]:
    """Run native ops on one instruction set inside the block, for tests; ValueError if it cannot run here."""
    before = isa()
    module().force_isa(name)
    try:
        yield
    finally:
        module().force_isa(before)


def keep_freed_memory() -> bool:
    """Make the process keep the memory that tensors free, for later tensors; False if that is impossible.

    glibc takes large blocks from the system and gives them back when they are freed, so that every activation of
    every update gets new pages, which the kernel zeroes one by one: a fifth of the CPU time of an update, half of
    that of a fused op on large images. Call it once, first thing in a process that repeats the same work: it changes
    the whole process, whose size stays at its peak.
    """
    return module().keep_freed_memory()
