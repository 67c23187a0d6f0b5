"""lambda_return: literal numbers, the two limits of lambda, and every backend against float64."""

from functools import partial

import pytest
import torch
from checks import backends, check_against_fp64, random

from hdfast_kernels import lambda_return
from hdfast_kernels.lambda_return import lambda_return_reference


def inputs(H, N, dtype, device, scale=1.0):
    cont = (random(H + 1, N, seed=2) > -1.0).to(device, dtype)  # some episodes end
    return {
        "reward": random(H, N, scale=scale).to(device, dtype).requires_grad_(),
        "cont": cont,
        "value": random(H + 1, N, seed=1, scale=scale).to(device, dtype).requires_grad_(),
    }


@pytest.mark.parametrize("backend", backends("lambda_return", reference=False))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("H", "N"), [(1, 1), (3, 5), (15, 70), (2, 0), (40, 3)])
def test_errs_no_more_than_twice_plain_pytorch(H, N, dtype, backend):
    op = partial(lambda_return, backend=backend.name)
    check_against_fp64(op, lambda_return_reference, inputs(H, N, dtype, backend.device))


@pytest.mark.parametrize("backend", backends("lambda_return", reference=False))
def test_huge_rewards(backend):
    arguments = inputs(15, 6, torch.float32, backend.device, scale=1e6) | {"discount": 0.9, "lam": 0.5}
    check_against_fp64(partial(lambda_return, backend=backend.name), lambda_return_reference, arguments)


@pytest.mark.parametrize("backend", backends("lambda_return", reference=False))
def test_a_lambda_of_almost_one(backend):
    """1 - lambda must not be computed from a rounded lambda. The last value, which would hide that, has no weight."""
    arguments = inputs(5, 70, torch.float32, backend.device) | {"lam": 0.9999}
    arguments["reward"] = torch.zeros_like(arguments["reward"])
    arguments["cont"] = torch.ones_like(arguments["cont"])
    arguments["cont"][-1] = 0
    check_against_fp64(partial(lambda_return, backend=backend.name), lambda_return_reference, arguments)


@pytest.mark.parametrize("backend", backends("lambda_return"))
def test_literal_numbers(backend):
    reward = torch.tensor([[1.0], [2.0]], device=backend.device)
    cont = torch.tensor([[1.0], [1.0], [0.5]], device=backend.device)
    value = torch.tensor([[7.0], [4.0], [8.0]], device=backend.device)
    returns, weight = lambda_return(reward, cont, value, discount=0.5, lam=0.5, backend=backend.name)
    last = 2 + 0.5 * 0.5 * 8  # one step: the bootstrap alone
    assert returns.flatten().tolist() == [1 + 0.5 * (0.5 * 4 + 0.5 * last), last]
    assert weight.flatten().tolist() == [1.0, 0.5, 0.125]
    assert not weight.requires_grad


@pytest.mark.parametrize("backend", backends("lambda_return"))
def test_the_defaults_are_dreamerv3_s(backend):
    given = inputs(4, 3, torch.float32, backend.device)
    found = lambda_return(**given, backend=backend.name)
    expected = lambda_return(**given, discount=1 - 1 / 333, lam=0.95, backend=backend.name)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", backends("lambda_return"))
def test_limits_of_lambda(backend):
    given = {name: value.detach() for name, value in inputs(5, 4, torch.float32, backend.device).items()}
    reward, value, decay = given["reward"], given["value"], 0.9 * given["cont"]
    one_step, _ = lambda_return(**given, discount=0.9, lam=0.0, backend=backend.name)
    assert torch.allclose(one_step, reward + decay[1:] * value[1:], rtol=1e-5, atol=1e-6)
    monte_carlo, _ = lambda_return(**given, discount=0.9, lam=1.0, backend=backend.name)
    expected = value[5]
    for t in reversed(range(5)):
        expected = reward[t] + decay[t + 1] * expected
    assert torch.allclose(monte_carlo[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", backends("lambda_return"))
def test_the_first_value_and_cont_get_no_gradient(backend):
    given = inputs(3, 2, torch.float32, backend.device)
    given["cont"].requires_grad_()
    returns, _ = lambda_return(**given, backend=backend.name)
    dcont, dvalue = torch.autograd.grad(
        returns.sum(), (given["cont"], given["value"]), allow_unused=True, materialize_grads=True
    )
    assert dcont.abs().max() == 0
    assert dvalue[0].abs().max() == 0


def test_gradients_of_the_reference():
    reward, cont, value = inputs(4, 3, torch.float64, "cpu").values()
    assert torch.autograd.gradcheck(lambda r, v: lambda_return_reference(r, cont, v)[0], (reward, value))


def test_mistakes_are_answered():
    with pytest.raises(ValueError, match=r"cont has shape \(3, 2\), expected \(4, 2\)"):
        lambda_return(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="discount is 0"):
        lambda_return(torch.zeros(3, 2), torch.zeros(4, 2), torch.zeros(4, 2), discount=0)
    with pytest.raises(ValueError, match=r"reward has shape \(0, 2\)"):
        lambda_return(torch.zeros(0, 2), torch.zeros(1, 2), torch.zeros(1, 2))
