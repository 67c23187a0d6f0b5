"""What the agent does: an actor and a critic, trained on trajectories that the world model imagines (ALGORITHM §4).

Axes: H horizon, N starting states (T*B), D deter, S groups, K classes, A action width.

Each network is evaluated once per imagined state: the actor during the rollout, which yields its log-probabilities and
entropies, and the critic once for baseline, bootstrap and loss.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hdfast.agent.distributions import (
    categorical_entropy,
    normal_entropy,
    normal_parameters,
    sample_index,
    unimix_log_probs,
)
from hdfast.agent.networks import Latent, LatentMLP
from hdfast.agent.returns import ReturnRange
from hdfast.agent.world_model import WorldModel
from hdfast.config import Config
from hdfast.envs.base import ContinuousActions, DiscreteActions
from hdfast_kernels import lambda_return, two_hot_loss, two_hot_mean


class ActorOutput(NamedTuple):
    """One decision: action (N,) int64 or (N, A) float32, log_prob (N,) of it, entropy (N,) in nats.

    log_prob is zero for continuous actions, whose gradient goes through the action itself.
    """

    action: Tensor
    log_prob: Tensor
    entropy: Tensor


class Trajectory(NamedTuple):
    """An imagined rollout.

    latent: (H+1, N, ...) states, the first being the start. log_prob, entropy: (H, N) of the actions in between.
    cont: (H+1, N), 0 where the episode is over, first the truth, then the mode of the head.
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
    """Inside, the modules' parameters take no gradient, but gradients still flow through their inputs."""
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
        self.unimix = config.rssm.unimix
        outputs = {"logits": actions.count} if self.discrete else {"mean": actions.size, "std": actions.size}
        rssm, net = config.rssm, config.network
        self.mlp = LatentMLP(rssm.deter, rssm.stoch * rssm.classes, net.units, net.layers, outputs)

    def forward(self, latent: Latent, draw: Tensor, dtype: torch.dtype) -> ActorOutput:
        """Draws an action for each detached latent; see `Draws` for the numbers."""
        out = self.mlp(latent.detach(), dtype)
        if self.discrete:
            logp = unimix_log_probs(out["logits"], self.unimix)
            action = sample_index(logp.detach(), draw)
            log_prob = logp.gather(-1, action[..., None]).squeeze(-1)
            return ActorOutput(action, log_prob, categorical_entropy(logp))
        mean, std = normal_parameters(out["mean"], out["std"])
        action = mean + std * draw
        return ActorOutput(action, torch.zeros_like(mean[..., 0]), normal_entropy(std))


