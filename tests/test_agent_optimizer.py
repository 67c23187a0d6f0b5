"""Adam against the formulas of optax in float64, and the updates that it refuses."""

import numpy as np
import pytest
import torch
from torch import nn

from hdfast.agent.optimizer import Adam
from tests.agent_cases import one_thread  # noqa: F401

SHAPES = [(3, 4), (5,), (), (2, 1, 3)]
YES, NO = torch.tensor(True), torch.tensor(False)


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
def test_it_is_optax_adam(lr, eps, clip):
    """Twelve steps whose gradients grow through the clip, on parameters so small that rounding hides no error."""
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


def test_the_first_step_on_literal_numbers():
    """A first Adam step is lr * g / (|g| + eps), whatever the size of g."""
    p = nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
    Adam([p], lr=0.1, eps=1.0, clip=1000.0).step([torch.tensor([1.0, -3.0, 0.0])], YES)
    assert p.tolist() == pytest.approx([1 - 0.1 * 0.5, 1 + 0.1 * 0.75, 1.0])
    p = nn.Parameter(torch.zeros(2))
    Adam([p], lr=0.1, eps=1.0, clip=1.0).step([torch.tensor([3.0, 4.0])], YES)  # clipped to (0.6, 0.8)
    assert p.tolist() == pytest.approx([-0.1 * 0.6 / 1.6, -0.1 * 0.8 / 1.8], rel=1e-5)


@pytest.mark.parametrize("why", ["nan", "inf", "overflow", "asked"])
def test_a_refused_step_leaves_no_trace(why):
    """Afterwards everything is bit for bit as if the step had never been asked for."""
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


def test_a_saved_state_goes_on_bit_for_bit():
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
