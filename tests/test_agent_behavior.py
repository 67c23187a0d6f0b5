"""Actor and critic in imagination: returns, weights, losses and their gradients on literal numbers.

Axes: H horizon, N starting states, S groups, K classes, A action width.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from hdfast.agent.behavior import Scores, Trajectory, frozen
from hdfast.agent.distributions import normal_entropy, normal_parameters, unimix_log_probs
from hdfast.agent.networks import Latent, LatentMLP
from hdfast.agent.returns import ReturnRange
from hdfast_kernels import two_hot_mean
from tests.agent_cases import make_batch, make_learner, one_thread  # noqa: F401

F32 = torch.float32
YES, NO = torch.tensor(True), torch.tensor(False)
GAMMA = 1 - 1 / 333


class Rollout:
    """A small learner with spread parameters, and a rollout from 5 random states."""

    def __init__(self, continuous: bool, **behavior: str):
        self.learner = make_learner(continuous, behavior={"horizon": 4, **behavior})
        self.model, self.behavior = self.learner.model, self.learner.behavior
        generator = torch.Generator().manual_seed(0)
        self.start = Latent(
            torch.randn(5, 16, generator=generator), torch.randint(5, (5, 4), generator=generator)
        )
        self.start_cont = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
        self.draws = self.learner.draws(5)
        with torch.no_grad():  # some states go on and some do not, whatever the random weights
            for _ in range(20):
                going = self.behavior.imagine(self.model, self.start, self.start_cont, self.draws, F32).cont[
                    1:
                ]
                if 0 < going.mean() < 1:
                    break
                self.model.cont.out["logit"].bias += 0.1 * (1 - 2 * going.mean())
        self.trajectory = self.behavior.imagine(self.model, self.start, self.start_cont, self.draws, F32)
        self.scores = self.behavior.score(self.trajectory, F32)


REINFORCE = {"actor_grad": "reinforce"}


@pytest.fixture(params=["discrete", "continuous", "continuous by REINFORCE"])
def rollout(request) -> Rollout:
    return Rollout(request.param != "discrete", **(REINFORCE if "REINFORCE" in request.param else {}))


class Table(nn.Module):
    """A critic with given outputs: two-hot logits that decode to symexp of given bins."""

    def __init__(self, bins: Tensor):
        super().__init__()
        self.logits = 100.0 * nn.functional.one_hot(bins + 20, 41)  # 41 bins from -20 to 20

    def forward(self, latent: Latent, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"logits": self.logits[: len(latent.deter)]}


def hand_made(continuous: bool, **parts) -> Trajectory:
    """A trajectory of H = 2, N = 3 with the given parts."""
    parts = {"log_prob": torch.zeros(2, 3), "entropy": torch.zeros(2, 3)} | parts
    parts = {"cont": torch.ones(3, 3), "reward": torch.zeros(2, 3)} | parts
    latent = Latent(torch.zeros(3, 3, 16), torch.zeros(3, 3, 4, dtype=torch.int64))
    action = torch.zeros(2, 3, 3) if continuous else torch.zeros(2, 3, dtype=torch.int64)
    return Trajectory(latent, action, **parts)


# Returns.


def test_returns_and_weights_on_literal_numbers():
    behavior = make_learner().behavior
    behavior.critic = Table(torch.tensor([0, 1, 2])[:, None].expand(3, 3))
    v1, v2 = math.expm1(1), math.expm1(2)
    trajectory = hand_made(
        continuous=False,
        reward=torch.tensor([[1.0, 2.0]]).T.expand(2, 3),
        cont=torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 1.0]]),
    )
    scores = behavior.score(trajectory, F32)
    assert scores.value.T[0].tolist() == pytest.approx([0, v1, v2], rel=1e-4)
    going_on = [1 + GAMMA * (0.05 * v1 + 0.95 * (2 + GAMMA * v2)), 2 + GAMMA * v2]
    ending = [1 + GAMMA * (0.05 * v1 + 0.95 * 2), 2.0]
    for column, expected in enumerate([going_on, ending, going_on]):
        assert scores.returns.T[column].tolist() == pytest.approx(expected, rel=1e-4)
    assert scores.weight.T.tolist() == [
        pytest.approx([1, GAMMA, GAMMA**2]),
        pytest.approx([1, GAMMA, 0]),
        [0, 0, 0],  # the start is a terminal state
    ]


def test_the_return_range_on_literal_numbers():
    returns = torch.arange(101.0).view(101, 1)  # percentiles 5 and 95
    ranges = ReturnRange(0.99)
    assert ranges.bounds.tolist() == [0.0, 0.0]
    bounds = ranges.updated(returns)
    assert bounds.tolist() == pytest.approx([0.05, 0.95])  # not debiased
    assert ranges.bounds.tolist() == [0.0, 0.0]  # the learner stores it
    ranges.bounds.copy_(bounds)
    assert ranges.updated(returns + 100).tolist() == pytest.approx([0.99 * 0.05 + 1.05, 0.99 * 0.95 + 1.95])
    assert ranges.updated(torch.tensor([0.0, 1.0])).tolist() == pytest.approx(
        [0.99 * 0.05 + 0.01 * 0.05, 0.99 * 0.95 + 0.01 * 0.95]  # interpolated
    )
    assert ReturnRange().scale(torch.tensor([-3.0, 4.0])).item() == 7.0
    assert ReturnRange().scale(torch.tensor([0.2, 0.4])).item() == 1.0
    other = ReturnRange(0.0, 0.25, 0.5, floor=0.1)
    assert other.updated(returns).tolist() == [25.0, 50.0]
    assert other.scale(torch.tensor([0.2, 0.4])).item() == pytest.approx(0.2)
    assert other.scale(torch.tensor([0.2, 0.25])).item() == pytest.approx(0.1)


# Losses.

BOUNDS = torch.tensor([-1.0, 3.0])  # advantages are divided by 4


def hand_scored(returns: Tensor, value: Tensor) -> Scores:
    weight = torch.tensor([[1.0, 1.0, 0.0], [0.5, 0.25, 0.0], [9.0, 9.0, 9.0]])
    return Scores(torch.zeros(3, 3, 41), value, returns, weight)


def test_reinforce_on_literal_numbers():
    """-log p * advantage - 3e-4 * entropy, times weight; the advantage takes no gradient."""
    behavior = make_learner(continuous=False).behavior
    log_prob, entropy = (torch.full((2, 3), x, requires_grad=True) for x in (-0.5, 0.9))
    returns, value = (torch.full((n, 3), x, requires_grad=True) for n, x in ((2, 6.0), (3, 2.0)))
    trajectory = hand_made(continuous=False, log_prob=log_prob, entropy=entropy)
    loss, metrics = behavior.actor_loss(trajectory, hand_scored(returns, value), BOUNDS)
    weight = torch.tensor([[1.0, 1.0, 0.0], [0.5, 0.25, 0.0]])
    advantage = (6.0 - 2.0) / 4.0
    assert loss.item() == pytest.approx((0.5 * advantage - 3e-4 * 0.9) * weight.mean().item())
    loss.backward()
    assert torch.allclose(log_prob.grad, -advantage * weight / 6)
    assert torch.allclose(entropy.grad, -3e-4 * weight / 6)
    assert returns.grad is None
    assert value.grad is None
    assert metrics["advantage_abs"].item() == pytest.approx(advantage)
    assert (metrics["return_low"].item(), metrics["return_high"].item()) == (-1.0, 3.0)


def test_metrics_are_means_over_everything_imagined():
    entropy, reward, returns, value = (torch.arange(n).view(-1, 3) * 1.0 for n in (6, 6, 6, 9))
    trajectory = hand_made(continuous=False, entropy=entropy, reward=reward + 1)
    _, found = make_learner().behavior.actor_loss(trajectory, hand_scored(returns + 2, value * 2), BOUNDS)
    means = {"actor_entropy": 2.5, "imagined_reward": 3.5, "return_mean": 4.5, "value_mean": 8.0}
    assert {name: found[name].item() for name in means} == means
    apart = (2 + 1 + 0 + 1 + 2 + 3) / 6  # returns 2, 3, ..., 7 from values 0, 2, ..., 10
    assert found["advantage_abs"].item() == apart / 4


def test_backpropagated_returns_on_literal_numbers():
    """-advantage - 3e-4 * entropy, times weight; return and baseline both take gradients, log p none."""
    behavior = make_learner(continuous=True).behavior
    log_prob, entropy = (torch.full((2, 3), x, requires_grad=True) for x in (-0.5, 0.9))
    returns, value = (torch.full((n, 3), x, requires_grad=True) for n, x in ((2, 6.0), (3, 2.0)))
    trajectory = hand_made(continuous=True, log_prob=log_prob, entropy=entropy)
    loss, _ = behavior.actor_loss(trajectory, hand_scored(returns, value), BOUNDS)
    weight = torch.tensor([[1.0, 1.0, 0.0], [0.5, 0.25, 0.0]])
    assert loss.item() == pytest.approx((-1.0 - 3e-4 * 0.9) * weight.mean().item())
    loss.backward()
    assert torch.allclose(returns.grad, -weight / 4 / 6)
    assert torch.allclose(value.grad[:2], weight / 4 / 6)
    assert value.grad[2].tolist() == [0.0, 0.0, 0.0]
    assert torch.allclose(entropy.grad, -3e-4 * weight / 6)
    assert log_prob.grad is None


def test_the_critic_s_loss_on_literal_numbers():
    """Cross-entropy with the return and with the slow critic's value, both of which fall on a bin here."""
    behavior = make_learner().behavior
    behavior.slow_critic = Table(torch.full((3, 3), 3))
    logits = torch.zeros(3, 3, 41, requires_grad=True)
    returns = torch.full((2, 3), math.expm1(2), requires_grad=True)
    weight = torch.tensor([[1.0, 1.0, 0.0], [0.5, 0.25, 0.0], [9.0, 9.0, 9.0]])
    scores = Scores(logits, torch.zeros(3, 3), returns, weight)
    loss = behavior.critic_loss(hand_made(continuous=False), scores, F32)
    assert loss.item() == pytest.approx(2 * math.log(41) * weight[:2].mean().item(), rel=1e-5)
    loss.backward()
    share = weight[:2, :, None] / 6
    expected = (2 / 41) * share.expand(2, 3, 41).clone()
    expected[..., 22] -= share[..., 0]
    expected[..., 23] -= share[..., 0]
    assert torch.allclose(logits.grad[:2], expected, atol=1e-5)
    assert logits.grad[2].abs().max() == 0  # the last state serves as bootstrap only
    assert returns.grad is None


