"""gather_windows: the rows of every window, on every backend."""

import pytest
import torch
from checks import backends

from hdfast_kernels import gather_windows

RING, ENVS = 7, 3


def expected(storage, starts, length):
    windows = []
    for start in starts.tolist():
        base = start // RING * RING
        windows.append(torch.stack([storage[base + (start - base + t) % RING] for t in range(length)]))
    return torch.stack(windows, dim=1)  # (T, B, ...)


@pytest.mark.parametrize("backend", backends("gather_windows"))
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.bool, torch.int64, torch.float32, torch.bfloat16], ids=str
)
@pytest.mark.parametrize("row", [(), (3,), (5, 4, 3), (0,)], ids=str)
def test_windows_go_on_at_the_start_of_their_ring(row, dtype, backend):
    storage = torch.randint(256, (ENVS * RING, *row), generator=torch.Generator().manual_seed(0)).to(dtype)
    starts = torch.tensor([0, 6, 7, 12, 20, 20, 3])
    for length in (1, 4, RING, 2 * RING + 1):
        got = gather_windows(
            storage.to(backend.device), starts.to(backend.device), length, RING, backend=backend.name
        )
        assert got.dtype == dtype
        assert got.is_contiguous()
        assert torch.equal(got.cpu(), expected(storage, starts, length))


@pytest.mark.parametrize("backend", backends("gather_windows"))
def test_rows_large_enough_for_several_threads(backend):
    storage = torch.randint(256, (ENVS * RING, 64, 64, 3), generator=torch.Generator().manual_seed(0)).byte()
    starts = torch.tensor([5, 13, 14])
    got = gather_windows(storage.to(backend.device), starts.to(backend.device), 9, RING, backend=backend.name)
    assert torch.equal(got.cpu(), expected(storage, starts, 9))


@pytest.mark.parametrize("backend", [b for b in backends("gather_windows") if "cuda" in b.id])
def test_a_storage_beyond_32_bits(backend):
    """Two rings of 1.2 GB each; the last rows of the second are asked for."""
    ring = 100_000
    storage = torch.arange(2 * ring, device=backend.device)[:, None, None].to(torch.uint8).repeat(1, 64, 192)
    starts = torch.tensor([2 * ring - 3, ring - 1, 2 * ring - 1], device=backend.device)
    got = gather_windows(storage, starts, 5, ring, backend=backend.name)
    base = starts // ring * ring
    rows = base + (starts - base + torch.arange(5, device=backend.device)[:, None]) % ring
    assert torch.equal(got[:, :, 63, 191], rows.to(torch.uint8))
    assert torch.equal(got[:, :, 0, 0], rows.to(torch.uint8))


@pytest.mark.parametrize("backend", backends("gather_windows"))
def test_no_windows(backend):
    storage = torch.zeros(ENVS * RING, 2, device=backend.device)
    none = torch.empty(0, dtype=torch.int64, device=backend.device)
    assert gather_windows(storage, none, 4, RING, backend=backend.name).shape == (4, 0, 2)


@pytest.mark.parametrize("backend", [b for b in backends("gather_windows") if "cuda" not in b.id])
@pytest.mark.parametrize("wrong", [-1, ENVS * RING, 2**40])
def test_a_start_outside_the_storage(wrong, backend):
    arguments = torch.ones(ENVS * RING, 2), torch.tensor([3, wrong]), 4, RING
    if backend.name == "triton":  # as on a GPU, where the host does not check
        windows = gather_windows(*arguments, backend=backend.name)
        assert windows[:, 0].eq(1).all()
        assert windows[:, 1].eq(0).all()
        return
    with pytest.raises(IndexError):
        gather_windows(*arguments, backend=backend.name)


def test_the_native_error_says_which_start():
    with pytest.raises(IndexError, match=r"^gather_windows: starts\[1\] = 21 is outside the 21 rows"):
        gather_windows(torch.zeros(ENVS * RING), torch.tensor([3, 21]), 4, RING, backend="native")


def test_mistakes_are_answered():
    storage, starts = torch.zeros(ENVS * RING), torch.tensor([0])
    with pytest.raises(
        ValueError, match=r"^gather_windows: starts must be int64 of shape \(B,\), got torch.int32"
    ):
        gather_windows(storage, starts.int(), 4, RING)
    with pytest.raises(ValueError, match=r"got torch.int64 \(1, 1\)"):
        gather_windows(storage, starts[None], 4, RING)
    for length, ring in ((0, RING), (4, 0), (4, 5)):
        with pytest.raises(
            ValueError,
            match=rf"^gather_windows: length {length} and ring {ring} must be positive, ring divide",
        ):
            gather_windows(storage, starts, length, ring)
    with pytest.raises(
        ValueError, match=r"^gather_windows: native takes a contiguous storage, .* strides \(1, 21\); use"
    ):
        gather_windows(torch.zeros(2, ENVS * RING).T, starts, 4, RING, backend="native")


@pytest.mark.parametrize("backend", backends("gather_windows"))
@pytest.mark.parametrize(
    ("dtype", "offset", "row"), [(torch.uint8, 6, 6), (torch.uint8, 4, 8), (torch.bfloat16, 1, 2)]
)
def test_a_storage_that_begins_between_words(dtype, offset, row, backend):
    whole = torch.arange(offset + ENVS * RING * row, device=backend.device).to(dtype)
    storage = whole[offset:].view(-1, row)
    starts = torch.tensor([2, 13, 20], device=backend.device)
    got = gather_windows(storage, starts, 5, RING, backend=backend.name)
    assert torch.equal(got.cpu(), expected(storage.cpu(), starts, 5))


@pytest.mark.parametrize("backend", backends("gather_windows"))
def test_starts_that_lie_apart(backend):
    storage = torch.arange(50.0, device=backend.device)[:, None]
    starts = torch.arange(40, device=backend.device)[::2]
    found = gather_windows(storage, starts, 3, 50, backend=backend.name)
    assert torch.equal(found[:, :, 0], (starts + torch.arange(3, device=backend.device)[:, None]).float())
