"""What the agent does: an actor and a critic, trained on trajectories that the world model imagines (ALGORITHM §4).

Axes: H horizon, N starting states (T*B), D deter, S groups, K classes, A action width.

The critic sees each imagined state once, for baseline, bootstrap and loss. So does the actor where gradients flow back
through its rollout, as they do by default where actions are continuous. With REINFORCE it acts step by step without
gradients, and one pass over the whole rollout then gives the log-probabilities of its actions with gradients.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hdfast.agent.distributions import (
    categorical_entropy,
    normal_entropy,
    normal_log_prob,
    normal_parameters,
)
from hdfast.agent.networks import Latent, LatentMLP
from hdfast.agent.optimizer import Parameters
from hdfast.agent.returns import ReturnRange
from hdfast.agent.world_model import WorldModel
from hdfast.config import Config
from hdfast.envs.base import ContinuousActions, DiscreteActions
from hdfast_kernels import lambda_return, sample_index, sample_onehot, two_hot_loss, two_hot_mean


class Decision(NamedTuple):
    """An action (...) int64 or (..., A) float32, and the entropy (...) in nats of a continuous one."""

    action: Tensor
    entropy: Tensor | None


class Trajectory(NamedTuple):
    """An imagined rollout.

    latent: (H+1, N, ...) states, the first being the start.
    action: (H, N) int64 or (H, N, A) float32, taken in states 0..H-1.
    log_prob, entropy: (H, N) of the actions, in nats; log_prob is zero where gradients flow through the actions.
    cont: (H+1, N), 0 where the episode is over: the truth at the start, then the mode of the head.
    reward: (H, N), received on arriving at states 1..H.
    """

    latent: Latent
    action: Tensor
    log_prob: Tensor
    entropy: Tensor
    cont: Tensor
    reward: Tensor


class Draws(NamedTuple):
    """The random numbers of a rollout: latent (H, N, S) in [0, 1); action (H, N) in [0, 1), or (H, N, A) normal."""

    latent: Tensor
    action: Tensor


class Scores(NamedTuple):
    """The critic's one pass over a trajectory: logits (H+1, N, bins), value, weight (H+1, N), returns (H, N)."""

    logits: Tensor
    value: Tensor
    returns: Tensor
    weight: Tensor


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """In the block, the modules' parameters take no gradient, but gradients still flow through their inputs."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


class Actor(nn.Module):
    """Latent to action: a unimix categorical, or a Normal with tanh mean and a standard deviation in (0.1, 1)."""

    def __init__(self, actions: DiscreteActions | ContinuousActions, config: Config):
        super().__init__()
        self.discrete = isinstance(actions, DiscreteActions)
        self.unimix = config.behavior.unimix
        width = actions.count if isinstance(actions, DiscreteActions) else actions.size
        outputs = {"logits": width} if self.discrete else {"mean": width, "std": width}
        rssm, net = config.rssm, config.network
        self.mlp = LatentMLP(rssm.deter, rssm.stoch * rssm.classes, net.units, net.layers, outputs)

    def at(self, dtype: torch.dtype) -> Callable[[Latent, Tensor], Decision]:
        """What `forward` does, with the weights cast once, for many calls."""
        network = self.mlp.at(dtype)

        def decide(latent: Latent, draw: Tensor) -> Decision:
            out = network(latent.detach())
            if self.discrete:
                index = sample_index(out["logits"][..., None, :], draw[..., None], self.unimix)
                return Decision(index.squeeze(-1), None)
            mean, std = normal_parameters(out["mean"], out["std"])
            return Decision(mean + std * draw, normal_entropy(std))

        return decide

    def forward(self, latent: Latent, draw: Tensor, dtype: torch.dtype) -> Decision:
        """Chooses an action in each of the detached latents (...); see `Draws` for the random numbers."""
        return self.at(dtype)(latent, draw)

    def mode(self, latent: Latent, dtype: torch.dtype) -> Tensor:
        """The likeliest actions in the detached latents (...): (...) int64, or the mean (..., A) float32."""
        out = self.mlp(latent.detach(), dtype)
        if self.discrete:
            return out["logits"].argmax(-1)  # unimix keeps the order
        return normal_parameters(out["mean"], out["std"])[0]

    def log_prob_and_entropy(
        self, latent: Latent, action: Tensor, draw: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Both (...), of actions that were drawn with the numbers `draw` in detached latents (...), in nats."""
        out = self.mlp(latent.detach(), dtype)
        if not self.discrete:
            mean, std = normal_parameters(out["mean"], out["std"])
            return normal_log_prob(action, mean, std), normal_entropy(std)
        # Used for its fused log-probabilities alone; the sample is ignored.
        logp = sample_onehot(out["logits"][..., None, :], draw[..., None], self.unimix)[2].squeeze(-2)
        return logp.gather(-1, action[..., None]).squeeze(-1), categorical_entropy(logp)