def test_the_slow_critic_is_copied_and_then_follows():
    behavior = make_learner().behavior
    fast, slow = list(behavior.critic.parameters()), list(behavior.slow_critic.parameters())
    before = [p.clone() for p in slow]
    assert not any(p.requires_grad for p in slow)
    behavior.update_slow_critic(NO, fast)
    assert all(torch.equal(p, b) for p, b in zip(slow, before, strict=True))
    assert behavior.slow_updates.item() == 0
    behavior.update_slow_critic(YES, fast)
    assert any(not torch.equal(p, b) for p, b in zip(slow, before, strict=True))
    assert all(torch.allclose(p, q, rtol=0, atol=1e-6) for p, q in zip(slow, fast, strict=True))
    for p in fast:
        p.data += 1
    behavior.update_slow_critic(YES, fast)
    assert all(torch.allclose(q - p, torch.tensor(0.98), atol=1e-5) for p, q in zip(slow, fast, strict=True))
    behavior.update_slow_critic(NO, fast)
    assert all(torch.allclose(q - p, torch.tensor(0.98), atol=1e-5) for p, q in zip(slow, fast, strict=True))
    assert behavior.slow_updates.item() == 2


# The rollout.


def test_the_rollout_is_what_it_says(rollout):
    """States, actions, rewards and continuations step by step, each in its place."""
    trajectory, start, behavior = rollout.trajectory, rollout.start, rollout.behavior
    latent = trajectory.latent
    assert latent.deter.shape == (5, 5, 16)
    assert torch.equal(latent.deter[0], start.deter)
    assert torch.equal(latent.index[0], start.index)
    weights = rollout.model.rssm.cast(F32)
    for t in range(4):
        state = Latent(latent.deter[t], latent.index[t])
        decision = behavior.actor(state, rollout.draws.action[t], F32)
        assert torch.equal(trajectory.action[t], decision.action)
        if behavior.reinforce:
            log_prob, entropy = behavior.actor.log_prob_and_entropy(
                state, decision.action, rollout.draws.action[t], F32
            )
        else:
            log_prob, entropy = torch.zeros(5), decision.entropy
        assert torch.allclose(trajectory.log_prob[t], log_prob, atol=1e-6)
        assert torch.allclose(trajectory.entropy[t], entropy, atol=1e-6)
        following = rollout.model.rssm.imagine_step(state, decision.action, rollout.draws.latent[t], weights)
        assert torch.allclose(latent.deter[t + 1], following.deter, atol=1e-6)
        assert torch.equal(latent.index[t + 1], following.index)
    states = Latent(latent.deter, latent.index)
    assert torch.allclose(
        trajectory.reward, two_hot_mean(rollout.model.reward_logits(states, F32))[1:], rtol=1e-4, atol=1e-6
    )
    mode = (rollout.model.cont_logit(states, F32) > 0).float()
    assert torch.equal(trajectory.cont[0], rollout.start_cont)  # the truth, not the head's prediction
    assert torch.equal(trajectory.cont[1:], mode[1:])
    assert 0 < mode.mean() < 1


