"""Results that an op writes into a tensor of the caller's: the same numbers as without, and nothing beside them."""

import pytest
import torch
from checks import backends, random

from hdfast_kernels import dispatch, layer_norm_gru, layer_norm_silu, native, sample_index

F32, BF16, I64 = torch.float32, torch.bfloat16, torch.int64
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])


def columns(lead: tuple[int, ...], width: int, before: int, after: int, dtype: torch.dtype, device: str):
    """A matrix of NaNs, and `width` of its columns."""
    whole = torch.full((*lead, before + width + after), torch.nan, dtype=dtype, device=device)
    return whole, whole[..., before : before + width]


def alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal, but that rows which lie together may be summed in another order."""
    return torch.allclose(found, expected, rtol=1e-5 if found.dtype == F32 else 1e-2, atol=1e-6)


def only_there(whole: torch.Tensor, before: int, width: int) -> bool:
    beside = torch.cat([whole[..., :before], whole[..., before + width :]], -1)
    return bool(beside.isnan().all() and whole[..., before : before + width].isfinite().all())


@pytest.mark.parametrize("backend", backends("layer_norm_silu"))
@pytest.mark.parametrize(
    ("lead", "width"), [((9,), 16), ((5,), 32), ((5,), 64), ((2, 3), 33), ((4,), 520), ((3,), 1)]
)
@DTYPES
def test_layer_norm_silu(lead, width, dtype, backend):
    x = random(*lead, width).to(backend.device, dtype)
    affine = [random(width, seed=seed).to(backend.device, F32) for seed in (1, 2)]
    expected = layer_norm_silu(x, *affine, backend=backend.name)
    for before, after in ((0, 0), (3, 2), (16, 0)):
        whole, place = columns(lead, width, before, after, dtype, backend.device)
        assert layer_norm_silu(x, *affine, out=place, backend=backend.name) is place
        assert alike(place, expected)
        assert only_there(whole, before, width)


@pytest.mark.parametrize("backend", backends("layer_norm_gru"))
@pytest.mark.parametrize(("lead", "width"), [((5,), 16), ((2, 3), 33), ((4,), 520), ((3,), 1)])
@DTYPES
def test_layer_norm_gru(lead, width, dtype, backend):
    gates, deter = (
        random(*lead, 3 * width).to(backend.device, dtype),
        random(*lead, width, seed=1).to(backend.device, F32),
    )
    affine = [random(3 * width, seed=seed).to(backend.device, F32) for seed in (2, 3)]
    expected = layer_norm_gru(gates, deter, *affine, backend=backend.name)
    for before, after in ((0, 0), (3, 2)):
        whole, place = columns(lead, width, before, after, F32, backend.device)
        low, rounded = columns(lead, width, after, before, BF16, backend.device)
        assert (
            layer_norm_gru(gates, deter, *affine, out=place, rounded=rounded, backend=backend.name) is place
        )
        assert torch.equal(place, expected)
        assert torch.equal(rounded, expected.bfloat16())
        assert only_there(whole, before, width)
        assert only_there(low, after, width)
    rounded = torch.empty(*lead, width, dtype=BF16, device=backend.device)
    assert torch.equal(layer_norm_gru(gates, deter, *affine, rounded=rounded, backend=backend.name), expected)
    assert torch.equal(rounded, expected.bfloat16())


@pytest.mark.parametrize("backend", backends("sample_index"))
@pytest.mark.parametrize("shape", [(5, 4, 6), (2, 3, 2, 33), (1, 18)], ids=str)
@DTYPES
def test_sample_index(shape, dtype, backend):
    logits = random(*shape, scale=2.0).to(backend.device, dtype)
    uniform = torch.rand(shape[:-1], generator=torch.Generator().manual_seed(1)).to(backend.device)
    expected = sample_index(logits, uniform, backend=backend.name)
    out = torch.full(shape[:-1], -1, dtype=I64, device=backend.device)
    one_hot = torch.nn.functional.one_hot(expected, shape[-1]).flatten(-2)
    for wide in (F32, BF16):
        dense = torch.full((*shape[:-2], shape[-2] * shape[-1]), torch.nan, dtype=wide, device=backend.device)
        assert sample_index(logits, uniform, out=out, dense=dense, backend=backend.name) is out
        assert torch.equal(out, expected)
        assert torch.equal(dense, one_hot.to(wide))
        dense.fill_(torch.nan)
        assert torch.equal(sample_index(logits, uniform, dense=dense, backend=backend.name), expected)
        assert torch.equal(dense, one_hot.to(wide))


@pytest.mark.parametrize("backend", backends("layer_norm_silu"))
def test_what_cannot_hold_a_result(backend):
    device = backend.device

    def silu(out: torch.Tensor, **grad: bool):
        layer_norm_silu(
            torch.ones(2, 4, device=device, **grad),
            *torch.ones(2, 4, device=device),
            out=out,
            backend=backend.name,
        )

    with pytest.raises(ValueError, match=r"^layer_norm_silu: out has shape \(2, 5\), expected \(2, 4\)$"):
        silu(torch.empty(2, 5, device=device))
    with pytest.raises(
        TypeError, match=r"^layer_norm_silu: out has dtype torch.bfloat16, expected torch.float32$"
    ):
        silu(torch.empty(2, 4, dtype=BF16, device=device))
    with pytest.raises(ValueError, match=r"^layer_norm_silu: out has strides \(1, 2\), expected whole rows"):
        silu(torch.empty(4, 2, device=device).mT)
    for overlapping in (
        torch.empty(1, 4, device=device).expand(2, 4),
        torch.empty(9, device=device).unfold(0, 4, 3),
    ):
        with pytest.raises(
            ValueError, match=r"^layer_norm_silu: out has strides \([03], 1\), expected whole rows"
        ):
            silu(overlapping[:2])
    uneven, rows = torch.empty(2, 6, 4, device=device)[:, :3], torch.ones(2, 3, 4, device=device)
    with pytest.raises(
        ValueError, match=r"^layer_norm_silu: out has strides \(24, 4, 1\), expected whole rows"
    ):
        layer_norm_silu(rows, rows[0, 0], rows[0, 0], out=uneven, backend=backend.name)
    with pytest.raises(ValueError, match=r"^layer_norm_silu: out is on meta, x on"):
        silu(torch.empty(2, 4, device="meta"))
    with pytest.raises(
        RuntimeError, match=r"^layer_norm_silu: out takes no gradient, and one is wanted; use torch.no_grad"
    ):
        silu(torch.empty(2, 4, device=device), requires_grad=True)
    with torch.no_grad():
        silu(torch.empty(2, 4, device=device), requires_grad=True)


@pytest.mark.parametrize("backend", backends("sample_index"))
def test_what_cannot_hold_classes(backend):
    device = backend.device

    def sample(**into: torch.Tensor):
        sample_index(
            torch.zeros(2, 3, 4, device=device),
            torch.zeros(2, 3, device=device),
            **into,
            backend=backend.name,
        )

    with pytest.raises(TypeError, match=r"^sample_index: out has dtype torch.int32, expected torch.int64$"):
        sample(out=torch.empty(2, 3, dtype=torch.int32, device=device))
    with pytest.raises(
        TypeError, match=r"^sample_index: dense has dtype torch.int64, expected torch.float32$"
    ):
        sample(dense=torch.empty(2, 12, dtype=I64, device=device))
    with pytest.raises(ValueError, match=r"^sample_index: dense has shape \(2, 3, 4\), expected \(2, 12\)$"):
        sample(dense=torch.empty(2, 3, 4, device=device))
    with pytest.raises(
        ValueError, match=r"^sample_index: dense has strides \(13, 1\), expected a contiguous tensor$"
    ):
        sample(dense=torch.empty(2, 13, device=device)[:, :12])
    with pytest.raises(ValueError, match=r"^sample_index: out is on meta, logits on"):
        sample(out=torch.empty(2, 3, dtype=I64, device="meta"))


@pytest.mark.parametrize("backend", backends("layer_norm_gru"))
def test_a_second_result_of_another_dtype(backend):
    rows, affine = torch.ones(2, 4, device=backend.device), torch.ones(12, device=backend.device)
    gates = torch.ones(2, 12, device=backend.device)
    with pytest.raises(
        TypeError, match=r"^layer_norm_gru: rounded has dtype torch.float32, expected torch.bfloat16$"
    ):
        layer_norm_gru(gates, rows, affine, affine, rounded=rows, backend=backend.name)


@pytest.mark.skipif(not dispatch.native_built(), reason="the C++ module is not built")
@pytest.mark.parametrize("isa", native.isas() if dispatch.native_built() else [])
@DTYPES
def test_every_instruction_set(isa, dtype):
    """Each has vectors of its own, and a path of its own for rows of one, two or four of them that lie together."""
    with native.force_isa(isa):
        for width in (4, 8, 16, 32, 64, 33):
            x, affine = random(37, width).to(dtype), random(2, width, seed=1).to(F32)
            expected = layer_norm_silu(x, *affine, backend="native")
            whole, place = columns((37,), width, 3, 2, dtype, "cpu")
            layer_norm_silu(x, *affine, out=place, backend="native")
            assert alike(place, expected)
            assert only_there(whole, 3, width)
            gates, deter = random(37, 3 * width).to(dtype), random(37, width, seed=1).to(F32)
            affine = random(2, 3 * width, seed=2).to(F32)
            expected = layer_norm_gru(gates, deter, *affine, backend="native")
            whole, place = columns((37,), width, 3, 2, F32, "cpu")
            low, rounded = columns((37,), width, 2, 3, BF16, "cpu")
            layer_norm_gru(gates, deter, *affine, out=place, rounded=rounded, backend="native")
            assert torch.equal(place, expected)
            assert torch.equal(rounded, expected.bfloat16())
            assert only_there(whole, 3, width)
            assert only_there(low, 2, width)