class Behavior(nn.Module):
    """Actor, critic, slow critic and the range of returns.

    Args:
        actions: what the environment accepts.
        config: the run's configuration.
    """

    slow_updates: Tensor

    def __init__(self, actions: DiscreteActions | ContinuousActions, config: Config):
        super().__init__()
        rssm, net, behavior = config.rssm, config.network, config.behavior
        self.reinforce = isinstance(actions, DiscreteActions) or behavior.actor_grad == "reinforce"
        self.horizon, self.lam = behavior.horizon, behavior.lam
        self.discount = 1 - 1 / behavior.discount_horizon
        self.entropy_scale, self.slow_rate = behavior.entropy, behavior.slow_rate
        self.actor = Actor(actions, config)

        def build_critic() -> LatentMLP:
            stoch = rssm.stoch * rssm.classes
            return LatentMLP(rssm.deter, stoch, net.units, net.layers, {"logits": net.bins}, scale=0.0)

        self.critic = build_critic()
        self.slow_critic = build_critic().requires_grad_(False)
        self.return_range = ReturnRange(
            behavior.return_decay, behavior.return_low, behavior.return_high, behavior.return_floor
        )
        self.register_buffer("slow_updates", torch.zeros((), dtype=torch.int64))

    def imagine(
        self, model: WorldModel, start: Latent, start_cont: Tensor, draws: Draws, dtype: torch.dtype
    ) -> Trajectory:
        """Rolls the actor out inside the world model for H steps.

        Args:
            start: detached (N, ...) states. start_cont: (N,) float, 1 - is_terminal of the starting rows.

        Gradients reach the actor: with REINFORCE through log_prob and entropy, otherwise through the dynamics. The
        world model's parameters take none. A subclass may add to the rewards, `(H, N)`, of what this returns.
        """
        with frozen(model):
            if self.reinforce:
                (latent, action), entropy = self._roll_out(model, start, draws, dtype), None
            else:
                latent, action, entropy = self._roll_out_with_gradients(model, start, draws, dtype)
            arrived = latent.after_first()
            with torch.set_grad_enabled(not self.reinforce):
                reward = model.expected_reward(arrived, dtype)
            with torch.no_grad():
                goes_on = model.cont_logit(arrived.detach(), dtype) > 0
                cont = torch.cat([start_cont[None], goes_on.float()])
        if entropy is None:
            states = latent.before_last()
            log_prob, entropy = self.actor.log_prob_and_entropy(states, action, draws.action, dtype)
        else:
            log_prob = torch.zeros_like(entropy)
        return Trajectory(latent, action, log_prob, entropy, cont, reward)

    @torch.no_grad()
    def _roll_out(
        self, model: WorldModel, start: Latent, draws: Draws, dtype: torch.dtype
    ) -> tuple[Latent, Tensor]:
        """States (H+1, N, ...) and actions (H, N, ...)."""
        rssm, decide, actions = model.rssm, self.actor.at(dtype), []
        weights, rollout = rssm.cast(dtype), rssm.rollout(start, self.horizon, dtype)
        for t in range(self.horizon):
            actions.append(decide(rollout.each[t], draws.action[t]).action)
            rssm.imagine_into(rollout, t, actions[-1], draws.latent[t], weights)
        return rollout.states, torch.stack(actions)

    @torch.enable_grad()
    def _roll_out_with_gradients(
        self, model: WorldModel, start: Latent, draws: Draws, dtype: torch.dtype
    ) -> tuple[Latent, Tensor, Tensor]:
        """States (H+1, N, ...), actions (H, N, ...) and entropies (H, N); gradients flow through all of them."""
        rssm, weights, decisions = model.rssm, model.rssm.cast(dtype), []
        latents = [start.expand_once(rssm.classes, dtype)]
        for t in range(self.horizon):
            # Casts the actor's weights at every step: the gradient of weights that are cast once would be added up over
            # the steps in bfloat16, not in float32.
            decisions.append(self.actor(latents[-1], draws.action[t], dtype))
            latents.append(rssm.imagine_step(latents[-1], decisions[-1].action, draws.latent[t], weights))
        actions, entropies = zip(*decisions, strict=True)
        latent = _stack(latents).expand_once(rssm.classes, dtype)
        return latent, torch.stack(actions), torch.stack(entropies)

    def value(self, latent: Latent, dtype: torch.dtype) -> Tensor:
        """The critic's value (...) of latents, float32: the discounted rewards that it expects from there on."""
        return two_hot_mean(self.critic(latent, dtype)["logits"])

    def score(self, trajectory: Trajectory, dtype: torch.dtype) -> Scores:
        """Values, lambda-returns and discount weights of a trajectory.

        Gradients of the logits reach the critic; without REINFORCE `value` and `returns` also carry gradients to the
        trajectory, and the critic's parameters must be frozen by whoever descends them.
        """
        logits = self.critic(trajectory.latent, dtype)["logits"]
        with torch.set_grad_enabled(not self.reinforce):
            value = two_hot_mean(logits)
            returns, weight = lambda_return(
                trajectory.reward, trajectory.cont, value, self.discount, self.lam
            )
        return Scores(logits, value, returns, weight.detach())

    def actor_loss(
        self, trajectory: Trajectory, scores: Scores, bounds: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss of the actor: REINFORCE, or the returns themselves where gradients flow through the dynamics.

        Args:
            bounds: (2,) percentiles of the returns, this batch included.
        """
        advantage = (scores.returns - scores.value[:-1]) / self.return_range.scale(bounds)
        gain = trajectory.log_prob * advantage.detach() if self.reinforce else advantage
        loss = (-gain - self.entropy_scale * trajectory.entropy) * scores.weight[:-1]
        with torch.no_grad():
            metrics = {
                "actor_entropy": trajectory.entropy.mean(),
                "advantage_abs": advantage.abs().mean(),
                "return_mean": scores.returns.mean(),
                "return_low": bounds[0],
                "return_high": bounds[1],
                "imagined_reward": trajectory.reward.mean(),
                "value_mean": scores.value.mean(),
            }
        return loss.mean(), metrics

    def critic_loss(self, trajectory: Trajectory, scores: Scores, dtype: torch.dtype) -> Tensor:
        """Scalar loss of the critic: two-hot cross-entropy to the returns and to the slow critic's value."""
        with torch.no_grad():
            slow = two_hot_mean(self.slow_critic(trajectory.latent.before_last(), dtype)["logits"])
        logits = scores.logits[:-1]
        loss = two_hot_loss(logits, scores.returns.detach()) + two_hot_loss(logits, slow)
        return (loss * scores.weight[:-1]).mean()

    @torch.no_grad()
    def update_slow_critic(self, apply: Tensor, fast: Sequence[Tensor]) -> None:
        """Moves the slow critic towards the critic: a copy the first time, by `slow_rate` afterwards.

        Args:
            apply: scalar bool on the device; false leaves everything as it is.
            fast: tensors that hold the critic's parameters, as `slow_parameters` hold the slow critic's.
        """
        rate = torch.where(self.slow_updates == 0, 1.0, self.slow_rate)
        rate = torch.where(apply, rate, 0.0)
        for follower, leader in zip(self.slow_parameters.tensors(), fast, strict=True):
            follower.lerp_(leader, rate)
        self.slow_parameters.changed()
        self.slow_updates += apply

    @cached_property
    def slow_parameters(self) -> Parameters:
        """The slow critic's, which change together."""
        return Parameters(self.slow_critic.parameters())

    def parts(self) -> dict[str, nn.Module]:
        """The trained parts by name."""
        return {"actor": self.actor, "critic": self.critic}


def _stack(latents: list[Latent]) -> Latent:
    """H+1 latents (N, ...), all but the first with a straight-through sample, -> one latent (H+1, N, ...)."""
    deter = torch.stack([latent.deter for latent in latents])
    index = torch.stack([latent.index for latent in latents])
    drawn = [latent.stoch for latent in latents[1:] if latent.stoch is not None]
    return Latent(deter, index, torch.stack([torch.zeros_like(drawn[0]), *drawn]))