def test_discrete_decisions():
    rollout = Rollout(continuous=False)
    trajectory, actor = rollout.trajectory, rollout.behavior.actor
    states = Latent(trajectory.latent.deter[:-1], trajectory.latent.index[:-1])
    logp = unimix_log_probs(actor.mlp(states, F32)["logits"], 0.01)
    law = torch.distributions.Categorical(logits=logp)
    assert torch.allclose(trajectory.log_prob, law.log_prob(trajectory.action), atol=1e-6)
    assert torch.allclose(trajectory.entropy, law.entropy(), atol=1e-6)
    assert logp.exp().min() >= 0.01 / 3
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    one = Latent(states.deter[0, :1].expand(20_000, -1), states.index[0, :1].expand(20_000, -1))
    drawn = torch.bincount(actor(one, uniform, F32).action, minlength=3) / 20_000
    assert torch.allclose(drawn, logp[0, 0].exp(), atol=0.015)  # four standard errors


def test_continuous_decisions():
    rollout = Rollout(continuous=True)
    trajectory, actor = rollout.trajectory, rollout.behavior.actor
    states = Latent(trajectory.latent.deter[:-1].detach(), trajectory.latent.index[:-1])
    out = actor.mlp(states, F32)
    mean, std = out["mean"].tanh(), 0.9 * (out["std"] + 2).sigmoid() + 0.1
    assert torch.allclose(trajectory.action, mean + std * rollout.draws.action, atol=1e-6)
    assert torch.allclose(
        trajectory.entropy, torch.distributions.Normal(mean, std).entropy().sum(-1), atol=1e-5
    )
    mean, std = normal_parameters(torch.tensor([0.0, 100.0]), torch.tensor([-2.0, -100.0]))
    assert mean.tolist() == [0.0, 1.0]
    assert std.tolist() == pytest.approx([0.55, 0.1])
    assert normal_entropy(torch.ones(3)).item() == pytest.approx(3 * 1.4189385)


