"""Adam with a clip of the global gradient norm, all on the device: no scalar of it ever visits the host."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hdfast_kernels import adam_step


class Adam:
    """Adam as optax composes it (thuml/HarmonyDream, jaxutils.Optimizer): clip by global norm, then Adam, debiased.

    A gradient that is not finite changes nothing, neither parameters nor moments nor the step count.

    Args:
        parameters: float32 parameters, all on one device.
        lr, eps, betas: of Adam, with eps outside the square root.
        clip: largest global norm of the gradient.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        eps: float,
        clip: float,
        betas: tuple[float, float] = (0.9, 0.999),
    ):
        self.parameters = list(parameters)
        self.lr, self.eps, self.clip, self.betas = lr, eps, clip, betas
        self.mean = [torch.zeros_like(p) for p in self.parameters]
        self.square = [torch.zeros_like(p) for p in self.parameters]
        self.steps = torch.zeros((), dtype=torch.float32, device=self.parameters[0].device)

    @torch.no_grad()
    def step(self, gradients: list[Tensor], apply: Tensor) -> tuple[Tensor, Tensor]:
        """One step with gradients in the order of the parameters.

        Args:
            gradients: same shapes as the parameters.
            apply: scalar bool on the device; false skips the step.

        Returns:
            norm: scalar, the global norm before clipping. applied: scalar bool, `apply` and the norm is finite.
        """
        return adam_step(
            self.parameters,
            gradients,
            self.mean,
            self.square,
            self.steps,
            self.lr,
            self.betas,
            self.eps,
            max_norm=self.clip,
            apply=apply,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Moments and step count, by name."""
        state = {"steps": self.steps}
        for i, (mean, square) in enumerate(zip(self.mean, self.square, strict=True)):
            state[f"mean.{i}"], state[f"square.{i}"] = mean, square
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copies a state back in place.

        Raises:
            KeyError: an entry is missing. RuntimeError: a shape differs.
        """
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
