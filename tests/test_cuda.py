"""What is captured on a GPU does the same as when it runs eagerly, and the loop waits for nothing but its actions.

Every test has one body for two devices: on CUDA it compares real graphs with eager calls, on the CPU the recordings
of tests/recorder.py, so that a test is known to work before there is a GPU. tests/test_graphs.py plants the mistakes
that must show; tests/kernels and tests/test_replay_ring.py test ops and sampling on both devices.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hdfast.agent.learner import Learner
from hdfast.agent.policy import Policy
from hdfast.agent.updates import Updates, captured_updates
from hdfast.envs.base import ArraySpec
from hdfast.replay import Replay
from hdfast.runtime.graphs import WARMUP
from hdfast_kernels import dispatch
from tests.agent_cases import make_learner, one_thread, snapshot  # noqa: F401
from tests.recorder import SYNCHRONISING, record_instead_of_capturing
from tests.without_native import definitions_on_the_host  # noqa: F401

try:
    from hdfast import loop, session
    from hdfast.tuning.choice import Choice
    from tests.loop_cases import path_of, saved, script, tiny, train

    MISSING = ""
except ImportError as error:  # with torch and little else installed, the other tests are still worth running
    MISSING = str(error)
needs_a_run = pytest.mark.skipif(bool(MISSING), reason=f"a run needs more packages: {MISSING}")

UPDATES = 10  # that are compared, after those before the capture
# CUDA adds up some gradients in no fixed order, so that two eager runs already differ in their last bits. This is what
# graphs may add to the distance of two eager runs: one stale key of the batch makes it 0.9 or more.
TOLERANCE = 0.01
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BACKENDS = {"reference": ("reference",), "triton": ("triton", "fused")}  # the first of these that an op has


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if request.param == "cpu":
        record_instead_of_capturing(monkeypatch)
    else:
        monkeypatch.delenv("HDFAST_BACKEND", raising=False)
    return torch.device(request.param)


@pytest.fixture(params=BACKENDS)
def backend(
    request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The backend of every op that has it, also in runs, which otherwise choose for themselves."""
    if request.param != "reference" and device.type == "cpu":
        pytest.skip("Triton runs on CUDA")
    chosen = dispatch.first_of(BACKENDS[request.param])
    before = dispatch.use("cuda", chosen)
    if device.type == "cuda" and not MISSING:
        monkeypatch.setattr(session, "settle", lambda *args, **kwargs: Choice(chosen))
    yield request.param
    dispatch.use("cuda", before)


FLAGS = ("is_first", "is_last", "is_terminal")


def specs(learner: Learner) -> dict[str, ArraySpec]:
    """What a row of replay holds."""
    scalars = {"reward": ArraySpec((), np.float32)} | {key: ArraySpec((), np.bool_) for key in FLAGS}
    return {**learner.obs_specs, "action": learner.actions.spec, **scalars}


