"""Weights rounded to the type of the matrix work at once: the same numbers and gradients as from a cast of each."""

import contextlib

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hdfast.agent import learner as learners
from hdfast.agent import optimizer as optimizers
from hdfast.agent.optimizer import Adam
from hdfast.agent.rounding import in_type, rounded
from tests.agent_cases import make_batch, make_learner, one_thread, snapshot  # noqa: F401

LOW = torch.bfloat16


class Casts(TorchDispatchMode):
    """Counts the casts of float32 matrices to LOW, and of gradients of matrices back."""

    def __init__(self):
        super().__init__()
        self.down, self.up = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function._overloadpacket is torch.ops.aten._to_copy and args[0].ndim <= 2:
            kinds = args[0].dtype, result.dtype
            self.down += kinds == (torch.float32, LOW)
            self.up += kinds == (LOW, torch.float32)
        return result


@pytest.fixture
def make(monkeypatch):
    """Makes learners whose parameters are one tensor an optimizer, as on CUDA, on plain PyTorch."""
    monkeypatch.setenv("HDFAST_BACKEND", "reference")
    monkeypatch.setattr(optimizers, "FLAT", ("cpu",))
    return lambda continuous=False: make_learner(continuous, dtype=LOW)


def adam(*shapes):
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    return Adam(parameters, lr=1e-2, eps=1e-8, clip=1e9, flat=True)


@pytest.mark.parametrize("continuous", [False, True])
def test_a_learner_learns_bit_by_bit_as_with_a_cast_of_each(continuous, make, monkeypatch):
    one, each = make(continuous), make(continuous)
    for seed in range(4):
        batch = make_batch(one, seed)
        one.step(lambda b, t, batch=batch: dict(batch))
        with monkeypatch.context() as patch:
            patch.setattr(learners, "rounded", lambda *_: contextlib.nullcontext())
            each.step(lambda b, t, batch=batch: dict(batch))
    assert one.skipped.item() == 0
    expected = snapshot(each)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in snapshot(one).items())


def test_it_spares_most_casts(make, monkeypatch):
    learner = make()
    batch = make_batch(learner)
    with Casts() as few:
        learner.step(lambda b, t: dict(batch))
    with monkeypatch.context() as patch, Casts() as many:
        patch.setattr(learners, "rounded", lambda *_: contextlib.nullcontext())
        learner.step(lambda b, t: dict(batch))
    assert few.down <= many.down - 40
    assert few.up <= many.up - 40


def test_gradients_are_those_of_casts():
    optimizer = adam((3, 4), (5,), (2, 4), (4, 3))
    twice, vector, unused, turned = optimizer.parameters
    x = torch.randn(4, generator=torch.Generator().manual_seed(1)).to(LOW)
    with rounded(optimizer, LOW):
        low = [in_type(parameter, LOW) for parameter in optimizer.parameters]
        assert all(torch.equal(one, p.to(LOW)) for one, p in zip(low, optimizer.parameters, strict=True))
        loss = (in_type(twice, LOW) @ x).square().sum() + (in_type(twice, LOW) @ x).sum()
        loss = loss + in_type(vector, LOW).exp().sum() + (x @ in_type(turned, LOW)).sum()
        loss = loss.float() + vector.sum()  # and as it is
    found = torch.autograd.grad(loss, optimizer.parameters, allow_unused=True)
    plain = [p.detach().to(LOW).requires_grad_() for p in (twice, vector, turned)]
    sums = (plain[0] @ x).square().sum() + (plain[0] @ x).sum() + plain[1].exp().sum() + (x @ plain[2]).sum()
    expected = [grad.float() for grad in torch.autograd.grad(sums.float(), plain)]
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1] + 1)
    assert found[2] is None
    assert torch.equal(found[3], expected[2])
    assert unused.grad is None


def test_what_it_does_not_know_is_cast():
    optimizer, other = adam((3, 4)), nn.Parameter(torch.ones(2))
    (parameter,) = optimizer.parameters
    assert in_type(parameter, torch.float32) is parameter
    with rounded(optimizer, LOW):
        assert in_type(other, LOW).dtype == LOW
        assert in_type(parameter, LOW) is in_type(parameter, LOW)
        assert in_type(parameter, torch.float32) is parameter
        assert in_type(parameter, torch.float16).dtype == torch.float16
    assert in_type(parameter, LOW) is not in_type(parameter, LOW)
    with rounded(optimizer, torch.float32):
        assert in_type(parameter, torch.float32) is parameter
    each = Adam([nn.Parameter(torch.ones(2))], lr=1e-2, eps=1e-8, clip=1.0, flat=False)
    with rounded(each, LOW):
        assert in_type(each.parameters[0], LOW) is not in_type(each.parameters[0], LOW)


class Copies(TorchDispatchMode):
    """Records the shapes of all that is rounded to bfloat16, or put together, inside the block."""

    def __init__(self):
        super().__init__()
        self.rounded, self.joined = [], []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        if function is torch.ops.aten._to_copy.default and out.dtype == LOW:
            self.rounded.append(tuple(out.shape))
        if function in (torch.ops.aten.cat.default, torch.ops.aten.stack.default):
            self.joined.append(tuple(out.shape))
        return out


def test_what_many_layers_read_is_rounded_once():
    """The actor's weights for its whole rollout; an imagined state is written as all its readers want it."""
    learner = make_learner(dtype=LOW)
    batch = make_batch(learner)
    with Copies() as copies:
        learner.update(lambda *_: batch)
    horizon, states, deter = 4, batch["reward"].numel(), learner.config.rssm.deter
    assert learner.config.behavior.horizon == horizon
    heads = 4  # of the world model on observed states, each rounded for its own gradient: gradients add up in float32
    assert copies.rounded.count((states, deter)) == heads
    assert copies.rounded.count((horizon + 1, states, deter)) == 0
    assert not [shape for shape in copies.joined if states in shape[:-1] and shape[-1] >= deter]
    weight = learner.behavior.actor.mlp.out["logits"].weight
    assert copies.rounded.count(tuple(weight.shape)) == 2, "for the rollout, and for what is made of it"
