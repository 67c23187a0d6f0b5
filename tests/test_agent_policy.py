"""Acting: the posterior of training, one row at a time, with actions that an environment accepts."""

import re

import numpy as np
import pytest
import torch

from hdfast.agent.distributions import clip_action, unimix_log_probs
from hdfast.agent.networks import Latent
from hdfast.agent.policy import Policy
from tests.agent_cases import make_batch, make_learner, one_thread  # noqa: F401
from tests.recorder import record_instead_of_capturing

F32 = torch.float32


@pytest.fixture(params=[False, True], ids=["discrete", "continuous"])
def learner(request):
    return make_learner(continuous=request.param, replay={"batch": 5, "length": 6})


def rows(learner, seed: int = 0) -> list[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Observations and is_first of 6 steps of 5 environments."""
    batch = make_batch(learner, seed)
    return [
        ({k: batch[k][t].numpy() for k in ("image", "state")}, batch["is_first"][t].numpy()) for t in range(6)
    ]


def act(policy: Policy, steps) -> list[np.ndarray]:
    return [policy(obs, is_first) for obs, is_first in steps]


def test_actions_are_what_environments_accept(learner):
    for action in act(Policy(learner, 5, seed=0), rows(learner)):
        spec = learner.actions.spec
        assert action.shape == (5, *spec.shape)
        assert action.dtype == spec.dtype
        assert learner.actions.error(action) is None


def test_actions_follow_from_the_seed(learner):
    one, same, other = (act(Policy(learner, 5, seed=k), rows(learner)) for k in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_acting_sees_what_training_sees(learner):
    """The states while acting are the posterior of the window that acting wrote to replay."""
    policy, steps = Policy(learner, 5, seed=0), rows(learner)
    generator = torch.Generator()
    generator.manual_seed(0)
    uniform, states, actions = [], [], []
    for obs, is_first in steps:
        uniform.append(torch.rand(5, 4, generator=generator))
        if learner.behavior.reinforce:
            torch.rand(5, generator=generator)
        else:
            torch.randn(5, 3, generator=generator)
        actions.append(torch.from_numpy(policy(obs, is_first).copy()))
        states.append(Latent(policy.latent.deter.clone(), policy.latent.index.clone()))
    batch = make_batch(learner) | {"action": torch.stack(actions)}
    assert batch["is_first"][1:].any()
    observed = learner.model.observe(batch, torch.stack(uniform), F32)
    assert torch.allclose(torch.stack([s.deter for s in states]), observed.latent.deter, atol=1e-6)
    assert torch.equal(torch.stack([s.index for s in states]), observed.latent.index)
    assert not any(s.deter.requires_grad for s in states)


def test_a_first_row_forgets(learner):
    """With the same draws, what was seen before the episode makes no difference."""
    steps, others = rows(learner, 0), rows(learner, 1)
    first = (steps[2][0], np.ones(5, bool))
    ends = []
    for before in (steps[:2], others[:2]):
        policy = Policy(learner, 5, seed=3)
        act(policy, before)
        ends.append(policy(*first))
        ends.append(policy(*steps[3]))
    assert np.array_equal(ends[0], ends[2])
    assert np.array_equal(ends[1], ends[3])


def test_reset_forgets_the_state_and_the_last_action(learner):
    policy = Policy(learner, 5, seed=0)
    act(policy, rows(learner))
    policy.reset()
    fresh = Policy(learner, 5, seed=0)
    assert torch.equal(policy.latent.deter, fresh.latent.deter)
    assert torch.equal(policy.latent.index, fresh.latent.index)
    assert torch.equal(policy.action, fresh.action)


def test_the_first_rows_it_sees_and_those_after_a_reset_are_the_first_of_an_episode(learner):
    """Even if the environment says otherwise: a policy may take over in the middle of an episode."""
    obs, _ = rows(learner)[0]
    seen = []
    for first in (True, False):
        policy, is_first = Policy(learner, 5, seed=3), np.full(5, first)
        for _ in range(2):
            policy(obs, is_first)
            seen.append(policy.latent.deter.clone())
            policy.reset()
        for _ in range(2):
            policy(obs, is_first)
        seen.append(policy.latent.deter.clone())
    assert torch.equal(seen[0], seen[3])
    assert torch.equal(seen[1], seen[4])
    assert not torch.equal(seen[2], seen[5])  # later rows are what the environment says


def test_it_acts_with_the_learner_s_present_parameters(learner):
    policy, steps = Policy(learner, 5, seed=0), rows(learner)
    policy(*steps[0])
    before = policy.latent.deter.clone()
    learner.model.rssm.gru.data += 0.5
    again = Policy(learner, 5, seed=0)
    again(*steps[0])
    assert not torch.equal(before, again.latent.deter)
    policy.reset()
    policy(*steps[0])
    assert torch.equal(policy.latent.deter, again.latent.deter)


def test_what_it_remembers_stays_in_place(learner):
    """A captured step reads and writes the memory it was captured with, which no call, reset or row may replace."""
    policy, steps = Policy(learner, 5, seed=0), rows(learner)

    def addresses() -> list[int]:
        tensors = [*policy._obs.values(), policy._first, *policy.latent[:2], policy.action]
        return [tensor.data_ptr() for tensor in tensors]

    before = addresses()
    act(policy, steps)
    policy.reset()
    act(policy, steps[:1])
    assert addresses() == before


def test_actions_belong_to_the_caller(learner):
    first, second, *_ = act(Policy(learner, 5, seed=0), rows(learner))
    assert not np.shares_memory(first, second)


def test_rows_of_another_number_of_environments_are_refused(learner):
    (obs, is_first), policy = rows(learner)[0], Policy(learner, 5, seed=0)
    with pytest.raises(ValueError, match=r"\(1, 8, 8, 3\), expected \(5, 8, 8, 3\)"):
        policy(obs | {"image": obs["image"][:1]}, is_first)
    with pytest.raises(ValueError, match=r"\(1,\), expected \(5,\)"):
        policy(obs, is_first[:1])


def test_what_numpy_would_cast_is_refused_in_one_line(learner):
    """And leaves the policy as it was."""
    (obs, is_first), policy = rows(learner)[0], Policy(learner, 5, seed=0)
    image, state = obs["image"], obs["state"]
    for wrong, first, text in (
        ({"image": image}, is_first, "obs has the keys ['image'], expected ['image', 'state']"),
        (
            obs | {"image": image / np.float32(255)},
            is_first,
            "obs['image'] has dtype float32, expected uint8",
        ),
        (obs | {"image": image.astype(np.int64)}, is_first, "obs['image'] has dtype int64, expected uint8"),
        (obs | {"state": state.astype(float)}, is_first, "obs['state'] has dtype float64, expected float32"),
        (
            obs | {"state": torch.from_numpy(state)},
            is_first,
            "obs['state'] is a Tensor, expected a numpy array",
        ),
        (obs | {"state": state[:, :1]}, is_first, "obs['state'] has shape (5, 1), expected (5, 4)"),
        (obs, is_first.astype(np.int32), "is_first has dtype int32, expected bool"),
        (obs, is_first.tolist(), "is_first is a list, expected a numpy array"),
    ):
        kind = ValueError if "keys" in text or "shape" in text else TypeError
        with pytest.raises(kind, match=f"^{re.escape(text)}$"):
            policy(wrong, first)
    fresh = Policy(learner, 5, seed=0)
    assert np.array_equal(policy(obs | {"unknown": state}, is_first), fresh(obs, is_first))
    assert torch.equal(policy.latent.deter, fresh.latent.deter)


def test_sampled_and_greedy_actions_are_what_the_actor_s_parameters_say(learner):
    """In all steps, the first included; the random numbers are the same, in the same order."""
    actor, continuous = learner.behavior.actor, not learner.behavior.reinforce
    sampled, greedy = (Policy(learner, 5, seed=0, greedy=g) for g in (False, True))
    generator, differ = torch.Generator(), False
    generator.manual_seed(0)
    for obs, is_first in rows(learner):
        torch.rand(5, 4, generator=generator)
        noise = torch.randn(5, 3, generator=generator) if continuous else torch.rand(5, generator=generator)
        drawn, likeliest = sampled(obs, is_first), greedy(obs, is_first)
        with torch.no_grad():
            out = actor.mlp(greedy.latent, F32)
            expected = actor(sampled.latent, noise, F32).action
        if continuous:
            mode, expected = out["mean"].tanh(), clip_action(expected)
        else:
            mode, expected = unimix_log_probs(out["logits"], actor.unimix).argmax(-1).int(), expected.int()
        assert torch.equal(torch.from_numpy(drawn), expected)
        assert torch.equal(torch.from_numpy(likeliest), mode)
        assert likeliest.dtype == learner.actions.spec.dtype
        assert learner.actions.error(likeliest) is None
        assert torch.equal(sampled.generator.get_state(), greedy.generator.get_state())
        differ |= not np.array_equal(drawn, likeliest)
    assert differ


def test_by_default_actions_are_sampled_and_not_for_training(learner, monkeypatch):
    asked, acting = [], learner.acting
    monkeypatch.setattr(learner, "acting", lambda training: asked.append(training) or acting(training))
    choices = ({}, {"greedy": False}, {"greedy": True}, {"training": True})
    default, sampled, greedy, _ = (
        act(Policy(learner, 5, seed=0, **chosen), rows(learner)) for chosen in choices
    )
    assert np.array_equal(default, sampled)
    assert not np.array_equal(default, greedy)
    assert asked == [False] * 18 + [True] * 6


def test_a_greedy_policy_samples_the_latents_of_a_sampling_one(learner):
    """In a first row, before actions make a difference; another seed gives other latents."""
    obs, _ = rows(learner)[0]
    first, seen = np.ones(5, bool), []
    for seed, greedy in ((0, False), (0, True), (1, True)):
        policy = Policy(learner, 5, seed=seed, greedy=greedy)
        policy(obs, first)
        seen.append(policy.latent.index.clone())
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_replayed_greedy_acts_are_bit_identical_to_eager_ones(learner, monkeypatch):
    monkeypatch.setenv("HDFAST_BACKEND", "reference")  # a recording sees aten calls only
    made = record_instead_of_capturing(monkeypatch)
    steps = rows(learner) * 2
    eager, graph = (act(Policy(learner, 5, seed=0, graph=g, greedy=True), steps) for g in (False, True))
    assert made[0].recording is not None
    assert all(np.array_equal(a, b) for a, b in zip(eager, graph, strict=True))