def random_row(learner: Learner, num_envs: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A row of environments whose episodes have five rows on average."""
    row = {"action": learner.actions.sample(rng, num_envs)}
    for key, spec in specs(learner).items():
        if key not in row:
            row[key] = (100 * rng.random((num_envs, *spec.shape))).astype(spec.dtype)
    return row | {key: rng.random(num_envs) < 0.2 for key in FLAGS}


GRAPHS = ("eager", "graph", "overlap")


def updates_of(learner: Learner, replay: Replay, way: str) -> Updates:
    """Updates with one of GRAPHS, or eager ones without."""
    if way == "eager":
        return Updates(learner, lambda: learner.step(replay.sample))
    return captured_updates(learner, replay.sample, replay.generators, overlap=way == "overlap")


def learn(device: torch.device, way: str, place: str, **options: Any) -> dict[str, Tensor]:
    """A learner's state and metrics, on the host, after updates with rows added between them."""
    learner = make_learner(device=device, replay={"batch": 4, "length": 8}, **options)
    rng = np.random.default_rng(0)
    replay = Replay(specs(learner), num_envs=2, capacity=60, device=device, seed=1, place=place)
    for _ in range(8):
        replay.add(random_row(learner, 2, rng))
    update = updates_of(learner, replay, way)
    for k in range(WARMUP + UPDATES):
        replay.add(random_row(learner, 2, rng))
        replay.stage(4, 8)
        update()
        learner.updates += 1
        if k == WARMUP + 4:  # long after the capture
            update.finish()
    update.finish()
    metrics = {f"metric {k}": torch.tensor(v) for k, v in learner.metrics().items()}
    after = {k: v.cpu() for k, v in snapshot(learner).items()}
    after["replay.generator"] = replay.generator.get_state()
    replay.close()
    return after | metrics


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest relative distance between the mean gradients of a parameter.

    The parameters themselves tell less: Adam's steps are about as long whatever the gradient.
    """
    means = [k for k in a if k.startswith("optimizer.") and ".mean." in k and a[k].any()]
    return max(float((a[k] - b[k]).double().norm() / a[k].double().norm()) for k in means)


def exact(state: dict[str, Tensor]) -> dict[str, list[int]]:
    """What must be equal in any order of summation: the states of generators and all counts."""
    names = [k for k in state if not state[k].is_floating_point() or k.endswith("steps")]
    return {k: state[k].long().flatten().tolist() for k in names}


LEARNERS: dict[str, dict[str, Any]] = {
    "discrete": {},
    "continuous": {"continuous": True},
    "bf16": {"dtype": torch.bfloat16},
    "continuous-bf16": {"continuous": True, "dtype": torch.bfloat16},
    "reinforce-bf16": {"continuous": True, "dtype": torch.bfloat16, "behavior": {"actor_grad": "reinforce"}},
}


@functools.cache
def eager_twice(device: torch.device, backend: str, place: str, kind: str) -> list[dict[str, Tensor]]:
    """What two eager runs on a backend learn, whatever is compared with them; on the CPU they are the same run."""
    runs = [learn(device, "eager", place, **LEARNERS[kind]) for _ in range(1 if device.type == "cpu" else 2)]
    return [runs[0], runs[-1]]


@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize("way", GRAPHS[1:])
@pytest.mark.parametrize("kind", LEARNERS)
def test_captured_updates_are_eager_updates(device, backend, kind, way, place):
    eager, again = eager_twice(device, backend, place, kind)
    graph = learn(device, way, place, **LEARNERS[kind])
    assert exact(graph) == exact(eager)
    assert distance(eager, graph) <= 4 * distance(eager, again) + TOLERANCE
    if device.type == "cpu":
        assert {k for k in eager if not torch.equal(eager[k], graph[k])} == set()


def act(device: torch.device, graph: bool, **options: Any) -> list[Tensor]:
    """Actions, deter and generator states of a policy that is reset, and whose parameters change, in between."""
    learner = make_learner(device=device, **options)
    policy = Policy(learner, 5, seed=3, graph=graph)
    seen, rng = [], np.random.default_rng(0)
    for k in range(WARMUP + UPDATES):
        if k == WARMUP + 4:
            policy.reset()
        row = random_row(learner, 5, rng)
        seen.append(torch.from_numpy(policy(row, row["is_first"])))
        seen += [policy.latent.deter.cpu().clone(), policy.generator.get_state()]
        with torch.no_grad():
            for parameter in learner.model.parameters():
                parameter *= 0.99
    return seen


@pytest.mark.parametrize(
    "options", [{}, {"continuous": True}, {"dtype": torch.bfloat16}], ids=["discrete", "continuous", "bf16"]
)
def test_captured_acts_are_eager_acts(device, backend, options):
    """In the forward pass the order of sums is fixed: bit-identical."""
    for eager, graph in zip(act(device, False, **options), act(device, True, **options), strict=True):
        assert torch.equal(eager, graph)


def captured(graph: bool) -> dict[str, Any]:
    """A run's `train` settings: with or without graphs, and with the ops that a test chooses."""
    return {"graph": "on" if graph else "off", "tune": False}


@needs_a_run
def test_runs_with_graphs_learn_what_runs_without_learn(device, backend, monkeypatch, tmp_path):
    """The real loop, on scripted environments: the same counts, the same draws."""
    script(monkeypatch)
    configs = [
        tiny(
            tmp_path / name,
            device=str(device),
            train=captured(graph),
            eval={"every": 20},
        )
        for name, graph in (("eager", False), ("graphs", True))
    ]
    for config in configs:
        train(config)
        ops = json.loads((path_of(config) / "backends.json").read_text())["ops"]
        assert device.type == "cpu" or backend in ops.values()
    eager, graphs = (saved(config) for config in configs)
    assert int(graphs.tensors["learner.updates"]) == int(eager.tensors["learner.updates"]) > 10
    assert int(graphs.tensors["learner.skipped"]) == 0
    for name in ("learner.generator", "replay.generator", "policy.generator"):
        assert torch.equal(eager.tensors[name], graphs.tensors[name]), name
    for name, tensor in graphs.tensors.items():
        if tensor.is_floating_point():
            assert tensor.isfinite().all(), name


class NoLooking(TorchDispatchMode):
    """Refuses operations for which the host would wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        assert name not in SYNCHRONISING, f"aten::{name} makes the host wait"
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Inside the block, waiting for the device other than for an event is an error."""
    if device.type == "cpu":
        with NoLooking():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_a_run
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_a_step_of_the_loop_does_not_wait_for_the_device(device, backend, graph, monkeypatch, tmp_path):
    """Acting, storing and learning only enqueue, after the first updates, which make buffers and capture graphs."""
    script(monkeypatch)
    watched: dict[str, int] = {}
    updates = []

    def watch(owner: type, method: str) -> None:
        inner: Callable[..., Any] = getattr(owner, method)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if len(updates) <= WARMUP + 1:
                return inner(self, *args, **kwargs)
            watched[method] = watched.get(method, 0) + 1
            with no_waiting(device):
                return inner(self, *args, **kwargs)

        monkeypatch.setattr(owner, method, call)

    stage, evaluate = Replay.stage, loop.Session._evaluate

    def counted(self: Replay, *shape: int) -> None:
        updates.append(shape)
        stage(self, *shape)

    def unwatched(self: loop.Session) -> None:  # an evaluation has a new policy, which is captured anew
        updates.clear()
        evaluate(self)

    monkeypatch.setattr(Replay, "stage", counted)
    # On the CPU every update is checked, because there it costs nothing.
    monkeypatch.setattr(loop.Session, "_check_finite", lambda self: None)
    monkeypatch.setattr(loop.Session, "_evaluate", unwatched)
    watch(Policy, "__call__")
    watch(Replay, "add")
    watch(loop.Session, "_learn")
    train(
        tiny(
            tmp_path,
            device=str(device),
            train=captured(graph),
            log={"every": 1000},
        )
    )
    assert watched.keys() == {"__call__", "add", "_learn"}
    assert min(watched.values()) > 5


def test_a_wait_would_be_seen(device):
    with pytest.raises((AssertionError, RuntimeError)), no_waiting(device):
        torch.zeros(3, device=device).sum().item()


@pytest.mark.parametrize("way", GRAPHS)
def test_a_batch_that_is_not_finite_changes_nothing(device, backend, way):
    learner, rng = make_learner(device=device, replay={"batch": 4, "length": 8}), np.random.default_rng(0)
    replay = Replay(specs(learner), num_envs=1, capacity=30, device=device)
    for _ in range(30):
        replay.add(random_row(learner, 1, rng))
    update = updates_of(learner, replay, way)
    for _ in range(WARMUP + 3):
        update()
    update.finish()
    assert int(learner.skipped) == 0
    before = snapshot(learner)
    for _ in range(30):
        replay.add(random_row(learner, 1, rng) | {"reward": np.full(1, np.nan, np.float32)})
    update()
    update.finish()
    after = snapshot(learner)
    assert int(after.pop("skipped")) == 1
    assert {k for k in after if not torch.equal(after[k], before[k])} == {"generator"}


@pytest.mark.parametrize("name", dispatch.ops())
@pytest.mark.gpu
def test_every_default_of_cuda_can_run(name):
    default = dispatch.CUDA_DEFAULT.get(name, "reference")
    assert default in dispatch.backends_available(name, torch.empty(0, device="cuda"))


def test_the_learner_follows_its_device(device):
    """Every tensor that an update reads or writes is on the device."""
    learner: Learner = make_learner(device=device)
    elsewhere = ("generator", "updates", "model.harmonizer._extra_state")
    on = {k: v.device.type for k, v in learner.state_dict().items() if k not in elsewhere}
    assert set(on.values()) == {device.type}
