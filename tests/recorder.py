"""A stand-in for CUDA-graph capture on the CPU: a step is recorded as aten calls on fixed storages, and replayed.

It freezes what a CUDA graph would freeze: Python numbers, and tensors made outside of the step. It refuses what
a graph cannot hold: reading a value in Python, a tensor made from a Python constant, a draw from a generator that
is not registered.
"""

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from hdfast.agent import policy, updates
from hdfast.runtime import device, graphs
from hdfast.runtime.graphs import WARMUP

SYNCHRONISING = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero"}
_FROM_HOST = {"lift_fresh", "lift_fresh_copy"}


class CaptureError(RuntimeError):
    """The step does something that a captured graph cannot hold."""


class Recording(TorchDispatchMode):
    """Runs `step` once and records it; `replay` runs the same calls on the same storages again.

    If `generators` are given, drawing from any other is refused.
    """

    def __init__(self, step: Callable[[], None], generators: Iterable[torch.Generator] | None = None):
        super().__init__()
        self._registered = None if generators is None else {generator._cdata for generator in generators}
        self._calls: list[tuple] = []
        self._alive: list = []  # recorded tensors stay, so that storages keep their identity
        with self:
            step()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in SYNCHRONISING:
            raise CaptureError(f"aten::{name} reads a value on the host")
        if name in _FROM_HOST:
            raise CaptureError(f"aten::{name} copies a Python constant to the device")
        draws = self._registered is not None and torch.Tag.nondeterministic_seeded in func.tags
        if draws and getattr(kwargs.get("generator"), "_cdata", None) not in self._registered:
            raise CaptureError(f"aten::{name} draws from a generator that is not registered")
        # Aliases keep the present shape, even if in-place views (unsqueeze_) change that of the tensors later.
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
        """Repeats the recorded calls; random generators advance as they did."""
        with torch.no_grad():
            for func, args, kwargs, outputs in self._calls:
                out = func(*args, **kwargs)
                if outputs is not None:
                    new = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
                    for old, now in zip(outputs, new, strict=True):
                        if old.numel():
                            old.copy_(now)


class RecordedStep:
    """Stands in for `CapturedStep` on the CPU: eager calls, then one that is recorded, then replays of it."""

    def __init__(
        self,
        step: Callable[[], None],
        *,
        device: torch.device,
        generators: Iterable[torch.Generator],
        warmup: int = WARMUP,
    ):
        self.step, self.device, self.generators, self.warmup = step, device, tuple(generators), warmup
        self.recording: Recording | None = None

    def __call__(self) -> None:
        if self.recording is not None:
            self.recording.replay()
        elif self.warmup > 0:
            self.warmup -= 1
            self.step()
        else:
            self.recording = Recording(self.step, self.generators)


def record_instead_of_capturing(monkeypatch: pytest.MonkeyPatch, *others: ModuleType) -> list[RecordedStep]:
    """Records whatever the agent and `others` would capture; returns the list of what was recorded.

    Ops run on their definitions: a native op is a single call, which a recording of aten calls does not see.
    """
    made: list[RecordedStep] = []

    def capture(*args: Any, **options: Any) -> RecordedStep:
        made.append(RecordedStep(*args, **options))
        return made[-1]

    monkeypatch.setenv("HDFAST_BACKEND", "reference")
    for owner in (device, graphs):
        monkeypatch.setattr(owner, "check_graph", lambda wish, device: None)
    for module in (updates, policy, *others):
        monkeypatch.setattr(module, "CapturedStep", capture)
    return made


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
