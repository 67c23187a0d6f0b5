"""Adam against optax's formulas in float64, the updates that it leaves out, and its parameters as one tensor."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from hdfast.agent import optimizer as optimizers
from hdfast.agent.optimizer import ALIGNMENT, Adam
from tests.agent_cases import differing, make_batch, make_learner, one_thread, snapshot  # noqa: F401
from tests.calls import Calls
from tests.recorder import Recording

SHAPES = [(3, 4), (5,), (), (2, 1, 3)]
YES, NO = torch.tensor(True), torch.tensor(False)


@pytest.fixture(params=["each", "flat"])
def layout(request, monkeypatch):
    """Whether each parameter has its own memory, or all are views of one tensor, as on CUDA."""
    monkeypatch.setattr(optimizers, "FLAT", ("cpu",) if request.param == "flat" else ())
    return request.param


def parameters(seed: int = 0) -> list[nn.Parameter]:
    rng = np.random.default_rng(seed)
    return [nn.Parameter(torch.tensor(rng.standard_normal(shape), dtype=torch.float32)) for shape in SHAPES]


def gradients(seed: int, scale: float = 1.0) -> list[torch.Tensor]:
    rng = np.random.default_rng(100 + seed)
    return [torch.tensor(scale * rng.standard_normal(shape), dtype=torch.float32) for shape in SHAPES]


class Optax:
    """clip_by_global_norm, scale_by_adam, scale: as written in optax, on float64 arrays."""

    def __init__(self, values, lr, eps, clip):
        self.values = [v.detach().double().numpy().copy() for v in values]
        self.mu, self.nu = ([np.zeros_like(v) for v in self.values] for _ in range(2))
        self.count, self.lr, self.eps, self.clip = 0, lr, eps, clip

    def step(self, grads):
        grads = [g.double().numpy() for g in grads]
        norm = np.sqrt(sum((g**2).sum() for g in grads))
        if norm >= self.clip:
            grads = [g / norm * self.clip for g in grads]
        self.count += 1
        for i, g in enumerate(grads):
            self.mu[i] = 0.9 * self.mu[i] + 0.1 * g
            self.nu[i] = 0.999 * self.nu[i] + 0.001 * g**2
            mu_hat, nu_hat = self.mu[i] / (1 - 0.9**self.count), self.nu[i] / (1 - 0.999**self.count)
            self.values[i] = self.values[i] - self.lr * mu_hat / (np.sqrt(nu_hat) + self.eps)
        return norm


@pytest.mark.parametrize(
    ("lr", "eps", "clip"), [(1e-4, 1e-8, 1000.0), (3e-5, 1e-5, 100.0), (1e-2, 1e-1, 0.5)]
)
def test_it_is_optax_adam(lr, eps, clip, layout):
    """Twelve steps with gradients that grow beyond the clip, on parameters so small that rounding hides no error."""
    mine = parameters()
    for p in mine:
        p.data *= 1e-3
    optimizer, theirs = Adam(mine, lr=lr, eps=eps, clip=clip), Optax(mine, lr, eps, clip)
    start = [v.copy() for v in theirs.values]
    clipped = 0
    for k in range(12):
        grads = gradients(k, scale=clip * 10 ** (k / 4 - 2))
        expected = theirs.step(grads)
        clipped += expected >= clip
        norm, applied = optimizer.step(grads, YES)
        assert norm.item() == pytest.approx(expected, rel=1e-6)  # before clipping
        assert applied.item() is True
    assert 0 < clipped < 12
    for ours, value, first in zip(mine, theirs.values, start, strict=True):
        error = np.abs(ours.detach().double().numpy() - value).max()
        assert error <= 5e-5 * np.abs(value - first).max()


def test_the_first_step_on_literal_numbers(layout):
    """A first Adam step is lr * g / (|g| + eps), whatever the size of g."""
    p = nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
    adam = Adam([p], lr=0.1, eps=1.0, clip=1000.0)
    adam.step([torch.tensor([1.0, -3.0, 0.0])], YES)
    assert p.tolist() == pytest.approx([1 - 0.1 * 0.5, 1 + 0.1 * 0.75, 1.0])
    state = {name: value.tolist() for name, value in adam.state_dict().items()}
    assert state == {
        "steps": 1.0,
        "mean.0": pytest.approx([0.1, -0.3, 0.0]),
        "square.0": pytest.approx([0.001, 0.009, 0.0]),
    }
    p = nn.Parameter(torch.zeros(2))
    Adam([p], lr=0.1, eps=1.0, clip=1.0).step([torch.tensor([3.0, 4.0])], YES)  # clipped to (0.6, 0.8)
    assert p.tolist() == pytest.approx([-0.1 * 0.6 / 1.6, -0.1 * 0.8 / 1.8], rel=1e-5)


@pytest.mark.parametrize("why", ["nan", "inf", "overflow", "asked"])
def test_a_refused_step_leaves_no_trace(why, layout):
    """Afterwards everything is bit for bit as if there had been no such step."""
    bad = gradients(7)
    if why in ("nan", "inf"):
        bad[3].view(-1)[2] = float(why)
    elif why == "overflow":  # each entry is finite, the norm is not
        bad = [torch.full_like(g, 3e38) for g in bad]
    results = []
    for with_bad in (False, True):
        mine = parameters()
        optimizer = Adam(mine, lr=1e-2, eps=1e-8, clip=1.0)
        optimizer.step(gradients(0), YES)
        if with_bad:
            before = [p.detach().clone() for p in mine]
            norm, applied = optimizer.step(bad, NO if why == "asked" else YES)
            assert applied.item() is False
            assert norm.isfinite().item() is (why == "asked")
            assert all(torch.equal(p, b) for p, b in zip(mine, before, strict=True))
        optimizer.step(gradients(1), YES)
        results.append([*mine, *optimizer.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_saved_state_goes_on_bit_for_bit(layout):
    first, second = parameters(), parameters(seed=1)
    a, b = (Adam(p, lr=1e-2, eps=1e-8, clip=1.0) for p in (first, second))
    a.step(gradients(0), YES)
    b.step(gradients(1), YES)
    b.load_state_dict({k: v.clone() for k, v in a.state_dict().items()})
    for p, q in zip(first, second, strict=True):
        q.data.copy_(p.data)
    a.step(gradients(2), YES)
    b.step(gradients(2), YES)
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
    with pytest.raises(KeyError):
        a.load_state_dict({})
    wrong = {**b.state_dict(), "mean.0": torch.ones(())}  # which would fit by broadcasting
    before = {k: v.clone() for k, v in a.state_dict().items()}
    with pytest.raises(ValueError, match=r"^mean\.0 has shape \(\), expected \("):
        a.load_state_dict(wrong)
    assert all(torch.equal(v, before[k]) for k, v in a.state_dict().items())


# Parameters as one tensor.


class Network(nn.Module):
    """A convolution, whose gradient has its own memory order, and parameters of two axes, one and none."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.linear, self.scale = (
            nn.Conv2d(3, 5, 2),
            nn.Linear(20, 4),
            nn.Parameter(torch.ones(())),
        )

    def gradients(self, seed, scale=1.0):
        generator = torch.Generator().manual_seed(seed)
        made = [scale * torch.randn(p.shape, generator=generator) for p in self.parameters()]
        order = torch.channels_last
        return [g.to(memory_format=order) if g.ndim == 4 else g for g in made]


