"""kl_balance: both terms, their stopped gradients and the free bits, on every backend."""

import math
from functools import partial

import pytest
import torch
from checks import backends, check_against_fp64, random

from hdfast_kernels import kl_balance
from hdfast_kernels.kl_balance import kl_balance_reference

# leading axes, S, K: one row; odd; the agent's 32 x 32; more than one block; no rows
CASES = [((1,), 1, 3), ((2, 5), 5, 7), ((6,), 32, 32), ((3,), 40, 50), ((0,), 3, 4)]


def inputs(rows, S, K, dtype, device, distance=0.5):
    logits = random(*rows, S, K)
    prior = logits + random(*rows, S, K, seed=1, scale=distance)
    return {
        "post_logp": logits.log_softmax(-1).to(device, dtype).requires_grad_(),
        "prior_logp": prior.log_softmax(-1).to(device, dtype).requires_grad_(),
    }


def losses_of(op):
    """The op without the KL itself, whose error in a single row of small terms is a matter of luck."""
    return lambda **given: op(**given)[:2]


@pytest.mark.parametrize("backend", backends("kl_balance"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "S", "K"), CASES, ids=str)
def test_the_kl_itself(rows, S, K, dtype, backend):
    post, prior = inputs(rows, S, K, dtype, backend.device).values()
    kl = kl_balance(post, prior, 0.4, backend=backend.name)[2]
    p, q = post.detach().double(), prior.detach().double()
    assert (kl.shape, kl.dtype, kl.requires_grad) == (rows, torch.float32, False)
    torch.testing.assert_close(kl.double(), (p.exp() * (p - q)).sum((-2, -1)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", backends("kl_balance", reference=False))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "S", "K"), CASES, ids=str)
def test_errs_no_more_than_twice_plain_pytorch(rows, S, K, dtype, backend):
    arguments = inputs(rows, S, K, dtype, backend.device) | {"free": 0.4}
    check_against_fp64(
        losses_of(partial(kl_balance, backend=backend.name)), losses_of(kl_balance_reference), arguments
    )


@pytest.mark.parametrize("backend", backends("kl_balance", reference=False))
def test_distant_distributions(backend):
    """Posterior and prior nearly deterministic and different: the bound of a 1% mixture in each of 32 groups."""
    arguments = inputs((4,), 32, 32, torch.float32, backend.device)
    for name, shift in (("post_logp", 0), ("prior_logp", 1)):
        probs = torch.full((4, 32, 32), 0.01 / 32, device=backend.device)
        probs[..., shift] += 0.99
        arguments[name] = probs.log().requires_grad_()
    check_against_fp64(
        losses_of(partial(kl_balance, backend=backend.name)), losses_of(kl_balance_reference), arguments
    )


@pytest.mark.parametrize("backend", backends("kl_balance", reference=False))
@pytest.mark.parametrize("low", ["post_logp", "prior_logp"])
def test_two_dtypes(low, backend):
    """Inputs of different dtypes, each with a gradient of its own dtype."""
    arguments = inputs((6,), 8, 32, torch.float32, backend.device) | {"free": 0.4}
    arguments[low] = arguments[low].detach().bfloat16().requires_grad_()
    check_against_fp64(
        losses_of(partial(kl_balance, backend=backend.name)), losses_of(kl_balance_reference), arguments
    )


@pytest.mark.parametrize("backend", backends("kl_balance"))
def test_free_bits_and_stop_gradients(backend):
    post = torch.log(torch.tensor([[[0.5, 0.5]], [[0.9, 0.1]]], device=backend.device)).requires_grad_()
    prior = torch.log(torch.tensor([[[0.5, 0.5]], [[0.1, 0.9]]], device=backend.device)).requires_grad_()
    dyn, rep, kl = kl_balance(post, prior, free=1.0, backend=backend.name)
    assert not kl.requires_grad
    assert kl.tolist() == pytest.approx([0.0, 0.8 * math.log(9)], rel=1e-6, abs=1e-7)
    far = 0.8 * math.log(9)  # the second row's KL; the first row's is zero
    assert dyn.tolist() == pytest.approx([1.0, far], rel=1e-6)
    assert rep.tolist() == pytest.approx([1.0, far], rel=1e-6)
    zero, dprior = torch.autograd.grad(dyn.sum(), (post, prior), retain_graph=True, materialize_grads=True)
    assert zero.abs().max() == 0
    assert dprior.flatten().tolist() == pytest.approx([0.0, 0.0, -0.9, -0.1], rel=1e-6)
    dpost, zero = torch.autograd.grad(rep.sum(), (post, prior), materialize_grads=True)
    assert zero.abs().max() == 0
    expected = [0.0, 0.0, 0.9 * (math.log(9) + 1), 0.1 * (1 - math.log(9))]
    assert dpost.flatten().tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("backend", backends("kl_balance"))
def test_what_a_loss_does_not_train_has_no_gradient_at_all(backend):
    """Zeros would let an optimizer with momentum move it."""
    post, prior = (
        random(3, 2, 4, seed=seed).log_softmax(-1).to(backend.device, torch.float32) for seed in (0, 1)
    )
    given = post.requires_grad_(), prior.requires_grad_()
    dyn, rep, _ = kl_balance(*given, free=0.0, backend=backend.name)
    of_dyn = torch.autograd.grad(dyn.sum(), given, retain_graph=True, allow_unused=True)
    of_rep = torch.autograd.grad(rep.sum(), given, retain_graph=True, allow_unused=True)
    assert of_dyn[0] is None
    assert of_rep[1] is None
    both = torch.autograd.grad(dyn.sum() + rep.sum(), given)
    assert torch.equal(both[0], of_rep[0])
    assert torch.equal(both[1], of_dyn[1])


@pytest.mark.parametrize("backend", backends("kl_balance"))
def test_a_row_at_the_free_bits_still_learns(backend):
    """The gradient of `Tensor.clamp` there depends on PyTorch's version."""
    certain = torch.tensor([[[0.0, -1000.0]]], device=backend.device)
    prior = torch.tensor([[[-1.0, -1000.0]]], device=backend.device)
    for shift, learns in ((0.0, 1), (2**-20, 0)):
        given = certain.clone().requires_grad_(), (prior + shift).requires_grad_()
        dyn, rep, _ = kl_balance(*given, free=1.0, backend=backend.name)
        assert dyn.item() == rep.item() == 1.0
        of_post, of_prior = torch.autograd.grad([dyn.sum(), rep.sum()], given)
        assert (of_post.flatten().tolist(), of_prior.flatten().tolist()) == ([2 * learns, 0], [-learns, 0])


@pytest.mark.parametrize("backend", backends("kl_balance"))
def test_nan_is_not_hidden_by_the_free_bits(backend):
    post = torch.full((1, 2, 2), math.nan, device=backend.device)
    dyn, rep, kl = kl_balance(post, torch.zeros_like(post), backend=backend.name)
    assert dyn.isnan().all()
    assert rep.isnan().all()
    assert kl.isnan().all()


def test_gradients_of_the_reference():
    post, prior = (random(3, 2, 4, seed=seed).log_softmax(-1).requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(lambda prior: kl_balance_reference(post.detach(), prior, 0.3)[0], prior)
    assert torch.autograd.gradcheck(lambda post: kl_balance_reference(post, prior.detach(), 0.3)[1], post)


def test_mistakes_are_answered():
    with pytest.raises(
        ValueError, match=r"kl_balance: post_logp has shape \(4,\), expected \(\.\.\., S, K\)"
    ):
        kl_balance(torch.zeros(4), torch.zeros(4))
    with pytest.raises(ValueError, match="free is NaN, expected a number of nats"):
        kl_balance(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), math.nan)
    with pytest.raises(ValueError, match=r"prior_logp has shape \(2, 3\), expected \(2, 3, 4\)"):
        kl_balance(torch.zeros(2, 3, 4), torch.zeros(2, 3))
