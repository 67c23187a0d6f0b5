"""Acting: the same RSSM step as in learning, one row at a time, for a batch of environments."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hdfast.agent.distributions import clip_action
from hdfast.agent.learner import Learner
from hdfast.agent.networks import Latent
from hdfast.envs.base import DiscreteActions


class Policy:
    """Chooses actions for N environments and remembers what each has seen.

    Args:
        learner: whose world model and actor act; always their present parameters.
        num_envs: N.
        seed: of the draws of latents and actions.
    """

    def __init__(self, learner: Learner, num_envs: int, seed: int):
        self.learner, self.num_envs = learner, num_envs
        # A few rows on the CPU take longer to cast the weights for than to multiply by them.
        self.dtype = torch.float32 if learner.device.type == "cpu" else learner.dtype
        self.generator = torch.Generator(learner.device)
        self.generator.manual_seed(seed)
        self.reset()

    def reset(self) -> None:
        """Forgets everything seen: the next rows are taken as the first of an episode."""
        self.fresh = True
        rssm, device = self.learner.config.rssm, self.learner.device
        self.latent = Latent(
            torch.zeros(self.num_envs, rssm.deter, device=device),
            torch.zeros(self.num_envs, rssm.stoch, dtype=torch.int64, device=device),
        )
        spec = self.learner.actions.spec
        self.action = torch.from_numpy(np.zeros((self.num_envs, *spec.shape), spec.dtype)).to(device)

    @torch.no_grad()
    def __call__(self, obs: Mapping[str, np.ndarray], is_first: np.ndarray) -> np.ndarray:
        """Sampled actions (N,) int32 or (N, A) float32 in [-1, 1], for observations (N, ...) and is_first (N,) bool."""
        device = self.learner.device
        tensors = {k: torch.from_numpy(np.ascontiguousarray(v)).to(device) for k, v in obs.items()}
        first = torch.from_numpy(is_first | self.fresh).to(device)
        self.fresh = False
        self.latent, self.action = self._step(tensors, first)
        return self.action.cpu().numpy()

    def _step(self, obs: Mapping[str, Tensor], is_first: Tensor) -> tuple[Latent, Tensor]:
        learner, dtype = self.learner, self.dtype
        model = learner.model
        draw = torch.rand(
            self.num_envs, learner.config.rssm.stoch, generator=self.generator, device=learner.device
        )
        embed = model.encode(obs, dtype)
        weights = model.rssm.cast(dtype)
        latent = model.rssm.observe_step(self.latent, self.action, embed, is_first, draw, weights).detach()
        if isinstance(learner.actions, DiscreteActions):
            noise = torch.rand(self.num_envs, generator=self.generator, device=learner.device)
        else:
            shape = (self.num_envs, learner.actions.size)
            noise = torch.randn(shape, generator=self.generator, device=learner.device)
        action = learner.behavior.actor(latent, noise, dtype).action
        if isinstance(learner.actions, DiscreteActions):
            return latent, action.to(torch.int32)
        return latent, clip_action(action)
