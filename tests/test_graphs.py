"""The update can be captured: recorded once on the CPU and replayed, it is bit-identical to running it."""

import pytest
import torch

from hdfast.loop import captured_update
from hdfast.runtime.errors import ConfigError
from tests.agent_cases import differing, make_batch, make_learner, snapshot
from tests.recorder import CaptureError, Recording

UPDATES = 10


@pytest.fixture(autouse=True)
def _definition_everywhere(monkeypatch):
    # Native ops are single calls that a recording of aten calls does not see.
    monkeypatch.setenv("HDFAST_BACKEND", "reference")


def batches(learner, count):
    return [make_batch(learner, seed=i) for i in range(count)]


def static_copy(batch):
    return {k: v.clone() for k, v in batch.items()}


def run_recorded(learner, data, step, static):
    """One eager step, one recorded, the rest replayed, each after its batch was copied into the static buffers."""

    def load(batch):
        for k, v in batch.items():
            static[k].copy_(v)

    load(data[0])
    step()
    load(data[1])
    recording = Recording(step)
    for batch in data[2:]:
        load(batch)
        recording.replay()
    return snapshot(learner)


def run_eagerly(learner, data):
    for batch in data:
        learner.step(lambda b, t, batch=batch: dict(batch))
    return snapshot(learner)


@pytest.mark.parametrize("continuous", [False, True])
def test_replayed_updates_are_bit_identical_to_eager_ones(continuous):
    recorded, eager = make_learner(continuous), make_learner(continuous)
    data = batches(eager, UPDATES + 2)
    static = static_copy(data[0])
    after = run_recorded(recorded, data, lambda: recorded.step(lambda b, t: dict(static)), static)
    assert differing(after, run_eagerly(eager, data)) == set()
    assert recorded.metrics() == eager.metrics()


def test_the_replayed_update_learns():
    learner = make_learner()
    data = batches(learner, 4)
    static = static_copy(data[0])
    before = snapshot(learner)
    after = run_recorded(learner, data, lambda: learner.step(lambda b, t: dict(static)), static)
    assert {"model.rssm.gru", "behavior.actor.mlp.norm.weight", "generator"} <= differing(before, after)


def warm(learner):
    """The learner after a first step, which makes its constants, and a static batch."""
    static = make_batch(learner)
    learner.step(lambda b, t: dict(static))
    return learner, static


def test_a_look_at_a_value_is_refused():
    learner, static = warm(make_learner())

    def step():
        learner.step(lambda b, t: dict(static))
        learner.skipped.item()

    with pytest.raises(CaptureError, match="from the host"):
        Recording(step)


def test_a_python_constant_is_refused():
    learner, static = warm(make_learner())

    def step():
        learner.step(lambda b, t: {**static, "reward": static["reward"] * torch.tensor(0.5)})

    with pytest.raises(CaptureError, match="Python constant"):
        Recording(step)


def test_a_frozen_scalar_shows():
    recorded, eager = make_learner(), make_learner()
    data = batches(eager, 4)
    static = static_copy(data[0])

    def stepper(learner, sample):
        count = 0

        def step():
            nonlocal count
            count += 1
            learner.step(lambda b, t: {**sample(), "reward": sample()["reward"] * count})

        return step

    after = run_recorded(recorded, data, stepper(recorded, lambda: static), static)
    current = {}
    step = stepper(eager, lambda: current["batch"])
    for batch in data:
        current["batch"] = batch
        step()
    assert differing(after, snapshot(eager))


def test_an_input_that_is_not_copied_into_static_buffers_shows():
    recorded, eager = make_learner(), make_learner()
    data = batches(eager, 4)
    stream = iter(data)
    after = run_recorded(
        recorded, data, lambda: recorded.step(lambda b, t: dict(next(stream))), static_copy(data[0])
    )
    assert differing(after, run_eagerly(eager, data))


def test_a_graph_needs_cuda():
    learner = make_learner()
    with pytest.raises(ConfigError, match="CUDA"):
        captured_update(learner, None)
