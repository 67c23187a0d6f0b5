"""Updates whose halves overlap equal consecutive ones; neither half writes memory that the other reads or writes.

tests/test_cuda.py runs them on two streams, where there is a GPU.
"""

import contextlib
import json
from collections import defaultdict

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hdfast.agent import optimizer, updates
from hdfast.agent.learner import Learner
from hdfast.agent.updates import Updates, captured_updates
from hdfast.runtime import checkpoint
from tests.agent_cases import differing, make_batch, make_learner, one_thread, snapshot  # noqa: F401
from tests.calls import Calls
from tests.loop_cases import differing as differing_runs
from tests.loop_cases import path_of, saved, script, tiny, train
from tests.recorder import record_instead_of_capturing

UPDATES = 10


@pytest.mark.parametrize("continuous", [False, True])
def test_updates_that_overlap_are_bit_identical_to_one_after_the_other(continuous, monkeypatch):
    """Also around a pause, in which the learner is as after that many updates."""
    made = record_instead_of_capturing(monkeypatch)
    overlapped, eager = make_learner(continuous), make_learner(continuous)
    data = [make_batch(eager, seed) for seed in range(UPDATES + 4)]
    static = {key: value.clone() for key, value in data[0].items()}
    update = captured_updates(overlapped, lambda b, t: dict(static), [], overlap=True)
    for count, batch in enumerate(data, start=1):
        for key, value in batch.items():
            static[key].copy_(value)
        update()
        eager.step(lambda b, t, batch=batch: dict(batch))
        if count > 1:
            assert torch.equal(overlapped.last_starts, data[count - 2]["starts"])
        half = differing(snapshot(overlapped), snapshot(eager))
        assert "behavior.actor.mlp.norm.weight" in half, "it still has to learn from the last batch"
        assert not any(name.startswith("model.") for name in half)
        if count in (UPDATES, len(data)):
            update.finish()
            update.finish()  # a second call does nothing
            assert differing(snapshot(overlapped), snapshot(eager)) == set()
    assert made[0].recording is not None
    assert overlapped.metrics() == eager.metrics()


def test_a_state_without_a_half_drops_the_one_under_way(monkeypatch):
    record_instead_of_capturing(monkeypatch)
    learner = make_learner()
    update = captured_updates(learner, lambda b, t: make_batch(learner), [], overlap=True)
    update()
    assert update.state_dict()
    update.load_state_dict({})
    assert update.state_dict() == {}
    before = snapshot(learner)
    update.finish()
    assert differing(before, snapshot(learner)) == set()


@pytest.mark.parametrize("overlap", [False, True])
def test_an_update_that_was_half_done_is_completed_elsewhere(overlap, monkeypatch):
    """With what a checkpoint holds, at once, or beside the next update if those overlap, too."""
    record_instead_of_capturing(monkeypatch)
    first, second, eager = (make_learner() for _ in range(3))
    batches = iter([make_batch(eager, seed) for seed in (0, 1, 2, 0, 1, 2)])

    def take(batch, length):
        return next(batches)

    update = captured_updates(first, take, [], overlap=True)
    for _ in range(2):
        update()
    whole = Updates(second, lambda: second.step(take))
    if overlap:
        whole = captured_updates(second, take, [], overlap=True)
    half = dict(reversed(update.state_dict().items()))  # a file has them in another order
    second.load_state_dict(first.state_dict())
    whole.load_state_dict(half)
    assert bool(whole.state_dict()) == overlap
    whole()
    whole.finish()
    assert whole.state_dict() == {}
    for _ in range(3):
        eager.step(take)
    assert differing(snapshot(second), snapshot(eager)) == set()


def test_a_run_whose_updates_overlap_is_counted_and_drawn_as_without(monkeypatch, tmp_path):
    """Its actions lag by one update."""
    made = record_instead_of_capturing(monkeypatch)
    script(monkeypatch)
    halves = []
    for name in ("learn_model", "learn_behavior"):
        inner = getattr(Learner, name)
        monkeypatch.setattr(
            Learner, name, lambda *a, inner=inner, name=name: (halves.append(name), inner(*a))[1]
        )
    for name in ("on", "overlap"):
        train(tiny(tmp_path / name, train={"graph": name}, eval={"every": 20, "episodes": 8}, agent_steps=40))
        assert halves.count("learn_model") == halves.count("learn_behavior") > 0
    assert all(step.recording is not None for step in made)
    plain, overlap = (saved(tiny(tmp_path / name)) for name in ("on", "overlap"))
    for name in ("learner.updates", "learner.generator", "replay.generator", "policy.generator"):
        assert torch.equal(plain.tensors[name], overlap.tensors[name]), name
    how = json.loads((path_of(tiny(tmp_path / "overlap")) / "backends.json").read_text())
    assert (how["graph"], how["overlap"]) == (True, True)


