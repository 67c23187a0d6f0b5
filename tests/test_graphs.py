"""Update and act can be captured: recorded once on the CPU and replayed, they are bit-identical to eager calls.

tests/test_cuda.py compares real graphs with the same eager calls.
"""

import pytest
import torch

from hdfast.agent.policy import Policy
from hdfast.agent.updates import captured_updates
from hdfast.replay import Replay
from hdfast.replay.contents import replay_specs
from hdfast.runtime.errors import ConfigError
from hdfast.runtime.graphs import CapturedStep
from tests.agent_cases import differing, make_batch, make_learner, one_thread, snapshot  # noqa: F401
from tests.loop_cases import Scripted, saved, script, tiny, train
from tests.loop_cases import differing as run_differing
from tests.recorder import CaptureError, Recording, record_instead_of_capturing

UPDATES = 10


@pytest.fixture(autouse=True)
def _definition_everywhere(monkeypatch):
    # Native ops are single calls, which a recording of aten calls does not see.
    monkeypatch.setenv("HDFAST_BACKEND", "reference")


def batches(learner, count):
    return [make_batch(learner, seed=i) for i in range(count)]


def static_copy(batch):
    return {k: v.clone() for k, v in batch.items()}


def run_recorded(learner, data, step, static):
    """One eager step, one recorded, the rest replayed, each after its batch is copied to the static buffers."""

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

    with pytest.raises(CaptureError, match="on the host"):
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


def test_learning_and_loading_change_the_learner_in_place():
    """Graphs read parameters from the memory in which they were at the capture."""
    learner = make_learner()
    learner.step(lambda b, t: make_batch(learner))

    def addresses():
        elsewhere = ("generator", "updates", "model.harmonizer._extra_state")  # not read in a graph
        return {k: v.data_ptr() for k, v in learner.state_dict().items() if k not in elsewhere}

    before, state = addresses(), snapshot(make_learner(seed=1))
    learner.step(lambda b, t: make_batch(learner, seed=1))
    assert addresses() == before
    learner.load_state_dict(state)
    assert addresses() == before
    assert differing(snapshot(learner), state) == set()


def rows(learner, count):
    """Observations and is_first of `count` steps of as many environments as a batch has windows."""
    made = []
    for seed in range(count):
        batch = make_batch(learner, seed)
        obs = {k: batch[k][1].numpy() for k in learner.obs_specs}
        made.append((obs, batch["is_first"][1].numpy()))
    return made


def play(policy, steps, *, between=lambda k: None):
    """Actions and latents of every step, and the generator's state at the end."""
    seen = []
    for k, (obs, is_first) in enumerate(steps):
        between(k)
        action = torch.from_numpy(policy(obs, is_first))
        seen += [action, policy.latent.deter.clone(), policy.latent.index.clone()]
    return [*seen, policy.generator.get_state()]


