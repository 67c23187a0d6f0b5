"""The parts of a run and the whole update: `pytest bench/ --benchmark-only -k "update and small"`.

Groups, at the shapes of training: update, observe (world-model loss, forward and backward), imagine, act, sample.
Each is timed with the backends that run by default and with `reference`; on CUDA also with Triton and, for the
update, as one captured graph.
"""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hdfast.agent.learner import Learner
from hdfast.agent.policy import Policy
from hdfast.config import apply_overrides, default_config
from hdfast.envs.base import ArraySpec, DiscreteActions
from hdfast.loop import captured_update
from hdfast.replay import Replay
from hdfast.runtime.device import resolve_device, resolve_precision

ROWS = 2_000
ACTIONS = DiscreteActions(6)
IMAGE = {"image": ArraySpec((64, 64, 3), np.dtype(np.uint8))}
FLAG = ArraySpec((), np.dtype(bool))
SIZES = ("tiny", "small", "medium", "large")
DEVICE = resolve_device("auto")
BACKENDS = ("default", "reference", *(("triton", "graph") if DEVICE.type == "cuda" else ()))


class Bench:
    """A learner of one size with a replay of random rows, B16 x T64 at 64 x 64 pixels, on the machine's best device."""

    def __init__(self, size: str, precision: str):
        config = default_config("atari100k", size)
        self.config = apply_overrides(config, {"replay": {"capacity": ROWS}})
        self.dtype = resolve_precision(precision, DEVICE)
        self.learner = Learner(IMAGE, ACTIONS, self.config, device=DEVICE, dtype=self.dtype)
        specs = {
            **IMAGE,
            "action": ACTIONS.spec,
            "reward": ArraySpec((), np.dtype(np.float32)),
            "is_first": FLAG,
            "is_last": FLAG,
            "is_terminal": FLAG,
        }
        self.replay = Replay(specs, num_envs=1, capacity=ROWS, device=DEVICE)
        rng = np.random.default_rng(0)
        for t in range(ROWS):
            self.replay.add(
                {
                    "image": rng.integers(256, size=(1, 64, 64, 3), dtype=np.uint8),
                    "action": ACTIONS.sample(rng, 1),
                    "reward": rng.standard_normal(1).astype(np.float32),
                    "is_first": np.array([t % 100 == 0]),
                    "is_last": np.array([t % 100 == 99]),
                    "is_terminal": np.array([t % 100 == 99]),
                }
            )

    def sample(self) -> dict[str, torch.Tensor]:
        return self.replay.sample(self.config.replay.batch, self.config.replay.length)

    def flops(self) -> int:
        """Multiplications and additions of matrix products and convolutions in one update of the definition."""
        with FlopCounterMode(display=False) as counter:
            self.learner.step(self.replay.sample)
        return counter.get_total_flops()


@pytest.fixture(scope="module")
def benches():
    made: dict[tuple[str, str], Bench] = {}
    yield lambda size, precision: made.setdefault((size, precision), Bench(size, precision))
    made.clear()


@pytest.fixture
def bench(benches, request, monkeypatch, backend):
    if backend not in ("default", "graph"):
        monkeypatch.setenv("HDFAST_BACKEND", backend)
    elif backend == "graph":
        monkeypatch.setenv("HDFAST_BACKEND", "triton")
    return benches(request.getfixturevalue("size"), request.getfixturevalue("precision"))


def timed(benchmark, function, rounds: int, **info):
    """Times `function`, to the end of what it starts on the device, over `rounds` rounds after one warm-up."""

    def run():
        function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info |= {"device": str(DEVICE), "threads": torch.get_num_threads(), **info}
    benchmark.pedantic(run, rounds=rounds, iterations=1, warmup_rounds=1)


def rounds_of(size: str, backend: str) -> int:
    if DEVICE.type == "cuda":
        return 50
    return {"tiny": 10, "small": 5}.get(size, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES if DEVICE.type == "cuda" else SIZES[:2])
@pytest.mark.benchmark(group="update")
def test_update(benchmark, bench, backend, size, precision, monkeypatch):
    step = captured_update(bench.learner, bench.replay) if backend == "graph" else None
    timed(
        benchmark,
        step or (lambda: bench.learner.step(bench.replay.sample)),
        rounds_of(size, backend) + (4 if step else 0),
        backend=backend,
        parameters=bench.learner.parameter_counts()["total"],
    )
    monkeypatch.setenv("HDFAST_BACKEND", "reference")
    gflop = bench.flops() / 1e9
    benchmark.extra_info |= {"gflop": gflop, "gflop_per_second": gflop / benchmark.stats.stats.median}


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "graph"])
@pytest.mark.parametrize("precision", ["bfloat16"])
@pytest.mark.parametrize("size", ["small"])
@pytest.mark.benchmark(group="observe")
def test_observe(benchmark, bench, backend, size, precision):
    learner, batch = bench.learner, bench.sample()
    uniform = learner.uniform(*batch["reward"].shape, learner.config.rssm.stoch)

    def run():
        loss = learner.model.loss(batch, uniform, learner.dtype).loss
        torch.autograd.grad(loss, list(learner.model.parameters()), allow_unused=True)

    timed(benchmark, run, rounds_of(size, backend), backend=backend)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "graph"])
@pytest.mark.parametrize("precision", ["bfloat16"])
@pytest.mark.parametrize("size", ["small"])
@pytest.mark.benchmark(group="imagine")
def test_imagine(benchmark, bench, backend, size, precision):
    learner, batch = bench.learner, bench.sample()
    uniform = learner.uniform(*batch["reward"].shape, learner.config.rssm.stoch)
    with torch.no_grad():
        start = learner.model.observe(batch, uniform, learner.dtype).latent.flatten(0, 1).detach()
    cont = torch.ones(start.deter.shape[0], device=DEVICE)
    draws = learner.draws(cont.shape[0])

    def run():
        learner.behavior.imagine(learner.model, start, cont, draws, learner.dtype)

    timed(benchmark, run, rounds_of(size, backend), backend=backend)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "graph"])
@pytest.mark.parametrize("precision", ["bfloat16"])
@pytest.mark.parametrize("size", ["tiny", "small"])
@pytest.mark.benchmark(group="act")
def test_act(benchmark, bench, backend, size, precision):
    policy = Policy(bench.learner, 1, seed=0)
    obs, first = {"image": np.zeros((1, 64, 64, 3), np.uint8)}, np.zeros(1, bool)
    timed(benchmark, lambda: policy(obs, first), 50, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("precision", ["bfloat16"])
@pytest.mark.parametrize("size", ["small"])
@pytest.mark.benchmark(group="sample")
def test_sample(benchmark, bench, backend, size, precision):
    nbytes = sum(v.nbytes for v in bench.sample().values())
    timed(benchmark, bench.sample, 50, backend=backend, bytes=nbytes)