def network_and_adam(flat, seed=0, clip=1e6):
    network = Network(seed)
    return network, Adam(network.parameters(), lr=1e-2, eps=1e-8, clip=clip, flat=flat)


def identical(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("clip", [1e6, 1.0], ids=["unclipped", "clipped"])
def test_flat_parameters_learn_as_others_do(clip):
    (one, flat), (other, each) = (network_and_adam(kind, clip=clip) for kind in (True, False))
    for seed in range(6):
        grads = one.gradients(seed)
        grads[4] = grads[4][:1].expand(4)  # as that of a sum
        kept = [grad.clone() for grad in grads]
        told = [adam.step(grads, NO if seed == 3 else YES) for adam in (flat, each)]
        assert all(map(torch.equal, grads, kept))
        assert told[0][0].item() == pytest.approx(told[1][0].item(), rel=1e-6)
        assert told[0][1].item() is told[1][1].item() is (seed != 3)
    if clip > 1:  # the norm, summed in another order, has no effect
        assert identical(one.state_dict(), other.state_dict())
        assert identical(flat.state_dict(), each.state_dict())
    for a, b in ((one, other), (flat, each)):
        for name, tensor in a.state_dict().items():
            torch.testing.assert_close(tensor, b.state_dict()[name], rtol=1e-5, atol=1e-7)


def test_flat_parameters_have_their_places():
    network, adam = network_and_adam(True)
    (whole,) = adam.held.tensors()
    storages = {p.untyped_storage().data_ptr() for p in network.parameters()}
    assert storages == {whole.untyped_storage().data_ptr()}
    inside = torch.zeros(whole.shape, dtype=torch.bool)
    for p in network.parameters():
        assert p.is_contiguous()
        assert p.is_leaf
        assert p.requires_grad
        assert p.storage_offset() % ALIGNMENT == 0
        place = inside[p.storage_offset() :][: p.numel()]
        assert not place.any(), "no two share memory"
        place.fill_(True)
    for seed in range(3):
        adam.step(network.gradients(seed), YES)
    assert not whole[~inside].any()
    assert whole[inside].all()


def test_gradients_are_laid_out_in_few_calls():
    """On CUDA `_foreach_copy_` copies tensors one by one if any pair of them differs in strides or dtype."""
    network, adam = network_and_adam(True)
    grads = network.gradients(0)
    with Calls() as calls:
        adam.gradient.copy_(grads)
    (together,) = calls.of("_foreach_copy_")
    assert len(together[0]) == len(grads) - 1
    for into, given in zip(*together[:2], strict=True):
        assert (into.shape, into.stride(), into.dtype) == (given.shape, given.stride(), given.dtype)
    assert len(calls.of("copy_")) == 1, "the convolution's"
    for part, grad in zip(adam.gradient.parts, grads, strict=True):
        assert torch.equal(part, grad)


@pytest.mark.parametrize("flat", [True, False], ids=["to flat", "from flat"])
def test_a_state_goes_from_one_layout_to_the_other(flat):
    (old, before), (new, after) = network_and_adam(not flat), network_and_adam(flat, seed=1)
    for seed in range(2):
        before.step(old.gradients(seed), YES)
        after.step(old.gradients(seed + 5), YES)
    addresses = [tensor.data_ptr() for tensor in (*new.parameters(), *after.state_dict().values())]
    after.load_state_dict({name: tensor.clone() for name, tensor in before.state_dict().items()})
    new.load_state_dict(old.state_dict())
    for seed in range(2):
        before.step(old.gradients(seed), YES)
        after.step(old.gradients(seed), YES)
    assert identical(before.state_dict(), after.state_dict())
    assert identical(old.state_dict(), new.state_dict())
    assert addresses == [tensor.data_ptr() for tensor in (*new.parameters(), *after.state_dict().values())]


def test_a_copy_of_flat_parameters_learns_by_itself():
    network, adam = network_and_adam(True)
    adam.step(network.gradients(0), YES)
    before = copy.deepcopy((network.state_dict(), adam.state_dict()))
    other, its_adam = copy.deepcopy((network, adam))
    its_adam.step(network.gradients(1), YES)
    assert identical(network.state_dict(), before[0])
    assert identical(adam.state_dict(), before[1])
    adam.step(network.gradients(1), YES)
    assert identical(network.state_dict(), other.state_dict())
    assert identical(adam.state_dict(), its_adam.state_dict())


def test_what_is_set_anew_is_taken():
    (one, flat), (other, each) = network_and_adam(True), network_and_adam(False)
    for network, adam in ((one, flat), (other, each)):
        adam.step(one.gradients(0), YES)
        network.linear.weight.data = torch.full((4, 20), 0.5)
        adam.step(one.gradients(1), YES)
    assert identical(one.state_dict(), other.state_dict())


def test_mistakes_are_answered(layout):
    network = Network()
    adam = Adam(network.parameters(), lr=1e-2, eps=1e-8, clip=1.0)
    grads = network.gradients(0)
    for wrong in (grads[:-1], [torch.ones(1), *grads[1:]], [*grads[:3], grads[3].T, grads[4]]):
        with pytest.raises(ValueError, match="expected"):
            adam.step(wrong, YES)
    assert adam.steps.item() == 0


def test_a_backward_through_what_was_computed_before_is_refused(layout):
    network = Network()
    adam = Adam(network.parameters(), lr=1e-2, eps=1e-8, clip=1.0)
    loss = network.linear(network.linear.weight).square().sum()
    adam.step(network.gradients(0), YES)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.fixture
def learners(monkeypatch):
    """Makes learners with separate parameters and with flat ones, on plain PyTorch."""
    monkeypatch.setenv("HDFAST_BACKEND", "reference")

    def make(flat, **options):
        monkeypatch.setattr(optimizers, "FLAT", ("cpu",) if flat else ())
        learner = make_learner(**options)
        held = [learner.behavior.slow_parameters, *(adam.held for adam in learner.optimizers.values())]
        assert {one.flat for one in held} == {flat}
        return learner

    return make


@pytest.mark.parametrize("continuous", [False, True])
def test_a_learner_with_flat_parameters_learns_as_others_do(continuous, learners):
    flat, each = (learners(kind, continuous=continuous) for kind in (True, False))
    assert differing(snapshot(flat), snapshot(each)) == set()
    for seed in range(4):
        for learner in (flat, each):
            learner.step(lambda b, t, seed=seed: make_batch(flat, seed))
    expected = snapshot(each)
    for name, tensor in snapshot(flat).items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert flat.skipped.item() == 0
    assert flat.behavior.slow_updates.item() == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_learner_with_flat_parameters_can_be_captured(dtype, learners):
    recorded, eager = learners(True, dtype=dtype), learners(True, dtype=dtype)
    data = [make_batch(eager, seed) for seed in range(6)]
    static = {name: tensor.clone() for name, tensor in data[0].items()}

    def addresses():
        return [p.data_ptr() for module in (recorded.model, recorded.behavior) for p in module.parameters()]

    before, recording = addresses(), None
    for k, batch in enumerate(data):
        eager.step(lambda b, t, batch=batch: dict(batch))
        for name, tensor in batch.items():
            static[name].copy_(tensor)
        if recording is not None:
            recording.replay()
        elif k == 1:
            recording = Recording(lambda: recorded.step(lambda b, t: dict(static)))
        else:
            recorded.step(lambda b, t: dict(static))
    assert differing(snapshot(recorded), snapshot(eager)) == set()
    assert addresses() == before


def test_a_copy_of_a_flat_learner_learns_by_itself(learners):
    learner = learners(True)
    learner.step(lambda b, t: make_batch(learner))
    other = copy.deepcopy(learner)
    before = snapshot(learner)
    other.step(lambda b, t: make_batch(other))
    assert differing(snapshot(learner), before) == set()
    learner.step(lambda b, t: make_batch(learner))
    assert differing(snapshot(learner), snapshot(other)) == set()
    assert differing(snapshot(learner), before)
