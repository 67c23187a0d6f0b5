"""How the updates of a learner run: call by call, as a CUDA graph, or as graphs in which two halves overlap."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from hdfast.agent.learner import Learner, Sampler
from hdfast.agent.model_step import ModelStep
from hdfast.runtime.graphs import CapturedStep, beside


class Updates:
    """Updates of a learner, one per call, in the order of the current stream.

    Args:
        learner: whose updates.
        step: an update.
    """

    def __init__(self, learner: Learner, step: Callable[[], None]):
        self.learner, self._step = learner, step

    def __call__(self) -> None:
        self._step()

    def finish(self) -> None:
        """Completes an update that is half done, if any, so that the learner has done only whole updates."""

    def state_dict(self) -> dict[str, Tensor]:
        """What an update that is half done needs to be completed, by name; empty if none is."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a `state_dict`, with the learner as it was then. Raises: KeyError if an entry is missing."""
        if state:
            self.learner.learn_behavior(ModelStep.from_state_dict(state, self.learner.device))
            self.learner.forget_metrics()  # an older version of the code may have measured others


class OverlappedUpdates(Updates):
    """Updates as CUDA graphs, in each of which the behavior learns from one batch beside the world model from the next.

    The scan over time leaves most of a GPU idle, and imagination does not depend on the next batch. The results are
    those of updates one after the other, with the same draws: the behavior imagines with the world model that has
    learnt from the same batch, and the world model's next step waits for that. So each call leaves an update half
    done, which the next call or `finish` completes.

    Args:
        learner: whose updates.
        sample: see `Learner.step`.
        generators: those that `sample` draws from.

    Raises:
        ConfigError: the learner is not on a CUDA device.
    """

    def __init__(self, learner: Learner, sample: Sampler, generators: Iterable[torch.Generator]):
        generators = [learner.generator, *generators]
        super().__init__(learner, CapturedStep(self._both, device=learner.device, generators=generators))
        self._sample = sample
        self._half: ModelStep | None = None  # static memory: the graph reads and writes it
        self._under_way = False

    def __call__(self) -> None:
        if self._under_way:
            self._step()
            return
        self._begin(self.learner.learn_model(self._sample))

    def finish(self) -> None:
        if self._half is not None and self._under_way:
            self.learner.learn_behavior(self._half)
            self._under_way = False

    def state_dict(self) -> dict[str, Tensor]:
        return self._half.state_dict() if self._half is not None and self._under_way else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._under_way = False
        if state:
            self._begin(ModelStep.from_state_dict(state, self.learner.device))

    def _begin(self, half: ModelStep) -> None:
        if self._half is None:
            self._half = half.clone()
        else:
            self._half.copy_(half)
        self._under_way = True

    def _both(self) -> None:
        assert self._half is not None
        # The behavior comes first, because its draws precede those of the next world model step.
        with beside(self.learner.device) as wait:
            self.learner.learn_behavior(self._half)
        self._half.copy_(self.learner.learn_model(self._sample, wait))


def captured_updates(
    learner: Learner, sample: Sampler, generators: Iterable[torch.Generator], *, overlap: bool = False
) -> Updates:
    """The learner's updates on batches of `sample`, sampling included, as one CUDA graph; see `OverlappedUpdates`.

    Args:
        learner: whose updates.
        sample: see `Learner.step`.
        generators: those that `sample` draws from.
        overlap: whether halves of two updates run beside each other.

    Raises:
        ConfigError: the learner is not on a CUDA device.
    """
    if overlap:
        return OverlappedUpdates(learner, sample, generators)
    generators = [learner.generator, *generators]
    return Updates(
        learner, CapturedStep(lambda: learner.step(sample), device=learner.device, generators=generators)
    )
