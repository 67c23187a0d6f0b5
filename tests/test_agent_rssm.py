"""The recurrent state: seams, shifted and clipped actions, the initial state, and the scan computed in two ways.

Axes: T time, B batch, D deter, S groups, K classes.
"""

import pytest
import torch

from hdfast.agent.distributions import clip_action, unimix_log_probs
from hdfast.agent.networks import Latent
from tests.agent_cases import make_batch, make_learner, one_thread, sample_index  # noqa: F401

F32 = torch.float32


class Case:
    """A small RSSM with spread parameters, and the inputs of a scan."""

    def __init__(self, continuous: bool, seed: int = 0):
        self.learner = make_learner(continuous, seed=seed)
        self.rssm = self.learner.model.rssm
        self.batch = make_batch(self.learner, seed)
        with torch.no_grad():
            self.embed = self.learner.model.encode(self.batch, F32)
        self.uniform = self.learner.uniform(*self.embed.shape[:2], self.rssm.stoch)

    def observe(self, **changed):
        """The scan, with some of its inputs changed."""
        inputs = {"embed": self.embed, "action": self.batch["action"], "is_first": self.batch["is_first"]}
        inputs |= {"uniform": self.uniform} | changed
        return self.rssm.observe(**inputs, dtype=F32)


@pytest.fixture(params=[False, True], ids=["discrete", "continuous"])
def case(request) -> Case:
    return Case(request.param)


def test_the_scan_equals_the_step_that_acts(case):
    """Training hoists projections out of the scan, acting goes row by row: the states are the same."""
    observed = case.observe()
    T, B = case.embed.shape[:2]
    weights = case.rssm.cast(F32)
    latent = Latent(torch.randn(B, 16), torch.randint(5, (B, 4)))  # forgotten at the first row
    action = torch.ones_like(case.batch["action"][0])
    assert case.batch["is_first"][1:].any()
    for t in range(T):
        first = case.batch["is_first"][t]
        latent = case.rssm.observe_step(latent, action, case.embed[t], first, case.uniform[t], weights)
        action = case.batch["action"][t]
        assert torch.allclose(latent.deter, observed.latent.deter[t], atol=1e-6)
        assert torch.equal(latent.index, observed.latent.index[t])
        latent = latent.detach()


def test_the_prior_is_that_of_imagination(case):
    """From the posterior at t, the action chosen at t leads to the prior at t + 1."""
    observed = case.observe(is_first=case.batch["is_first"] & (torch.arange(6)[:, None] == 0))
    weights = case.rssm.cast(F32)
    latent = Latent(observed.latent.deter[:-1].flatten(0, 1), observed.latent.index[:-1].flatten(0, 1))
    action = case.batch["action"][:-1].flatten(0, 1)
    uniform = case.uniform[1:].flatten(0, 1)
    imagined = case.rssm.imagine_step(latent, action, uniform, weights)
    assert torch.allclose(imagined.deter, observed.latent.deter[1:].flatten(0, 1), atol=1e-6)
    expected = sample_index(observed.prior_logp[1:].flatten(0, 1), uniform)
    assert torch.equal(imagined.index, expected)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_a_rollout_in_place_is_step_after_step(case, dtype):
    rssm, weights = case.rssm, case.rssm.cast(dtype)
    state = Latent(torch.randn(3, 16), torch.randint(5, (3, 4)))
    rollout, states = rssm.rollout(state, 5, dtype), [state]
    for t in range(5):
        rssm.imagine_into(rollout, t, case.batch["action"][t], case.uniform[t], weights)
        states.append(rssm.imagine_step(states[-1], case.batch["action"][t], case.uniform[t], weights))
    for t, (expected, found) in enumerate(zip(states, rollout.each, strict=True)):
        assert torch.equal(found.deter, expected.deter)
        assert torch.equal(found.index, expected.index)
        assert torch.equal(found.deter_as(dtype), expected.deter.to(dtype))
        assert all(torch.equal(rollout.states[i][t], found[i]) for i in (0, 1))


def test_a_seam_forgets_everything_before_it(case):
    is_first = torch.zeros(6, 3, dtype=torch.bool)
    is_first[0] = True
    is_first[3, 1] = True
    base = case.observe(is_first=is_first).latent.deter
    other_draws = torch.cat([(case.uniform[:1] + 0.5) % 1, case.uniform[1:]])
    differ = (base != case.observe(is_first=is_first, uniform=other_draws).latent.deter).any(-1)
    assert not differ[0].any()  # deter is computed before the row's own latent is drawn
    assert differ[1:, [0, 2]].all()  # later ones depend on it
    assert differ[1:3, 1].all()
    assert not differ[3:, 1].any()  # but not across the seam
    weights = case.rssm.cast(F32)
    initial = case.rssm.initial(weights)
    start = Latent(initial.deter.expand(1, -1), initial.index.expand(1, -1))
    nothing = torch.zeros(1, 12)
    expected = case.rssm._recur(start, nothing, weights)
    assert torch.allclose(base[3, 1], expected[0], atol=1e-6)
    assert torch.allclose(base[0, 0], expected[0], atol=1e-6)


