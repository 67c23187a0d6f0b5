"""REINFORCE for continuous actions: their density, and what a gradient flows through."""

import torch

from hdfast.agent.distributions import normal_parameters
from hdfast.agent.networks import Latent
from tests.agent_cases import one_thread  # noqa: F401
from tests.test_agent_behavior import F32, REINFORCE, Rollout


def test_continuous_actions_have_the_density_of_a_normal():
    """By REINFORCE the gradient is that of log_prob at actions that are held, in the states they were drawn in."""
    rollout = Rollout(continuous=True, **REINFORCE)
    trajectory, actor = rollout.trajectory, rollout.behavior.actor
    assert not trajectory.action.requires_grad
    assert not trajectory.latent.deter.requires_grad
    states = Latent(trajectory.latent.deter[:-1], trajectory.latent.index[:-1])
    out = actor.mlp(states, F32)
    law = torch.distributions.Normal(*normal_parameters(out["mean"], out["std"]))
    assert torch.allclose(trajectory.log_prob, law.log_prob(trajectory.action).sum(-1), atol=1e-5)
    assert torch.allclose(trajectory.entropy, law.entropy().sum(-1), atol=1e-6)
    by_hand = law.log_prob(trajectory.action).sum(-1)
    weights = actor.mlp.out["std"].weight
    (expected,), (got,) = (torch.autograd.grad(x.sum(), weights) for x in (by_hand, trajectory.log_prob))
    assert expected.abs().max() > 0
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)
    through = Rollout(continuous=True)
    assert torch.equal(through.trajectory.action, trajectory.action)  # the same numbers are drawn
    assert through.trajectory.action.requires_grad