def identical(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("continuous", [False, True])
def test_replayed_acts_are_bit_identical_to_eager_ones(continuous, monkeypatch):
    """While the learner learns, and with a reset long after acting was recorded."""
    made, seen = record_instead_of_capturing(monkeypatch), []
    for graph in (False, True):
        learner = make_learner(continuous)
        policy = Policy(learner, learner.config.replay.batch, seed=3, graph=graph)

        def between(k, learner=learner, policy=policy):
            learner.step(lambda b, t: make_batch(learner, seed=k))
            if k == 8:
                policy.reset()

        seen.append(play(policy, rows(learner, 12), between=between))
    assert made[0].recording is not None
    assert identical(*seen)


class Peeking(Policy):
    """Reads a value in the step."""

    def step(self):
        super().step()
        self.action[0].item()


class Replacing(Policy):
    """Replaces the old observations by new ones instead of copying into them."""

    def _send(self, array, host, device):
        for key, tensor in self._obs.items():
            if tensor is device:
                self._obs[key] = torch.from_numpy(array.copy())
        if device is self._first:
            super()._send(array, host, device)


class Unregistered(Policy):
    """Draws from a generator that the graph does not know of."""

    def step(self):
        super().step()
        torch.rand((), generator=self.learner.generator)


@pytest.mark.parametrize(("kind", "message"), [(Peeking, "on the host"), (Unregistered, "not registered")])
def test_an_act_that_cannot_be_captured_is_refused(kind, message, monkeypatch):
    record_instead_of_capturing(monkeypatch)
    learner = make_learner()
    with pytest.raises(CaptureError, match=message):
        play(kind(learner, learner.config.replay.batch, seed=3, graph=True), rows(learner, 5))


def test_an_act_that_replaces_its_inputs_shows(monkeypatch):
    record_instead_of_capturing(monkeypatch)
    learner, seen = make_learner(), []
    for kind, graph in ((Replacing, False), (Policy, False), (Replacing, True)):
        policy = kind(learner, learner.config.replay.batch, seed=3, graph=graph)
        seen.append(play(policy, rows(learner, 8)))
    assert identical(seen[0], seen[1])  # run eagerly, nothing is wrong with it
    assert not identical(seen[1], seen[2])


def test_an_act_that_branches_in_python_shows(monkeypatch):
    class Branching(Policy):
        """Does not act while `waiting`, a Python value that a recording freezes."""

        waiting = True

        def step(self):
            super().step()
            if self.waiting:
                self.action.zero_()

    record_instead_of_capturing(monkeypatch)
    learner, seen = make_learner(), []
    for graph in (False, True):
        policy = Branching(learner, learner.config.replay.batch, seed=3, graph=graph)
        seen.append(play(policy, rows(learner, 8), between=lambda k, p=policy: setattr(p, "waiting", k < 6)))
    assert not identical(*seen)


def test_a_run_is_the_same_with_graphs(monkeypatch, tmp_path):
    """The whole loop: acting, storing, sampling, learning and evaluating."""
    made = record_instead_of_capturing(monkeypatch)
    script(monkeypatch)
    options = {"eval": {"every": 20, "episodes": 8}, "agent_steps": 40}
    eager = tiny(tmp_path / "eager", **options)
    graphs = tiny(tmp_path / "graphs", train={"graph": "on"}, **options)
    train(eager)
    assert not made
    train(graphs)
    assert len(made) == 4, "act, update and the policies of two evaluations"
    assert all(step.recording is not None for step in made)
    assert run_differing(saved(eager), saved(graphs)) == set()


def test_a_graph_needs_cuda():
    learner = make_learner()
    env = Scripted(1)
    replay = Replay(replay_specs(env.obs_specs, env.actions), num_envs=1, capacity=10)
    with pytest.raises(ConfigError, match="CUDA"):
        captured_updates(learner, replay.sample, replay.generators)
    with pytest.raises(ConfigError, match="CUDA"):
        captured_updates(learner, replay.sample, replay.generators, overlap=True)
    with pytest.raises(ConfigError, match="CUDA"):
        Policy(learner, 1, seed=0, graph=True)


def test_what_ends_a_capture_is_told(monkeypatch):
    """Of a failed capture CUDA says only that it failed, and torch leaves its stream as the current one."""
    streams = ["default"]

    class Stream:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            streams.append("side")

        def __exit__(self, *_):
            streams.pop()

    class Capture(Stream):
        def __exit__(self, *_):
            raise RuntimeError("operation failed due to a previous error during capture")

    class Graph:
        def register_generator_state(self, generator):
            pass

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: Capture())

    def step():
        raise ValueError("what went wrong")

    for does, told in ((step, "what went wrong"), (lambda: None, "previous error during capture")):
        capture = CapturedStep(does, device=torch.device("cuda"), generators=[], warmup=0)
        with pytest.raises((ValueError, RuntimeError), match=told):
            capture()
        assert streams == ["default", "side"]  # torch's own, which the fake never leaves
        streams.pop()
