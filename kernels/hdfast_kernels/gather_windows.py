"""Windows of consecutive rows from per-environment rings: what replay sampling reads.

Axes: R = num_envs * ring rows of storage, B windows, T length; the rows of window b are
`base + (start - base + t) % ring` with `base = (start // ring) * ring`, so that a window that reaches the end
of its environment's ring goes on at its beginning.
"""

import torch
from torch import Tensor

from . import dispatch, native
from ._triton import tl, triton
from .numerics import check_device, check_tensor

# Words that a program copies: two 16-byte loads a thread of 4 warps; for short rows one a thread, found by division.
TILE, WARPS = 1024, 4


def gather_windows_reference(storage: Tensor, starts: Tensor, length: int, ring: int) -> Tensor:
    base = starts // ring * ring
    step = torch.arange(length, device=starts.device).unsqueeze(1)  # (T, 1)
    rows = base + (starts - base + step) % ring  # (T, B)
    # index_select, unlike indexing, takes no negative row for one counted from the end.
    return storage.detach().index_select(0, rows.flatten()).unflatten(0, rows.shape)


@triton.jit
def gather_windows_forward(
    storage_ptr,
    starts_ptr,
    out_ptr,
    stored,
    rows,
    windows,
    ring,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copies some rows of the output (T * B, WORDS), or a part of one, from their places in the storage."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    start = tl.load(starts_ptr + row % windows, mask=row < rows, other=-1)
    base = start // ring * ring
    at = base + (start - base + row // windows) % ring
    inside = (start >= 0) & (start < stored) & (word < WORDS)
    copied = tl.load(storage_ptr + at * WORDS + word, mask=inside, other=0)
    tl.store(out_ptr + row * WORDS + word, copied, mask=(row < rows) & (word < WORDS))


def _gather_windows_triton(storage: Tensor, starts: Tensor, length: int, ring: int) -> Tensor:
    _require_contiguous("triton", storage)
    starts = starts.contiguous()
    windows = len(starts)
    out = storage.new_empty((length, windows, *storage.shape[1:]))
    if not out.numel():
        return out
    row_bytes = out[0, 0].nbytes
    offset = storage.storage_offset() * storage.element_size()
    word = next(
        word
        for word in (torch.int32, torch.int16, torch.uint8)
        if row_bytes % word.itemsize == 0 and offset % word.itemsize == 0
    )
    words, rows = row_bytes // word.itemsize, length * windows
    block = min(TILE, triton.next_power_of_2(words))
    tile = min(TILE // block, 32 * WARPS)
    gather_windows_forward[(triton.cdiv(rows, tile), triton.cdiv(words, block))](
        storage.view(-1).view(word), starts, out.view(-1).view(word), len(storage), rows, windows, ring,
        words, tile, block, num_warps=WARPS,
    )  # fmt: skip
    return out


def _require_contiguous(backend: str, storage: Tensor) -> None:
    if storage.is_conj() or storage.is_neg():
        raise ValueError(
            f"gather_windows: {backend} takes a storage as it is in memory, got one that is negated or conjugated "
            'when it is read; use backend="reference"'
        )
    if not storage.is_contiguous():
        got = f"shape {tuple(storage.shape)} and strides {storage.stride()}"
        raise ValueError(
            f'gather_windows: {backend} takes a contiguous storage, got one of {got}; use backend="reference"'
        )


def _gather_windows_native(storage: Tensor, starts: Tensor, length: int, ring: int) -> Tensor:
    _require_contiguous("native", storage)
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

    Raises ValueError where shapes or devices do not fit, and from native and triton if the storage is not
    contiguous, since all of it would be copied; on the CPU, IndexError if a start lies outside the storage. On CUDA,
    where nothing synchronises, the reference then fails a device-side assertion, and triton gives zeros.
    """
    check_tensor("gather_windows", "storage", storage)
    check_tensor("gather_windows", "starts", starts)
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
    "gather_windows",
    reference=gather_windows_reference,
    triton=_gather_windows_triton,
    native=_gather_windows_native,
    dtypes=None,
)