def test_a_checkpoint_changes_nothing_in_a_run_whose_updates_overlap(monkeypatch, tmp_path):
    record_instead_of_capturing(monkeypatch)
    script(monkeypatch)
    kept = []
    save = checkpoint.save
    monkeypatch.setattr(
        checkpoint,
        "save",
        lambda path, tensors, *a, **k: (kept.append(set(tensors)), save(path, tensors, *a, **k))[1],
    )
    runs = [
        tiny(
            tmp_path / str(seconds),
            train={"graph": "overlap"},
            eval={"every": 20},
            checkpoint={"seconds": seconds},
        )
        for seconds in (0, 1e9)
    ]
    for run in runs:
        train(run)
    assert any("half.deter" in names for names in kept), "some were written in the middle of an update"
    assert "half.deter" not in kept[-1], "the last was not"
    assert differing_runs(*map(saved, runs)) <= {"replay.log_crc"}  # of files that end elsewhere


class Branches(TorchDispatchMode):
    """Which memory two branches read and write, from `beside` until one waits for the other."""

    def __init__(self):
        super().__init__()
        self.branch = ""  # none
        self.reads, self.writes = defaultdict(set), defaultdict(set)
        self._alive = []  # keeps tensors alive, so that no memory is reused

    @contextlib.contextmanager
    def beside(self, device):
        """Stands in for `graphs.beside`."""
        self.branch = "beside"
        yield lambda: setattr(self, "branch", "")
        self.branch = "ahead"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.branch:
            self._alive.append((args, kwargs, out))
            named = zip(func._schema.arguments, args, strict=False)
            named = [*named, *((a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs)]
            for argument, value in named:
                written = argument.alias_info is not None and argument.alias_info.is_write
                self._note(self.writes if written else self.reads, value)
            self._note(self.reads, out)  # nobody else knows new memory
        return out

    def _note(self, table, value):
        tensors = [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]
        table[self.branch] |= {t.untyped_storage()._cdata for t in tensors if t.numel()}

    def shared(self):
        """Memory that one branch writes and the other reads or writes."""
        touched = {branch: self.reads[branch] | self.writes[branch] for branch in ("beside", "ahead")}
        return (self.writes["beside"] & touched["ahead"]) | (self.writes["ahead"] & touched["beside"])


def shared_memory(monkeypatch, *, continuous=False):
    """Memory shared by halves of two updates, with parameters in one tensor and rounded weights, as on CUDA."""
    record_instead_of_capturing(monkeypatch)
    monkeypatch.setattr(optimizer, "FLAT", ("cpu",))
    learner = make_learner(continuous, dtype=torch.bfloat16)
    batch = make_batch(learner)
    update = captured_updates(learner, lambda b, t: dict(batch), [], overlap=True)
    for _ in range(3):  # after which everything that is made once exists
        update()
    branches = Branches()
    monkeypatch.setattr(updates, "beside", branches.beside)
    with branches:
        update()
    assert branches.branch == "", "they were joined"
    assert all(branches.writes[branch] and branches.reads[branch] for branch in ("beside", "ahead"))
    return branches.shared()


@pytest.mark.parametrize("continuous", [False, True])
def test_halves_that_overlap_write_nothing_that_the_other_reads(continuous, monkeypatch):
    assert not shared_memory(monkeypatch, continuous=continuous)


@pytest.mark.parametrize("place", ["parameters", "gradients", "counts"])
def test_a_write_into_the_memory_of_the_other_half_shows(place, monkeypatch):
    behave, learn = Learner.learn_behavior, Learner.learn_model

    def behave_wrongly(self, half):
        behave(self, half)
        if place == "parameters":
            self.model.rssm.gru.data.mul_(1)
        elif place == "gradients":
            self.optimizers["model"].gradient.whole.mul_(1)

    def learn_wrongly(self, sample, wait=lambda: None):
        if place == "counts":
            self.skipped.add_(0)
        return learn(self, sample, wait)

    monkeypatch.setattr(Learner, "learn_behavior", behave_wrongly)
    monkeypatch.setattr(Learner, "learn_model", learn_wrongly)
    assert shared_memory(monkeypatch)


def test_a_change_of_the_world_model_waits_for_the_behavior(monkeypatch):
    learn = Learner.learn_model
    monkeypatch.setattr(Learner, "learn_model", lambda self, sample, wait=None: learn(self, sample))
    with pytest.raises(AssertionError, match="they were joined"):
        shared_memory(monkeypatch)


def test_a_half_is_kept_in_a_call_for_each_dtype():
    """On CUDA `_foreach_copy_` copies tensors one by one unless all have the same dtype."""
    learner = make_learner()
    halves = [learner.learn_model(lambda b, t, seed=seed: make_batch(learner, seed)) for seed in range(2)]
    kept = halves[0].clone()
    with Calls() as calls:
        kept.copy_(halves[1])
    assert calls.of("copy_") == []
    assert [{tensor.dtype for tensor in places} for places, *_ in calls.of("_foreach_copy_")] == [
        {torch.float32},
        {torch.int64},
        {torch.bool},
    ]
    states = (half.state_dict().values() for half in (kept, *halves))
    for place, first, given in zip(*states, strict=True):
        assert torch.equal(place, given)
        assert place.data_ptr() not in (first.data_ptr(), given.data_ptr())
