"""harmony_loss: the paper's sum in literal numbers, and every backend against float64."""

import math
import sys

import pytest
import torch
from checks import backends, check_against_fp64, random

from hdfast_kernels import harmony_loss
from hdfast_kernels.harmony_loss import harmony_loss_reference

GROUP, WEIGHT, REGULARIZER = (0, 1, 2, 2, -1), (1.0, 1.0, 5 / 6, 1 / 6, 1.0), (1.0, 1.0, 5 / 6)


def inputs(shape, dtype, device, s=(0.5, -1.0, 2.0)):
    losses = {f"loss{k}": random(*shape, seed=k).abs().to(device, dtype).requires_grad_() for k in range(5)}
    return losses | {"log_sigma": torch.tensor(s, device=device).requires_grad_()}


def named(function, **options):
    def call(log_sigma, **losses):
        return function(list(losses.values()), log_sigma, GROUP, WEIGHT, REGULARIZER, **options)

    return call


@pytest.mark.parametrize("backend", backends("harmony_loss", reference=False))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 7), (64, 16), (2500,)], ids=str)
def test_errs_no_more_than_twice_plain_pytorch(shape, dtype, backend):
    op = named(harmony_loss, backend=backend.name)
    check_against_fp64(op, named(harmony_loss_reference), inputs(shape, dtype, backend.device))


@pytest.mark.parametrize("backend", backends("harmony_loss", reference=False))
def test_extreme_scalars_mixed_dtypes_and_strides(backend):
    arguments = inputs((6, 5), torch.float32, backend.device, s=(15.0, -15.0, 0.0))
    arguments["loss1"] = arguments["loss1"].detach().bfloat16().requires_grad_()
    arguments["loss3"] = arguments["loss3"].detach().view(5, 6).T.requires_grad_()
    check_against_fp64(named(harmony_loss, backend=backend.name), named(harmony_loss_reference), arguments)


@pytest.mark.parametrize("backend", backends("harmony_loss", reference=False))
def test_the_mean_of_many_equal_numbers(backend, monkeypatch):
    """A sum as large as float32 can count to in such steps is rounded at each step, always in the same direction."""
    # The same number of steps with fewer numbers.
    monkeypatch.setattr(sys.modules["hdfast_kernels.harmony_loss"], "BLOCK", 8)
    rows = 1 << (15 if backend.name == "triton" else 21)
    loss, none = torch.full((rows,), 0.1, device=backend.device), torch.empty(0, device=backend.device)
    check_against_fp64(
        lambda loss: harmony_loss([loss], none, (-1,), (1.0,), (), backend=backend.name),
        lambda loss: harmony_loss_reference([loss], none.to(loss.dtype), (-1,), (1.0,), ()),
        {"loss": loss},
    )


@pytest.mark.parametrize("backend", backends("harmony_loss"))
def test_literal_numbers(backend):
    losses = [torch.tensor([1.0, 3.0], device=backend.device, requires_grad=True) for _ in range(2)]
    s = torch.tensor([math.log(4.0)], device=backend.device, requires_grad=True)
    total, means = harmony_loss(losses, s, (0, -1), (0.5, 3.0), (2.0,), backend=backend.name)
    total.backward()
    assert total.item() == pytest.approx(0.5 * 2 / 4 + 3 * 2 + 2 * math.log(5), rel=1e-6)
    assert means.tolist() == [2.0, 2.0]
    assert not means.requires_grad
    assert losses[0].grad.tolist() == pytest.approx([0.5 / 4 / 2] * 2)
    assert losses[1].grad.tolist() == pytest.approx([1.5] * 2)
    assert s.grad.tolist() == pytest.approx([-0.5 * 2 / 4 + 2 * 4 / 5], rel=1e-6)


@pytest.mark.parametrize("backend", backends("harmony_loss"))
def test_no_groups_is_the_weighted_sum(backend):
    losses = [torch.full((4,), float(k), device=backend.device, requires_grad=True) for k in (1, 2)]
    none = torch.empty(0, device=backend.device)
    total, _ = harmony_loss(losses, none, (-1, -1), (1.0, 10.0), (), backend=backend.name)
    total.backward()
    assert total.item() == pytest.approx(21.0)
    assert losses[1].grad.tolist() == [2.5] * 4


def test_gradients_of_the_reference():
    arguments = inputs((2, 2), torch.float64, "cpu")
    s = arguments.pop("log_sigma").detach().double().requires_grad_()
    total = lambda s, *losses: harmony_loss_reference(losses, s, GROUP, WEIGHT, REGULARIZER)[0]  # noqa: E731
    assert torch.autograd.gradcheck(total, (s, *arguments.values()))


@pytest.mark.parametrize(
    ("losses", "sigma", "group", "weight", "regularizer", "message"),
    [
        ([], 1, (), (), (1.0,), "0 losses"),
        ([(2,)], 1, (0,), (1.0, 1.0), (1.0,), "1 losses, 1 groups, 2 weights"),
        ([(2,), (3,)], 1, (0, 0), (1.0, 1.0), (1.0,), r"losses\[1\] has shape \(3,\), expected \(2,\)"),
        ([(2,)], 1, (1,), (1.0,), (1.0,), r"group\[0\] is 1, expected -1 to 0"),
        ([(2,)], 2, (0,), (1.0,), (1.0,), r"log_sigma has shape \(2,\), expected \(1,\)"),
        ([(0,)], 1, (0,), (1.0,), (1.0,), "losses are empty"),
    ],
)
def test_mistakes_are_answered(losses, sigma, group, weight, regularizer, message):
    with pytest.raises(ValueError, match=message):
        harmony_loss([torch.zeros(shape) for shape in losses], torch.zeros(sigma), group, weight, regularizer)
