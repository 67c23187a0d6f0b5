"""linear, and the matrix products that are oneDNN's or ours."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from checks import backends, check_against_fp64, random

from hdfast_kernels import dispatch, linear, linear_fused, linear_native, native, report_cases
from tests.calls import Calls

ISAS = native.isas() if dispatch.native_built() else []

# leading axes, inputs, outputs: one row; none; odd; small; large enough for oneDNN, wider one way and the other
SHAPES = [
    ((1,), 5, 3),
    ((0,), 4, 6),
    ((3, 7), 33, 17),
    ((64,), 128, 128),
    ((8, 40), 72, 300),
    ((513,), 250, 31),
]


@pytest.fixture(params=[True, False], ids=["onednn", "mkl"])
def library(request, monkeypatch):
    """Whose product it is on the CPU; and whether small ones are padded, too."""
    monkeypatch.setattr(linear_native, "mkl_is_slow", lambda: request.param)
    if request.param:
        monkeypatch.setattr(linear_fused, "ENOUGH", 0)
    return request.param


def inputs(leading, width, outputs, dtype, device="cpu"):
    return {
        "x": random(*leading, width).to(device, dtype).requires_grad_(),
        "weight": random(outputs, width, seed=1, scale=0.1).to(device, dtype).requires_grad_(),
        "bias": random(outputs, seed=2).to(device, dtype).requires_grad_(),
    }


@pytest.mark.parametrize("backend", backends("linear", reference=False))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("leading", "width", "outputs"), SHAPES)
def test_errs_no_more_than_twice_plain_pytorch(leading, width, outputs, dtype, backend, library):
    op = partial(linear, backend=backend.name)
    arguments = inputs(leading, width, outputs, dtype, backend.device)
    check_against_fp64(op, F.linear, arguments)
    check_against_fp64(op, F.linear, {name: arguments[name] for name in ("x", "weight")})


@pytest.mark.parametrize("backend", backends("linear", reference=False))
def test_only_the_gradients_that_are_wanted(backend, library):
    x, weight, bias = inputs((64,), 256, 128, torch.float32, backend.device).values()
    linear(x.detach(), weight, bias.detach(), backend=backend.name).sum().backward()
    assert (x.grad, bias.grad) == (None, None)
    assert weight.grad.is_contiguous()


@pytest.mark.parametrize("backend", backends("linear", reference=False))
def test_rows_and_weights_that_are_not_contiguous(backend, library):
    x = random(256, 80).float().mT.requires_grad_()
    weight = random(256, 90).float().mT.requires_grad_()
    bias = random(180, seed=1).float()[::2].requires_grad_()
    for more in ({}, {"bias": bias}, {"bias": random(1).float().expand(90)}):
        arguments = {"x": x, "weight": weight, **more}
        check_against_fp64(partial(linear, backend=backend.name), F.linear, arguments)


@pytest.mark.parametrize("shape", [(300, 70, 90), (90, 300, 70), (70, 90, 300), (2, 3, 4)])
def test_products_of_every_layout(shape, library):
    rows, inner, columns = shape
    for a in (random(rows, inner).float(), random(inner, rows).float().mT):
        for b in (random(inner, columns, seed=1).float(), random(columns, inner, seed=1).float().mT):
            check_against_fp64(linear_native.product, lambda a, b: a @ b, {"a": a, "b": b})


# rows, inputs, outputs; not a multiple of a unit (4 numbers of float32, 8 of bfloat16): outputs, both, inputs
PADDED = [((5, 4), 64, 255), ((9,), 16, 1), ((9,), 16, 6), ((7,), 39, 13), ((7,), 39, 16), ((0,), 8, 3)]


@pytest.mark.parametrize("backend", backends("linear", reference=False))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("leading", "width", "outputs"), PADDED)
def test_widths_that_are_not_whole_units(leading, width, outputs, dtype, backend, monkeypatch):
    monkeypatch.setattr(linear_fused, "ENOUGH", 0)
    op = partial(linear, backend=backend.name)
    arguments = inputs(leading, width, outputs, dtype, backend.device)
    check_against_fp64(op, F.linear, arguments)
    check_against_fp64(op, F.linear, {name: arguments[name] for name in ("x", "weight")})


def test_a_large_product_of_fused_is_made_of_whole_units():
    x, weight, bias = inputs((1024,), 512, 255, torch.bfloat16).values()
    with Calls() as calls:
        y = linear(x, weight, bias, backend="fused")
        y.backward(torch.ones_like(y))
    assert (y.shape, y.stride()) == ((1024, 255), (256, 1))
    assert weight.grad.is_contiguous()
    products = [given for name, given in calls.made if "aten.mm" in name or "aten.addmm" in name]
    assert len(products) == 3
    for given in products:
        assert all(width % 8 == 0 for matrix in given if matrix.dim() == 2 for width in matrix.shape)
    with Calls() as calls:  # too small; already a multiple
        assert linear(x[:8], weight, bias, backend="fused").is_contiguous()
        assert linear(x, weight[:248], bias[:248], backend="fused").is_contiguous()
    assert not any("cat" in name for name, _ in calls.made)


def test_fused_needs_no_values():
    x, weight, bias = (
        report_cases.meta(*shape, dtype=torch.bfloat16, grad=True)
        for shape in ((16, 1024, 510), (255, 510), (255,))
    )
    report_cases.backward(linear(x, weight, bias, backend="fused"))
    assert [given.grad.shape for given in (x, weight, bias)] == [x.shape, weight.shape, bias.shape]


# Rows, width of the gradient and of the activations: odd widths; narrow ones; one row; rows that threads divide; so
# narrow that there is nothing left for some of many threads.
OF_WEIGHTS = [
    (300, 70, 90),
    (90, 255, 300),
    (700, 6, 260),
    (700, 260, 6),
    (1, 1200, 900),
    (4096, 33, 17),
    (5000, 20, 31),
    (4100, 6, 32),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 4, 16])
@pytest.mark.parametrize("shape", OF_WEIGHTS, ids=str)
def test_gradients_of_weights_of_every_shape(shape, threads, isa, monkeypatch):
    monkeypatch.setattr(linear_native, "ENOUGH", 0)
    monkeypatch.setattr(linear_native, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(native, "threads", lambda: threads)
    rows, of_grad, of_x = shape
    inputs = {"grad": random(rows, of_grad).float(), "x": random(rows, of_x, seed=1).float()}
    with native.force_isa(isa), Calls() as calls:
        check_against_fp64(linear_native.weight_grad, lambda grad, x: grad.mT @ x, inputs)
    assert (
        sum("aten.mm" in name for name, _ in calls.made) == 2
    )  # of the reference, in float32 and in float64


@pytest.mark.skipif(not dispatch.native_built(), reason="the C++ module is not built")
def test_a_large_float32_product_is_onednns(monkeypatch):
    monkeypatch.setattr(linear_native, "mkl_is_slow", lambda: True)
    x, weight, _ = inputs((64,), 256, 128, torch.float32).values()
    with Calls() as calls:
        linear(x, weight, backend="native").sum().backward()
        assert sum("_linear_pointwise" in name for name, _ in calls.made) == 2
        linear(x[:2], weight, backend="native")  # too small
    assert sum("_linear_pointwise" in name for name, _ in calls.made) == 2


@pytest.mark.parametrize("backend", backends("linear"))
@pytest.mark.parametrize(("of_x", "of_weight"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_weights_of_another_dtype_are_rounded_to_that_of_x(of_x, of_weight, backend, library):
    of_x, of_weight = getattr(torch, of_x), getattr(torch, of_weight)
    x, weight, bias = inputs((64,), 256, 128, torch.float32, backend.device).values()
    x = x.detach().to(of_x)
    for values in (
        (weight.detach().to(of_weight), bias.detach().to(of_weight)),
        (weight.detach(), bias.to(of_weight)),
    ):
        mixed = [value.detach().requires_grad_() for value in values]
        rounded = [value.detach().to(of_x).requires_grad_() for value in values]
        ours, theirs = linear(x, *mixed, backend=backend.name), F.linear(x, *rounded)
        assert ours.dtype == of_x
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
        ours.sum().backward()
        theirs.sum().backward()
        for mine, other in zip(mixed, rounded, strict=True):
            assert mine.grad.dtype == mine.dtype
            torch.testing.assert_close(mine.grad, other.grad.to(mine.dtype), rtol=2e-2, atol=1e-4)


def test_mistakes_are_answered():
    with pytest.raises(TypeError, match=r"linear: x has dtype torch\.int64, expected a float one"):
        linear(torch.zeros(2, 5, dtype=torch.int64), torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"weight has shape \(3, 4\), expected \(3, 5\)"):
        linear(torch.zeros(2, 5), torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"bias has shape \(2,\), expected \(3,\)"):
        linear(torch.zeros(2, 5), torch.zeros(3, 5), torch.zeros(2))