def test_an_action_counts_one_row_later_and_never_across_a_seam(case):
    is_first = torch.zeros(6, 3, dtype=torch.bool)
    is_first[0] = True
    is_first[3, 1] = True

    def reach(t: int, b: int) -> set[tuple[int, int]]:
        action = case.batch["action"].clone()
        action[t, b] = (action[t, b] + 1) % 3 if case.rssm.discrete else -action[t, b] + 0.1
        before = case.observe(is_first=is_first).latent.deter
        after = case.observe(is_first=is_first, action=action).latent.deter
        return {tuple(row) for row in (before != after).any(-1).nonzero().tolist()}

    assert reach(1, 0) >= {(2, 0)}
    assert reach(1, 0) <= {(t, 0) for t in (2, 3, 4, 5)}
    assert reach(2, 1) == set()
    assert reach(5, 0) == set()


def test_actions_are_clipped_elementwise_with_the_scale_held_fixed():
    action = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.25, 1.0, 4.0], requires_grad=True)
    clipped = clip_action(action)
    assert clipped.tolist() == [-1.0, -1.0, -0.5, 0.0, 0.25, 1.0, 1.0]
    clipped.sum().backward()
    assert action.grad.tolist() == pytest.approx([1 / 3, 1, 1, 1, 1, 1, 0.25])


def test_observing_and_imagining_clip_actions():
    case = Case(continuous=True)
    far = case.batch["action"].sign() * 5
    assert torch.equal(case.observe(action=far).latent.deter, case.observe(action=far.sign()).latent.deter)
    weights = case.rssm.cast(F32)
    latent = Latent(torch.randn(18, 16), torch.randint(5, (18, 4)))
    far, uniform = far.flatten(0, 1), case.uniform.flatten(0, 1)
    results = [case.rssm.imagine_step(latent, a, uniform, weights).deter for a in (far, far.sign())]
    assert torch.equal(*results)


def test_the_initial_state():
    """deter is the tanh of a learned vector, the latent the most probable class of the prior there."""
    rssm = Case(continuous=False).rssm
    weights = rssm.cast(F32)
    initial = rssm.initial(weights)
    assert torch.equal(initial.deter, rssm.initial_deter.tanh())
    logp = unimix_log_probs(rssm._prior_logits(initial.deter, weights), 0.01)
    assert torch.equal(initial.index, logp.argmax(-1))
    fresh = make_learner(spread=False).model.rssm
    assert fresh.initial(fresh.cast(F32)).deter.tolist() == [0.0] * 16


def test_the_initial_state_learns_from_every_first_row(case):
    observed = case.observe()
    for t, b in case.batch["is_first"].nonzero().tolist():
        (gradient,) = torch.autograd.grad(
            observed.latent.deter[t, b].sum(), case.rssm.initial_deter, retain_graph=True
        )
        assert gradient.abs().min() > 0


def test_unimix_on_literal_numbers():
    logits = torch.tensor([0.0, 3.0]).log()  # softmax 0 and 1
    assert unimix_log_probs(logits, 0.01).exp().tolist() == pytest.approx([0.005, 0.995])
    logits = torch.tensor([1.0, 3.0]).log()
    assert unimix_log_probs(logits, 0.01).exp().tolist() == pytest.approx([0.2525, 0.7475])
    assert unimix_log_probs(logits, 0.0).exp().tolist() == pytest.approx([0.25, 0.75])
    assert unimix_log_probs(torch.tensor([0.0, 200.0]), 0.0).tolist() == [-200.0, 0.0]
    assert unimix_log_probs(logits.bfloat16(), 0.01).dtype == torch.float32


def test_samples_invert_the_distribution_function():
    logp = torch.tensor([0.25, 0.5, 0.25]).log()
    uniform = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 0.99999])
    assert sample_index(logp.expand(6, 3), uniform).tolist() == [0, 0, 1, 1, 2, 2]
    assert sample_index(torch.tensor([0.5, 0.4999]).log(), torch.tensor(0.99999)).item() == 1  # rounding


def test_posteriors_and_priors_are_distributions_with_a_floor(case):
    observed = case.observe()
    for logp in (observed.post_logp, observed.prior_logp):
        assert logp.shape == (6, 3, 4, 5)
        assert torch.allclose(logp.exp().sum(-1), torch.ones(6, 3, 4))
        assert logp.exp().min() >= 0.01 / 5 - 1e-7


def test_the_latent_is_one_hot_with_the_gradient_of_its_probabilities(case):
    observed = case.observe()
    latent = observed.latent
    assert torch.equal(latent.stoch.argmax(-1), latent.index)
    assert set(latent.stoch.unique().tolist()) == {0.0, 1.0}
    drawn = sample_index(observed.post_logp.detach(), case.uniform)
    assert (drawn == latent.index).float().mean() > 0.99  # except ties within rounding
    weight = torch.randn(5)
    straight = torch.autograd.grad((latent.stoch * weight).sum(), case.rssm.post_out.bias, retain_graph=True)
    through_p = torch.autograd.grad((observed.post_logp.exp() * weight).sum(), case.rssm.post_out.bias)
    assert torch.allclose(straight[0], through_p[0], rtol=1e-4, atol=1e-6)
