"""A stand-in for CUDA-graph capture on the CPU: a step is recorded as aten calls on fixed storages, and replayed.

What a CUDA graph would freeze, this freezes too: Python numbers, and tensors that were made outside of the
step. What it cannot hold is refused: a look at a value from Python, or a tensor made from a Python constant.
"""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_SYNCHRONISING = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero"}
_FROM_HOST = {"lift_fresh", "lift_fresh_copy"}


class CaptureError(RuntimeError):
    """The step does something that a captured graph cannot hold."""


class Recording(TorchDispatchMode):
    """Runs `step` once while recording it; `replay` runs the same calls on the same storages again."""

    def __init__(self, step: Callable[[], None]):
        super().__init__()
        self._calls: list[tuple] = []
        self._alive: list = []  # recorded tensors stay, so that storages keep their identity
        with self:
            step()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in _SYNCHRONISING:
            raise CaptureError(f"aten::{name} looks at a value from the host")
        if name in _FROM_HOST:
            raise CaptureError(f"aten::{name} copies a Python constant to the device")
        # Aliases keep today's shape, whatever in-place views (unsqueeze_) make of the tensors later.
        alias = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
        out = func(*args, **kwargs)
        inputs = {_storage(t) for t in tree_leaves(alias) if isinstance(t, torch.Tensor)}
        outputs = [t.detach() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if func._schema.is_mutable:
            if torch.Tag.inplace_view not in func.tags:
                self._calls.append((func, *alias, None))
        elif any(_storage(t) not in inputs for t in outputs):
            self._calls.append((func, *alias, outputs))
        self._alive.append(outputs)
        return out

    def replay(self) -> None:
        """The recorded calls once more; random generators advance as they did."""
        with torch.no_grad():
            for func, args, kwargs, outputs in self._calls:
                out = func(*args, **kwargs)
                if outputs is not None:
                    new = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
                    for old, now in zip(outputs, new, strict=True):
                        if old.numel():
                            old.copy_(now)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
