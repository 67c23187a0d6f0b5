"""layer_norm_gru: every backend against float64, saturated gates, and the formula in literal numbers."""

import importlib
import math
from functools import partial

import pytest
import torch
from checks import backends, check_against_fp64, random

from hdfast_kernels import layer_norm_gru
from hdfast_kernels.layer_norm_gru import layer_norm_gru_reference

# rows and deter: one row; odd; an observe step, narrow; leading axes; none; many rows; wide
SHAPES = [((1,), 5), ((7,), 33), ((16,), 64), ((2, 3), 200), ((0,), 8), ((300,), 8), ((3,), 2100)]


def inputs(rows, deter, dtype, device, scale=1.0):
    out = {
        "gates": random(*rows, 3 * deter, scale=2.0).to(device, dtype),
        "deter": random(*rows, deter, seed=1, scale=0.5).tanh().to(device, torch.float32),
        "weight": (1 + random(3 * deter, seed=2, scale=0.3)).mul(scale).to(device, torch.float32),
        "bias": random(3 * deter, seed=3, scale=0.3 * scale).to(device, torch.float32),
    }
    return {name: value.requires_grad_() for name, value in out.items()}


@pytest.mark.parametrize("backend", backends("layer_norm_gru", reference=False))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "deter"), SHAPES, ids=str)
def test_errs_no_more_than_twice_plain_pytorch(rows, deter, dtype, backend):
    op = partial(layer_norm_gru, backend=backend.name)
    check_against_fp64(op, layer_norm_gru_reference, inputs(rows, deter, dtype, backend.device))


@pytest.mark.parametrize("backend", backends("layer_norm_gru", reference=False))
def test_saturated_gates(backend):
    op = partial(layer_norm_gru, backend=backend.name)
    arguments = inputs((6,), 40, torch.float32, backend.device, scale=200.0)
    # One minus a gate of nearly one is mostly rounding error, and a GPU's division rounds four times as much.
    check_against_fp64(op, layer_norm_gru_reference, arguments, budget=4.0)


@pytest.mark.parametrize("backend", backends("layer_norm_gru", reference=False))
@pytest.mark.parametrize("deter", [33, 200, 2100])
def test_rows_of_equal_numbers(deter, backend):
    """The rounding error of the mean must not be divided by a deviation of zero, which eps makes 1/32."""
    arguments = inputs((6,), deter, torch.float32, backend.device)
    gates = arguments["gates"].detach()
    gates[::2] = 7 + torch.arange(3.0, device=gates.device)[:, None] / 3
    arguments["gates"] = gates.requires_grad_()
    check_against_fp64(partial(layer_norm_gru, backend=backend.name), layer_norm_gru_reference, arguments)


@pytest.mark.parametrize("backend", backends("layer_norm_gru", reference=False))
@pytest.mark.parametrize("scale", [1e-4, 1e-5])
def test_small_candidates_keep_their_digits(scale, backend):
    """Where 1 - e^x would be all rounding; the deviation is far below eps, so that the norm keeps them small."""
    gates = torch.randn(64, 192, generator=torch.Generator().manual_seed(0)) * scale
    affine = {"weight": torch.ones(192), "bias": torch.zeros(192)}
    arguments = {"gates": gates, "deter": torch.zeros(64, 64), **affine}
    arguments = {name: value.to(backend.device) for name, value in arguments.items()}
    check_against_fp64(partial(layer_norm_gru, backend=backend.name), layer_norm_gru_reference, arguments)


@pytest.mark.parametrize("backend", backends("layer_norm_gru", reference=False))
def test_bfloat16_state_stays_bfloat16(backend):
    arguments = inputs((5,), 24, torch.bfloat16, backend.device)
    arguments["deter"] = arguments["deter"].detach().bfloat16().requires_grad_()
    result = check_against_fp64(
        partial(layer_norm_gru, backend=backend.name), layer_norm_gru_reference, arguments
    )
    assert result["0"].dtype == torch.bfloat16


@pytest.mark.parametrize("backend", [b for b in backends("layer_norm_gru") if "triton" in b.id])
@pytest.mark.parametrize(
    ("rows", "deter", "settings"),
    [(300, 8, {"PARTIALS": 2}), (24, 40, {"WIDEST": 32, "CHUNK": 16, "WIDE_PARTIALS": 2})],
    ids=["whole rows", "chunks"],
)
def test_few_programs_take_many_tiles_and_repeat_bit_by_bit(backend, rows, deter, settings, monkeypatch):
    for name, value in settings.items():
        monkeypatch.setattr(importlib.import_module("hdfast_kernels.layer_norm_gru"), name, value)
    op = partial(layer_norm_gru, backend=backend.name)
    first, second = (
        check_against_fp64(
            op, layer_norm_gru_reference, inputs((rows,), deter, torch.float32, backend.device)
        )
        for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", backends("layer_norm_gru"))
def test_literal_numbers(backend):
    gates = torch.tensor([[1.0, -1.0, 0.0]], device=backend.device)  # mean 0, variance 2/3
    weight = torch.full((3,), math.sqrt(2 / 3), device=gates.device)  # so that the norm gives the gates back
    bias = torch.tensor([0.0, 3.0, 1.0], device=gates.device)  # reset 1, candidate 2, update 1
    deter = torch.tensor([[0.5]], device=gates.device)
    cand = math.tanh(2 / (1 + math.exp(-1)))
    out = layer_norm_gru(gates, deter, weight, bias, eps=1e-12, backend=backend.name)
    assert out.item() == pytest.approx(0.5 * cand + 0.5 * 0.5, rel=1e-6)  # sigmoid(1 - 1) = 1/2


def test_gradients_of_the_reference():
    arguments = inputs((2,), 3, torch.float32, "cpu").values()
    arguments = tuple(value.detach().double().requires_grad_() for value in arguments)
    assert torch.autograd.gradcheck(layer_norm_gru_reference, arguments)


def test_shape_mistakes_are_answered():
    with pytest.raises(ValueError, match=r"layer_norm_gru: gates has shape \(2, 8\), expected \(2, 12\)"):
        layer_norm_gru(torch.ones(2, 8), torch.ones(2, 4), torch.ones(12), torch.ones(12))
    with pytest.raises(ValueError, match="eps is 0"):
        layer_norm_gru(torch.ones(2, 12), torch.ones(2, 4), torch.ones(12), torch.ones(12), eps=0)