@pytest.mark.parametrize("continuous", [False, True], ids=["discrete", "continuous"])
def test_each_network_takes_a_gradient_once_per_imagined_state(continuous):
    """The authors evaluate actor and critic up to three times on the same states."""
    learner = make_learner(continuous)
    rows: dict[str, list[int]] = {}

    def count(name: str, module: LatentMLP) -> None:
        at = module.at

        def counted(dtype):
            network = at(dtype)

            def run(latent):
                if torch.is_grad_enabled():
                    rows.setdefault(name, []).append(latent.index[..., 0].numel())
                return network(latent)

            return run

        module.at = counted

    behavior, model = learner.behavior, learner.model
    for name, module in {
        "actor": behavior.actor.mlp,
        "critic": behavior.critic,
        "slow_critic": behavior.slow_critic,
        "reward": model.reward,
        "cont": model.cont,
    }.items():
        count(name, module)
    images: list[str] = []
    for name, module in {"encoder": model.encoder["image"], "decoder": model.decoder["image"]}.items():
        module.register_forward_pre_hook(lambda _, arguments, name=name: images.append(name))
    learner.update(lambda *_: make_batch(learner))
    H, N = 4, 18
    assert rows == {
        "actor": [N] * H if continuous else [H * N],
        "critic": [(H + 1) * N],
        "reward": [N, H * N] if continuous else [N],
        "cont": [N],
    }
    assert images == ["encoder", "decoder"]


