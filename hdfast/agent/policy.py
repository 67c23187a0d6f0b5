"""Acting: the same RSSM step as in learning, one row at a time, for a batch of environments.

Axes: N environments, A action width.
"""

import weakref
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hdfast.agent.distributions import clip_action
from hdfast.agent.learner import Learner
from hdfast.agent.networks import Latent
from hdfast.envs.base import ArraySpec, DiscreteActions
from hdfast.runtime.graphs import CapturedStep

_FIRST = ArraySpec((), np.dtype(bool))


class Policy:
    """Chooses actions for N environments and remembers what each has seen.

    An action is one call of `step`, from static tensors to static tensors, between a copy to the device and one
    back; the host waits for nothing but that last copy.

    Args:
        learner: owns the world model and actor that act, always with their current parameters.
        num_envs: N.
        seed: of the draws of latents and actions.
        graph: capture `step` as a CUDA graph.
        training: act for training, not for evaluation, see `Learner.acting`.
        greedy: take the actor's likeliest action instead of a sample. Latents are still sampled, from the same
            random numbers as otherwise, because those for the action are drawn too, but not used.

    Raises:
        ConfigError: `graph` is set, but the device is no CUDA device.
    """

    def __init__(
        self,
        learner: Learner,
        num_envs: int,
        seed: int,
        *,
        graph: bool = False,
        training: bool = False,
        greedy: bool = False,
    ):
        self.learner, self.num_envs, self.training, self.greedy = learner, num_envs, training, greedy
        device, rssm = learner.device, learner.config.rssm
        # On the CPU, casting the weights takes longer than multiplying a few rows by them.
        self.dtype = torch.float32 if device.type == "cpu" else learner.dtype
        self.generator = torch.Generator(device)
        self.generator.manual_seed(seed)
        self._cuda = device.type == "cuda"
        self._host_obs = {key: self._on_host(spec) for key, spec in learner.obs_specs.items()}
        self._host_first = self._on_host(_FIRST)
        self._host_action = self._on_host(learner.actions.spec)
        self._obs = {
            key: host.to(device) for key, host in self._host_obs.items()
        }  # on the CPU the same memory
        self._first = self._host_first.to(device)
        self.latent = Latent(
            torch.zeros(num_envs, rssm.deter, device=device),
            torch.zeros(num_envs, rssm.stoch, dtype=torch.int64, device=device),
        )
        self.action = torch.zeros_like(self._host_action, device=device)
        self._fetched = torch.cuda.Event() if self._cuda else None
        self._captured: CapturedStep | None = None
        if graph:
            policy = weakref.proxy(self)  # a graph is freed with its policy, at once
            self._captured = CapturedStep(lambda: policy.step(), device=device, generators=[self.generator])
        self.reset()

    def reset(self) -> None:
        """Forgets everything seen: the next rows are taken as the first of an episode."""
        self.fresh = True
        for tensor in (self.latent.deter, self.latent.index, self.action):
            tensor.zero_()

    def __call__(self, obs: Mapping[str, np.ndarray], is_first: np.ndarray) -> np.ndarray:
        """Actions (N,) int32 or (N, A) float32 in [-1, 1], for observations (N, ...) and is_first (N,) bool.

        Observations have exactly the dtypes of the learner's `obs_specs`; unknown ones are ignored.

        Raises:
            ValueError: an observation is missing, or an array has another shape.
            TypeError: one is no numpy array, or has another dtype. Neither error changes anything.
        """
        for key, spec in self.learner.obs_specs.items():
            if key not in obs:
                raise ValueError(f"obs has the keys {list(obs)}, expected {list(self._host_obs)}")
            spec.check(obs[key], self.num_envs, f"obs[{key!r}]")
        _FIRST.check(is_first, self.num_envs, "is_first")
        for key, host in self._host_obs.items():
            self._send(obs[key], host, self._obs[key])
        self._send(is_first | self.fresh, self._host_first, self._first)
        self.fresh = False
        (self._captured or self.step)()
        self._host_action.copy_(self.action, non_blocking=True)
        if self._fetched is not None:  # the pinned buffers are then free for the next row, too
            self._fetched.record(torch.cuda.current_stream(self.learner.device))
            self._fetched.synchronize()
        return self._host_action.numpy().copy()

    @torch.no_grad()
    def step(self) -> None:
        """Latent and action for the rows on the device, from the previous ones: device operations only."""
        learner, model, dtype = self.learner, self.learner.model, self.dtype
        device, discrete = learner.device, isinstance(learner.actions, DiscreteActions)
        draw = torch.rand(self.num_envs, model.rssm.stoch, generator=self.generator, device=device)
        if discrete:
            noise = torch.rand(self.num_envs, generator=self.generator, device=device)
        else:
            noise = torch.randn(self.action.shape, generator=self.generator, device=device)
        embed = model.encode(self._obs, dtype)
        weights = model.rssm.cast(dtype)
        latent = model.rssm.observe_step(self.latent, self.action, embed, self._first, draw, weights).detach()
        actor = learner.acting(self.training)
        action = actor.mode(latent, dtype) if self.greedy else actor(latent, noise, dtype).action
        self.latent.deter.copy_(latent.deter)
        self.latent.index.copy_(latent.index)
        self.action.copy_(action if discrete else clip_action(action))

    def _on_host(self, spec: ArraySpec) -> Tensor:
        """A buffer (N, ...), pinned where a device copies from it without waiting."""
        array = torch.from_numpy(np.zeros((self.num_envs, *spec.shape), spec.dtype))
        return array.pin_memory() if self._cuda else array

    def _send(self, array: np.ndarray, host: Tensor, device: Tensor) -> None:
        host.numpy()[...] = array
        if self._cuda:
            device.copy_(host, non_blocking=True)
