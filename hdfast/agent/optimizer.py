"""Adam with a clip of the global gradient norm, all on the device: no scalar ever visits the host.

On CUDA all parameters of an optimizer, their gradients and their moments are one tensor each, so that a step is a few
launches at the speed of memory, whatever the number of parameters.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from hdfast_kernels import adam_step

FLAT = ("cuda",)  # devices on which parameters are one tensor by default
# Each tensor in it begins at a multiple of so many numbers: 512 bytes of float32, as PyTorch aligns a separate tensor,
# so that matrix products find the same alignment.
ALIGNMENT = 128


class Flat:
    """Zeros for tensors of the shapes of `like`, all in one tensor.

    whole: (N,) float32 on the device of the first. parts: the place of each in `whole`, contiguous and aligned. The
    gaps between them are zero, and Adam leaves them so.
    """

    def __init__(self, like: Sequence[Tensor]):
        self._places, end = [], 0
        for tensor in like:
            self._places.append((end, tensor.shape))
            end += -(-tensor.numel() // ALIGNMENT) * ALIGNMENT
        self.whole = torch.zeros(end, dtype=torch.float32, device=like[0].device)
        self.parts = self.parts_of(self.whole)

    def parts_of(self, whole: Tensor) -> list[Tensor]:
        """The parts of another tensor (N,) that is laid out in the same way."""
        return [whole[at : at + shape.numel()].view(shape) for at, shape in self._places]

    @torch.no_grad()
    def copy_(self, tensors: Sequence[Tensor]) -> None:
        """Copies tensors of these shapes into their places, except those that are already there.

        Raises ValueError if their number or a shape differs.
        """
        shapes = [tensor.shape for tensor in tensors]
        if shapes != [part.shape for part in self.parts]:
            expected = [tuple(part.shape) for part in self.parts]
            raise ValueError(f"tensors have the shapes {[tuple(one) for one in shapes]}, expected {expected}")
        copy_all(self.parts, tensors)


def copy_all(places: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Copies each tensor to its contiguous place of the same shape; per dtype, as many as possible at once."""
    together: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for place, tensor in zip(places, tensors, strict=True):
        if tensor.data_ptr() == place.data_ptr():
            continue
        # If a list mixes memory orders or dtypes, PyTorch copies its tensors one by one. With one axis, all contiguous
        # tensors have the same strides.
        if tensor.is_contiguous() and tensor.dtype == place.dtype:
            lines, given = together.setdefault(tensor.dtype, ([], []))
            lines.append(place.view(-1))
            given.append(tensor.view(-1))
        else:
            place.copy_(tensor)
    for lines, given in together.values():
        torch._foreach_copy_(lines, given)


class Parameters:
    """Parameters that are changed together, if `flat` as one tensor.

    Args:
        parameters: float32, all on one device. They stay the same objects; only their memory moves.
        flat: make them views of one tensor; None: on the devices in FLAT.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], flat: bool | None = None):
        self.each = list(parameters)
        self.flat = self.each[0].device.type in FLAT if flat is None else flat
        self._memory = Flat(self.each) if self.flat else None
        self.tensors()

    @torch.no_grad()
    def tensors(self) -> Sequence[Tensor]:
        """The tensors to change in place: one if flat, else the parameters."""
        if self._memory is None:
            return self.each
        for parameter, part in zip(self.each, self._memory.parts, strict=True):
            # Its memory is elsewhere at first, after a deepcopy, and after somebody set `.data`.
            if parameter.data_ptr() != part.data_ptr():
                if part.is_cuda and torch.cuda.is_current_stream_capturing():
                    raise RuntimeError(
                        "parameters no longer share one tensor: make a step before the capture"
                    )
                part.copy_(parameter)
                parameter.data = part
        return [self._memory.whole]

    def changed(self) -> None:
        """Tells autograd of an in-place change, so that it refuses a backward pass through what was computed before.

        Autograd notices a change of each parameter by itself, but not one of the flat tensor.
        """
        if self.flat:
            torch.autograd.graph.increment_version(self.each)


class Adam:
    """Adam as optax composes it (thuml/HarmonyDream, jaxutils.Optimizer): clip by global norm, then Adam, debiased.

    A gradient that is not finite changes nothing, neither parameters nor moments nor the step count. A subclass with
    another `step` does the same where `apply` is false, counts in `steps`, changes `held.tensors()` in place, calls
    `held.changed()`, and adds what it keeps to `state_dict`.

    Args:
        parameters: float32 parameters, all on one device.
        lr, eps, betas: Adam's, with eps outside the square root.
        clip: largest global norm of the gradient.
        flat: make the parameters views of one tensor, and `gradient` the place of their gradients; None: on CUDA.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        eps: float,
        clip: float,
        betas: tuple[float, float] = (0.9, 0.999),
        flat: bool | None = None,
    ):
        self.held = Parameters(parameters, flat)
        self.parameters = self.held.each
        self.lr, self.eps, self.clip, self.betas = lr, eps, clip, betas
        if self.held.flat:
            self.gradient, mean, square = (Flat(self.parameters) for _ in range(3))
            self._moments = [mean.whole], [square.whole]
            self.mean, self.square = mean.parts, square.parts
        else:
            self.mean, self.square = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))
            self._moments = self.mean, self.square
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
        if self.held.flat:
            self.gradient.copy_(gradients)
            gradients = [self.gradient.whole]
        norm, applied = adam_step(
            self.held.tensors(),
            gradients,
            *self._moments,
            self.steps,
            self.lr,
            self.betas,
            self.eps,
            max_norm=self.clip,
            apply=apply,
        )
        self.held.changed()
        return norm, applied

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
            KeyError: an entry is missing. ValueError: a shape differs; nothing has been copied then.
        """
        own = self.state_dict()
        for name, tensor in own.items():
            if state[name].shape != tensor.shape:
                raise ValueError(
                    f"{name} has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
                )
        for name, tensor in own.items():
            tensor.copy_(state[name])
