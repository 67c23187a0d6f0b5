"""Windows of consecutive rows from per-environment rings: what replay sampling reads.

Axes: R = num_envs * ring rows of storage, B windows, T length; the rows of window b are
`base + (start - base + t) % ring` with `base = (start // ring) * ring`, so that a window that reaches the end
of its environment's ring goes on at its beginning.
"""

import torch
from torch import Tensor

from . import dispatch, native
from .numerics import check_device


def gather_windows_reference(storage: Tensor, starts: Tensor, length: int, ring: int) -> Tensor:
    base = starts // ring * ring
    step = torch.arange(length, device=starts.device).unsqueeze(1)  # (T, 1)
    rows = base + (starts - base + step) % ring  # (T, B)
    # index_select, unlike indexing, takes no negative row for one counted from the end.
    return storage.index_select(0, rows.flatten()).unflatten(0, rows.shape)


def _gather_windows_native(storage: Tensor, starts: Tensor, length: int, ring: int) -> Tensor:
    if not storage.is_contiguous():
        got = f"shape {tuple(storage.shape)} and strides {storage.stride()}"
        raise ValueError(
            f'gather_windows: native takes a contiguous storage, got one of {got}; use backend="reference"'
        )
    starts = starts.contiguous()
    out = storage.new_empty((length, starts.shape[0], *storage.shape[1:]))
    rows = storage.shape[0]
    row_bytes = storage.element_size() * (storage.numel() // rows) if rows else 0
    wrong = native.module().gather_windows(
        native.ptr(storage), row_bytes, rows, native.ptr(starts), starts.shape[0],
        length, ring, native.ptr(out), native.threads(),
    )  # fmt: skip
    if wrong >= 0:
        start = starts[wrong].item()
        raise IndexError(
            f"gather_windows: starts[{wrong}] = {start} is outside the {rows} rows of the storage"
        )
    return out


def gather_windows(
    storage: Tensor, starts: Tensor, length: int, ring: int, *, backend: str | None = None
) -> Tensor:
    """Rows of `storage` (R, ...) from `starts` (B,) int64 on, `length` each, as a new tensor (T, B, ...).

    Any dtype; no gradient.

    Raises ValueError where shapes or devices do not fit, and from native where the storage is not contiguous, since
    a copy would be of all of it; on the CPU, IndexError where a start lies outside the storage (on CUDA that is a
    device-side assertion, so that nothing synchronises).
    """
    if starts.ndim != 1 or starts.dtype != torch.int64:
        got = f"{starts.dtype} {tuple(starts.shape)}"
        raise ValueError(f"gather_windows: starts must be int64 of shape (B,), got {got}")
    if length < 1 or ring < 1 or storage.ndim < 1 or storage.shape[0] % ring:
        must = f"must be positive, ring divide the rows of {tuple(storage.shape)}"
        raise ValueError(f"gather_windows: length {length} and ring {ring} {must}")
    check_device("gather_windows", storage=storage, starts=starts)
    implementation = dispatch.resolve("gather_windows", backend, storage)
    return implementation(storage, starts, length, ring)


dispatch.register(
    "gather_windows", reference=gather_windows_reference, native=_gather_windows_native, dtypes=None
)
