"""sample_onehot: the classes chosen, log-probabilities and gradients, on every backend."""

import math
from functools import partial

import pytest
import torch
from checks import backends, check_against_fp64, random

from hdfast_kernels import sample_index, sample_onehot
from hdfast_kernels.sample_onehot import sample_onehot_reference

# leading axes, S, K: one row; odd; the agent's 32 x 32; no rows; two classes; many rows
CASES = [((1,), 1, 3), ((2, 3), 5, 7), ((4,), 32, 32), ((0,), 3, 4), ((8,), 3, 2), ((300,), 2, 16)]


def inputs(rows, S, K, dtype, device, scale=2.0, unimix=0.01):
    """Logits, and uniform numbers in the middle of the interval of a class that is not too rare: no ties."""
    logits = random(*rows, S, K, scale=scale)
    probs = (1 - unimix) * logits.softmax(-1) + unimix / K
    drawable = probs > min(1e-3, 0.5 * unimix / K) if unimix else probs > 1e-3
    scores = torch.rand(probs.shape, generator=torch.Generator().manual_seed(1)).masked_fill(~drawable, -1.0)
    index = scores.argmax(-1, keepdim=True)
    uniform = (probs.cumsum(-1) - probs / 2).gather(-1, index).squeeze(-1)
    return {
        "logits": logits.to(device, dtype).requires_grad_(),
        "uniform": uniform.to(device, torch.float32),
        "unimix": unimix,
    }


@pytest.mark.parametrize("backend", backends("sample_onehot", reference=False))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "S", "K"), CASES, ids=str)
def test_errs_no_more_than_twice_plain_pytorch(rows, S, K, dtype, backend):
    arguments = inputs(rows, S, K, dtype, backend.device)
    check_against_fp64(partial(sample_onehot, backend=backend.name), sample_onehot_reference, arguments)


@pytest.mark.parametrize("backend", backends("sample_onehot", reference=False))
@pytest.mark.parametrize(("scale", "unimix"), [(1e4, 0.01), (60.0, 0.0), (2.0, 0.5), (2.0, 0.999)])
def test_extreme_logits_and_mixtures(scale, unimix, backend):
    arguments = inputs((20,), 4, 9, torch.float32, backend.device, scale, unimix)
    check_against_fp64(partial(sample_onehot, backend=backend.name), sample_onehot_reference, arguments)


@pytest.mark.parametrize("backend", backends("sample_onehot", reference=False))
@pytest.mark.parametrize("used", [0, 2], ids=["stoch", "logp"])
def test_gradient_through_one_output_alone(used, backend):
    arguments = inputs((6,), 3, 5, torch.float32, backend.device)
    check_against_fp64(
        lambda **given: sample_onehot(**given, backend=backend.name)[used],
        lambda **given: sample_onehot_reference(**given)[used],
        arguments,
    )


@pytest.mark.parametrize("backend", backends("sample_onehot"))
def test_literal_numbers(backend):
    logits = torch.log(torch.tensor([[[0.1, 0.2, 0.7]]], device=backend.device)).expand(6, 1, 3)
    uniform = torch.tensor([0.0, 0.09, 0.11, 0.29, 0.31, 1 - 2**-24], device=backend.device).unsqueeze(1)
    stoch, index, logp = sample_onehot(logits, uniform, unimix=0.0, backend=backend.name)
    assert index.flatten().tolist() == [0, 0, 1, 1, 2, 2]
    assert stoch[:, 0].tolist() == [[float(k == i) for k in range(3)] for i in (0, 0, 1, 1, 2, 2)]
    assert logp[0, 0].exp().tolist() == pytest.approx([0.1, 0.2, 0.7], rel=1e-5)


@pytest.mark.parametrize("backend", backends("sample_onehot"))
def test_unimix_bounds_the_log_probability(backend):
    logits = torch.tensor([[[1e6, 0.0, -1e6, 0.0]]], device=backend.device)
    _, index, logp = sample_onehot(logits, torch.zeros(1, 1, device=logits.device), backend=backend.name)
    assert index.item() == 0
    assert logp[0, 0].tolist() == pytest.approx([math.log(0.9925)] + 3 * [math.log(0.0025)], rel=1e-5)