class Behavior(nn.Module):
    """Actor, critic, slow critic and the range of returns.

    Args:
        actions: what the environment accepts.
        config: the run's configuration.
    """

    def __init__(self, actions: DiscreteActions | ContinuousActions, config: Config):
        super().__init__()
        rssm, net, behavior = config.rssm, config.network, config.behavior
        self.discrete = isinstance(actions, DiscreteActions)
        self.horizon, self.lam = behavior.horizon, behavior.lam
        self.discount = 1 - 1 / behavior.discount_horizon
        self.entropy_scale, self.slow_rate = behavior.entropy, behavior.slow_rate
        self.actor = Actor(actions, config)

        def build_critic() -> LatentMLP:
            stoch = rssm.stoch * rssm.classes
            return LatentMLP(rssm.deter, stoch, net.units, net.layers, {"logits": net.bins}, scale=0.0)

        self.critic = build_critic()
        self.slow_critic = build_critic().requires_grad_(False)
        self.return_range = ReturnRange(behavior.return_decay)
        self.register_buffer("slow_updates", torch.zeros((), dtype=torch.int64))

    def imagine(
        self, model: WorldModel, start: Latent, start_cont: Tensor, draws: Draws, dtype: torch.dtype
    ) -> Trajectory:
        """Rolls the actor out inside the world model for H steps.

        Args:
            start: detached (N, ...) states. start_cont: (N,) float, 1 - is_terminal of the starting rows.

        Gradients reach the actor: through log_prob and entropy where actions are discrete, through the dynamics
        where they are continuous. The world model's parameters take none.
        """
        with frozen(model):
            weights = model.rssm.cast(dtype)
            step = model.rssm.imagine_step
            if self.discrete:  # nothing but log_prob and entropy needs a gradient
                step = torch.no_grad()(step)
            latents, decisions = [start], []
            for t in range(self.horizon):
                decisions.append(self.actor(latents[-1], draws.action[t], dtype))
                latents.append(step(latents[-1], decisions[-1].action, draws.latent[t], weights))
            if self.discrete:
                latents = [latent.detach() for latent in latents]
            latent = _stack(latents)
            with torch.set_grad_enabled(not self.discrete):
                reward = two_hot_mean(model.reward_logits(latent, dtype))[1:]
            with torch.no_grad():
                cont = (model.cont_logit(latent.detach(), dtype) > 0).float()
                cont = torch.cat([start_cont[None], cont[1:]])
        stacked = ActorOutput(*(torch.stack(parts) for parts in zip(*decisions, strict=True)))
        return Trajectory(latent, stacked.action, stacked.log_prob, stacked.entropy, cont, reward)

    def score(self, trajectory: Trajectory, dtype: torch.dtype) -> Scores:
        """Values, lambda-returns and discount weights of a trajectory.

        Gradients of the logits reach the critic; for continuous actions `value` and `returns` also carry gradients to
        the trajectory, and the critic's parameters must be frozen by whoever descends them.
        """
        logits = self.critic(trajectory.latent, dtype)["logits"]
        with torch.set_grad_enabled(not self.discrete):
            value = two_hot_mean(logits)
            returns, weight = lambda_return(
                trajectory.reward, trajectory.cont, value, self.discount, self.lam
            )
        return Scores(logits, value, returns, weight.detach())

    def actor_loss(
        self, trajectory: Trajectory, scores: Scores, bounds: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss of the actor: REINFORCE for discrete actions, the returns themselves for continuous ones.

        Args:
            bounds: (2,) percentiles of the returns, this batch included.
        """
        advantage = (scores.returns - scores.value[:-1]) / ReturnRange.scale(bounds)
        gain = trajectory.log_prob * advantage.detach() if self.discrete else advantage
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
            before_last = Latent(*(None if x is None else x[:-1] for x in trajectory.latent))
            slow = two_hot_mean(self.slow_critic(before_last, dtype)["logits"])
        logits = scores.logits[:-1]
        loss = two_hot_loss(logits, scores.returns.detach()) + two_hot_loss(logits, slow)
        return (loss * scores.weight[:-1]).mean()

    @torch.no_grad()
    def update_slow_critic(self, apply: Tensor) -> None:
        """Moves the slow critic towards the critic: a copy the first time, by `slow_rate` afterwards.

        Args:
            apply: scalar bool on the device; false leaves everything as it is.
        """
        rate = torch.where(self.slow_updates == 0, 1.0, self.slow_rate)
        rate = torch.where(apply, rate, 0.0)
        slow, fast = list(self.slow_critic.parameters()), list(self.critic.parameters())
        change = torch._foreach_sub(fast, slow)
        torch._foreach_mul_(change, rate)
        torch._foreach_add_(slow, change)
        self.slow_updates += apply

    def parts(self) -> dict[str, nn.Module]:
        """The trained parts by name."""
        return {"actor": self.actor, "critic": self.critic}


def _stack(latents: list[Latent]) -> Latent:
    """H+1 latents (N, ...) -> one latent (H+1, N, ...); the straight-through sample is kept if every state has one."""
    deter = torch.stack([latent.deter for latent in latents])
    index = torch.stack([latent.index for latent in latents])
    if any(latent.stoch is None for latent in latents[1:]):
        return Latent(deter, index)
    first = torch.zeros_like(latents[1].stoch) if latents[0].stoch is None else latents[0].stoch
    return Latent(deter, index, torch.stack([first, *(latent.stoch for latent in latents[1:])]))
