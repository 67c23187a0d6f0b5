"""What passes from the first half of an update to the second, which may run beside the next first half.

Axes: N = T*B starting states, B batch.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hdfast.agent.networks import Latent
from hdfast.agent.optimizer import copy_all


class ModelStep(NamedTuple):
    """What the world model's half of an update leaves to the behavior's half.

    latent: (N, ...) posterior states. cont: (N,) float32, 1 - is_terminal of their rows. applied: scalar bool, whether
    the world model has learnt. starts: (B,) int64, where the batch's windows begin in storage. metrics: scalars.
    """

    latent: Latent
    cont: Tensor
    applied: Tensor
    starts: Tensor
    metrics: dict[str, Tensor]

    def clone(self) -> "ModelStep":
        """A copy in its own memory."""
        latent = Latent(self.latent.deter.clone(), self.latent.index.clone())
        own = (self.cont.clone(), self.applied.clone(), self.starts.clone())
        return ModelStep(latent, *own, {name: value.clone() for name, value in self.metrics.items()})

    def copy_(self, other: "ModelStep") -> None:
        """Copies the values of another step of the same shapes."""
        copy_all(self._tensors(self.metrics), other._tensors(self.metrics))

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        metrics = {f"metrics.{name}": value for name, value in self.metrics.items()}
        latent = {"deter": self.latent.deter, "index": self.latent.index}
        return {**latent, "cont": self.cont, "applied": self.applied, "starts": self.starts, **metrics}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], device: torch.device) -> "ModelStep":
        """A step from its `state_dict`, in memory of its own. Raises: KeyError if an entry is missing."""
        state = {name: value.to(device, copy=True) for name, value in state.items()}
        prefix = "metrics."
        metrics = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        latent = Latent(state["deter"], state["index"])
        return cls(latent, state["cont"], state["applied"], state["starts"], metrics)

    def _tensors(self, metrics: Iterable[str]) -> list[Tensor]:
        latent = (self.latent.deter, self.latent.index)
        return [*latent, self.cont, self.applied, self.starts, *(self.metrics[name] for name in metrics)]