@pytest.mark.parametrize("backend", backends("sample_onehot"))
def test_a_class_without_probability_is_not_drawn_until_none_is_left(backend):
    logits = torch.tensor([-1e4, 0.0, -1e4, 0.0, -1e4], device=backend.device).expand(5, 1, 5)
    uniform = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], device=backend.device).unsqueeze(1)
    _, index, _ = sample_onehot(logits, uniform, unimix=0.0, backend=backend.name)
    assert index.flatten().tolist() == [1, 1, 3, 3, 4]


@pytest.mark.parametrize("backend", backends("sample_onehot"))
def test_a_uniform_number_above_a_rounded_cdf_draws_the_last_class(backend):
    logits = random(200, 2, 32).to(backend.device, torch.float32)
    uniform = torch.full((200, 2), 1 - 2**-24, device=backend.device)
    assert (logits.softmax(-1).cumsum(-1)[..., -1] <= uniform).any()
    stoch, index, _ = sample_onehot(logits, uniform, backend=backend.name)
    assert torch.equal(stoch.sum(-1), torch.ones_like(uniform))
    assert torch.equal(stoch.argmax(-1), index)


@pytest.mark.parametrize("backend", backends("sample_onehot"))
def test_frequencies_are_the_probabilities(backend):
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]], device=backend.device).expand(4096, 1, 4)
    uniform = torch.rand(4096, 1, generator=generator).to(backend.device)
    stoch, index, logp = sample_onehot(logits, uniform, backend=backend.name)
    assert torch.equal(stoch.argmax(-1), index)
    assert torch.equal(stoch.sum(-1), torch.ones_like(uniform))
    deviation = (stoch.mean((0, 1)) - logp[0, 0].exp()).abs().max().item()
    assert deviation < 4 * 0.5 / math.sqrt(4096)  # four standard deviations


@pytest.mark.parametrize("backend", backends("sample_index"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("unimix", [0.01, 0.0])
@pytest.mark.parametrize(("rows", "S", "K"), [*CASES, ((64,), 1, 18), ((130,), 32, 32)], ids=str)
def test_the_classes_alone_are_the_same_classes(rows, S, K, unimix, dtype, backend):
    logits = random(*rows, S, K, scale=2.0).to(backend.device, dtype).requires_grad_()
    uniform = torch.rand(*rows, S, generator=torch.Generator().manual_seed(1)).to(backend.device)
    index = sample_index(logits, uniform, unimix, backend=backend.name)
    _, expected, _ = sample_onehot(logits, uniform, unimix, backend=backend.name)
    assert torch.equal(index, expected)
    assert not index.requires_grad


def test_gradients_of_the_reference():
    logits, uniform = random(2, 2, 4).requires_grad_(), torch.tensor([[0.1, 0.9], [0.4, 0.6]])
    assert torch.autograd.gradcheck(lambda logits: sample_onehot_reference(logits, uniform)[2], logits)
    # The straight-through value does not change with the logits: its gradient is that of the probabilities.
    stoch, _, logp = sample_onehot_reference(logits, uniform)
    slope = random(2, 2, 4, seed=5)
    through_stoch, through_p = (
        torch.autograd.grad(x, logits, slope, retain_graph=True)[0] for x in (stoch, logp.exp())
    )
    assert torch.allclose(through_stoch, through_p, rtol=1e-12)


def test_mistakes_are_answered():
    with pytest.raises(ValueError, match=r"uniform has shape \(2,\), expected \(2, 3\)"):
        sample_onehot(torch.zeros(2, 3, 4), torch.zeros(2))
    with pytest.raises(ValueError, match=r"unimix is 1\.0"):
        sample_onehot(torch.zeros(2, 3, 4), torch.zeros(2, 3), unimix=1.0)
    with pytest.raises(ValueError, match=r"sample_index: uniform has shape \(2,\), expected \(2, 3\)"):
        sample_index(torch.zeros(2, 3, 4), torch.zeros(2))
