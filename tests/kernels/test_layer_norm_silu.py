"""layer_norm_silu: every backend against float64, and the formula in literal numbers."""

import importlib
from functools import partial

import pytest
import torch
from checks import backends, check_against_fp64, random

from hdfast_kernels import layer_norm_silu, tiles
from hdfast_kernels.layer_norm_silu import layer_norm_silu_reference

# one row; odd channels; images of the encoder; hidden layers, whole and ragged; no rows; many rows
SHAPES = [
    (1, 7),
    (5, 33),
    (2, 4, 4, 32),
    (3, 5, 640),
    (7, 512),
    (5, 400),
    (6, 200),
    (9, 64),
    (0, 16),
    (600, 8),
]


def inputs(shape, dtype, device, offset=0.0):
    x = (random(*shape, scale=2.0) + offset).to(device, dtype)
    weight = 1 + random(shape[-1], seed=1, scale=0.3).to(device, torch.float32)
    bias = random(shape[-1], seed=2, scale=0.3).to(device, torch.float32)
    return {"x": x.requires_grad_(), "weight": weight.requires_grad_(), "bias": bias.requires_grad_()}


@pytest.mark.parametrize("backend", backends("layer_norm_silu", reference=False))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errs_no_more_than_twice_plain_pytorch(shape, dtype, backend):
    op = partial(layer_norm_silu, backend=backend.name)
    check_against_fp64(op, layer_norm_silu_reference, inputs(shape, dtype, backend.device))


@pytest.mark.parametrize("backend", backends("layer_norm_silu", reference=False))
@pytest.mark.parametrize("offset", [1e3, -1e3])
def test_far_from_zero(offset, backend):
    """A mean far larger than the deviation: the variance must not be computed as E[x^2] - E[x]^2."""
    op = partial(layer_norm_silu, backend=backend.name)
    check_against_fp64(op, layer_norm_silu_reference, inputs((6, 64), torch.float32, backend.device, offset))


@pytest.mark.parametrize("backend", backends("layer_norm_silu", reference=False))
def test_strided_input_and_constant_rows(backend):
    arguments = inputs((9, 4, 6), torch.float32, backend.device)
    x = arguments.pop("x").detach()
    x[0] = 3.0  # a row without variance
    arguments["x"] = x.transpose(0, 1).requires_grad_()
    op = partial(layer_norm_silu, backend=backend.name)
    check_against_fp64(op, layer_norm_silu_reference, arguments)


@pytest.mark.parametrize("backend", backends("layer_norm_silu", reference=False))
@pytest.mark.parametrize("channels", [6, 33, 96, 512])
def test_rows_of_equal_numbers(channels, backend):
    """The rounding error of the mean must not be divided by a deviation of zero, which eps makes 1/32."""
    arguments = inputs((40, channels), torch.float32, backend.device)
    x = arguments.pop("x").detach()
    x[::2] = 7 + torch.arange(20.0, device=x.device)[:, None] / 3
    arguments["x"] = x.requires_grad_()
    op = partial(layer_norm_silu, backend=backend.name)
    got = check_against_fp64(op, layer_norm_silu_reference, arguments)
    middle = torch.nn.functional.silu(arguments["bias"].detach())
    assert (got["0"][::2] - middle).abs().max() < 1e-6


@pytest.mark.parametrize("backend", [b for b in backends("layer_norm_silu") if "triton" in b.id])
@pytest.mark.parametrize("shape", [(600, 8), (7, 520), (27, 400)], ids=str)
def test_few_programs_take_many_tiles_and_repeat_bit_by_bit(shape, backend, monkeypatch):
    own = importlib.import_module("hdfast_kernels.layer_norm_silu")
    tile_of = own.backward_tile
    monkeypatch.setattr(own, "backward_tile", lambda *row: (tile_of(*row)[0], 2))
    monkeypatch.setattr(tiles, "SUM_ROWS", 1)
    op = partial(layer_norm_silu, backend=backend.name)
    first, second = (
        check_against_fp64(op, layer_norm_silu_reference, inputs(shape, torch.float32, backend.device))
        for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", backends("layer_norm_silu"))
def test_literal_numbers(backend):
    x = torch.tensor([[1.0, 3.0]], device=backend.device)  # mean 2, variance 1: normed -1, 1
    weight, bias = torch.tensor([2.0, 1.0], device=x.device), torch.tensor([1.0, 0.0], device=x.device)
    y = layer_norm_silu(x, weight, bias, eps=1e-12, backend=backend.name)
    assert y[0].tolist() == pytest.approx([-0.2689414, 0.7310586], rel=1e-6)  # silu(-1), silu(1)


def test_gradients_of_the_reference():
    arguments = {
        name: value.detach().double().requires_grad_()
        for name, value in inputs((3, 5), torch.float32, "cpu").items()
    }
    assert torch.autograd.gradcheck(layer_norm_silu_reference, tuple(arguments.values()))


def test_shape_mistakes_are_answered():
    with pytest.raises(ValueError, match=r"layer_norm_silu: bias has shape \(3,\), expected \(4,\)"):
        layer_norm_silu(torch.ones(2, 4), torch.ones(4), torch.ones(3))
    with pytest.raises(ValueError, match="eps is 0"):
        layer_norm_silu(torch.ones(2, 4), torch.ones(4), torch.ones(4), eps=0)