# Whose gradient goes where.


def reached(loss: Tensor, module: nn.Module) -> set[str]:
    """Names of the parameters that get a gradient from the loss."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    parameters = [p.requires_grad_() for p in parameters]
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return {name for name, g in zip(names, found, strict=True) if g is not None}


def test_the_actor_s_loss_reaches_the_actor_alone(rollout):
    bounds = rollout.behavior.return_range.updated(rollout.scores.returns)
    loss, _ = rollout.behavior.actor_loss(rollout.trajectory, rollout.scores, bounds)
    assert reached(loss, rollout.behavior.actor) == {n for n, _ in rollout.behavior.actor.named_parameters()}
    assert reached(loss, rollout.model) == set()
    assert reached(loss, rollout.behavior.slow_critic) == set()
    if rollout.behavior.reinforce:  # otherwise it reaches the critic, whose gradient is not taken
        assert reached(loss, rollout.behavior.critic) == set()


def test_the_critic_s_loss_reaches_the_critic_alone():
    rollout = Rollout(continuous=False)
    loss = rollout.behavior.critic_loss(rollout.trajectory, rollout.scores, F32)
    assert reached(loss, rollout.behavior.critic) == {
        n for n, _ in rollout.behavior.critic.named_parameters()
    }
    assert reached(loss, rollout.behavior.actor) == set()
    assert reached(loss, rollout.behavior.slow_critic) == set()
    assert reached(loss, rollout.model) == set()


@pytest.mark.parametrize("continuous", [False, True], ids=["discrete", "continuous"])
def test_no_gradient_of_the_actor_reaches_the_states_that_it_sees(continuous):
    learner = make_learner(continuous)
    actor, deter = learner.behavior.actor, torch.randn(5, 16, requires_grad=True)
    latent, draw = Latent(deter, torch.zeros(5, 4, dtype=torch.int64)), learner.draws(5).action[0]
    decision, mode = actor(latent, draw, F32), actor.mode(latent, F32)
    found = [mode, *decision, *actor.log_prob_and_entropy(latent, decision.action.detach(), draw, F32)]
    trained = [x for x in found if x is not None and x.requires_grad]
    assert len(trained) == (5 if continuous else 2)
    assert all(torch.autograd.grad(x.sum(), deter, allow_unused=True) == (None,) for x in trained)


def test_a_continuous_actor_feels_later_rewards_through_the_dynamics():
    """The first action's gradient comes from rewards that depend on it only through the recurrent state."""
    rollout = Rollout(continuous=True)
    last = rollout.trajectory.reward[-1].sum()
    assert reached(last, rollout.behavior.actor)
    (gradient,) = torch.autograd.grad(last, rollout.behavior.actor.mlp.out["mean"].weight)
    assert gradient.abs().max() > 0


def test_a_frozen_module_thaws_as_it_was():
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)

    def fail_inside() -> None:
        with frozen(module):
            assert not module.weight.requires_grad
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert module.weight.requires_grad
    assert not module.bias.requires_grad
