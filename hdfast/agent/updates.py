"""How the updates of a learner run: call by call, as a CUDA graph, or as graphs in which two halves overlap."""

from collections.abc import Callable, Iterable

import torch

from hdfast.agent.learner import Learner, ModelStep, Sampler
from hdfast.runtime.graphs import CapturedStep, beside


class Updates:
    """Updates of a learner, one per call, in the order of the current stream.

    Args:
        step: an update.
    """

    def __init__(self, step: Callable[[], None]):
        self._step = step

    def __call__(self) -> None:
        self._step()

    def finish(self) -> None:
        """Completes an update that is half done, if any, so that the learner has done only whole updates."""


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
        self._learner, self._sample = learner, sample
        generators = [learner.generator, *generators]
        super().__init__(CapturedStep(self._both, device=learner.device, generators=generators))
        self._half: ModelStep | None = None  # static memory: the graph reads and writes it
        self._under_way = False

    def __call__(self) -> None:
        if self._under_way:
            self._step()
            return
        half = self._learner.learn_model(self._sample)
        if self._half is None:
            self._half = half.clone()
        else:
            self._half.copy_(half)
        self._under_way = True

    def finish(self) -> None:
        if self._under_way:
            self._learner.learn_behavior(self._half)
            self._under_way = False

    def _both(self) -> None:
        # The behavior comes first, because its draws precede those of the next world model step.
        with beside(self._learner.device) as wait:
            self._learner.learn_behavior(self._half)
        self._half.copy_(self._learner.learn_model(self._sample, wait))


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
    return Updates(CapturedStep(lambda: learner.step(sample), device=learner.device, generators=generators))
