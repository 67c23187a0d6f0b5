"""Updates of one run's model on every backend and as a CUDA graph: which are right, and which is fastest.

An op is tried alone, with all others on their definition. It is right if the gradients and steps of the update differ
from those of plain PyTorch by no more than rounding does. The yardstick for that is how far plain PyTorch's own update
moves when its parameters are changed by a rounding error: little in float32, which shows small mistakes, and much in
bfloat16, where many latents are then sampled differently, which shows only large ones. An op must pass both. A single
latent on the edge between two classes can make a right op fail, so an op is wrong only if it fails from all of several
starting points.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hdfast.agent.policy import Policy
from hdfast.agent.updates import Updates, captured_updates
from hdfast.replay import Replay
from hdfast.replay.contents import random_row, replay_specs
from hdfast.runtime.graphs import WARMUP
from hdfast.tuning.choice import Choice, Job
from hdfast_kernels import dispatch

# Backends to try beside the definition (the first that an op has), and backends that may replace those.
FUSED = {"cuda": ("triton", "fused"), "cpu": ("native",)}
INSTEAD = {"cuda": ("persistent",)}
NUDGES = 2  # updates whose parameters are moved by a rounding error
SLACK, TOLERANCE = 4.0, 0.02  # may differ by SLACK times the yardstick plus TOLERANCE
ROUNDS, ROUND_SECONDS = 5, 0.05
WORTH = 0.99  # an op is left out only where the update is faster without it by more than noise

Ops = Mapping[str, str]
# How updates run; OVERLAP is a graph too, see `OverlappedUpdates`.
EAGER, GRAPH, OVERLAP = "eager", "graph", "overlap"


@dataclass(frozen=True)
class Verdict:
    """Whether a trial agrees with plain PyTorch, and if not, why."""

    right: bool
    why: str = ""


class Trials:
    """Updates of a job on noise, each from the same parameters, on the same rows, with the same draws."""

    def __init__(self, job: Job):
        self.device, self.dtype, self.config = job.device, job.dtype, job.config
        self.learner = job.learner()
        self._spread()
        self._start = {name: tensor.clone() for name, tensor in self.learner.state_dict().items()}
        rng = np.random.default_rng(0)
        length = self.config.replay.length
        self._rows = [random_row(job.obs_specs, job.actions, 1, rng) for _ in range(2 * length)]
        self._definition: dict[torch.dtype, list[dict[str, Tensor]]] = {}  # from every start
        self._yardstick: dict[torch.dtype, dict[str, float]] = {}

    @torch.no_grad()
    def _spread(self) -> None:
        """Moves every parameter off its initial value: heads that begin at zero make many gradients zero."""
        generator = torch.Generator().manual_seed(0)
        for _, parameter in self._parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(self.device)

    def candidates(self) -> dict[str, str]:
        """The fused backend of every op that has one here; none where HDFAST_BACKEND decides."""
        if os.environ.get("HDFAST_BACKEND"):
            return {}
        return dispatch.first_of(FUSED[self.device.type], torch.empty(0, device=self.device))

    def others(self) -> dict[str, str]:
        """The other fused backend of every op that has two here."""
        return dispatch.first_of(INSTEAD.get(self.device.type, ()), torch.empty(0, device=self.device))

    def measure_definition(self) -> None:
        """Computes the results of plain PyTorch, and how far rounding errors move them."""
        for dtype in dict.fromkeys((torch.float32, self.dtype)):
            found = self._definition[dtype] = [self._changes({}, dtype, nudge) for nudge in range(NUDGES + 1)]
            moved = [_distances(found[0], other) for other in found[1:]]
            self._yardstick[dtype] = {name: max(one[name] for one in moved) for name in moved[0]}

    def judge(self, ops: Ops) -> Verdict:
        """Whether an update with these ops is right, in float32 and in the type of the run."""
        for dtype, definitions in self._definition.items():
            faults = (self._fault(ops, dtype, nudge, found) for nudge, found in enumerate(definitions))
            first = next(faults)
            if first and all(faults):
                return Verdict(False, first)
        return Verdict(True)

    def _fault(self, ops: Ops, dtype: torch.dtype, nudge: int, expected: dict[str, Tensor]) -> str:
        """Where an update from one start is off by more than rounding; empty if nowhere."""
        far, yardstick = _distances(expected, self._changes(ops, dtype, nudge)), self._yardstick[dtype]
        wrong = [name for name, d in far.items() if not d <= SLACK * yardstick[name] + TOLERANCE]
        if not wrong:
            return ""
        worst = max(wrong, key=lambda name: far[name] / (yardstick[name] + TOLERANCE))
        kind = str(dtype).removeprefix("torch.")
        return f"{kind}: {worst} is off by {far[worst]:.2g}, rounding moves it by {yardstick[worst]:.1g}"

    def judge_graph(self, ops: Ops, way: str = GRAPH) -> Verdict:
        """Whether updates and actions as CUDA graphs do what they do eagerly; way of the updates: GRAPH or OVERLAP."""
        faults = (self._graph_fault(ops, way, nudge) for nudge in range(NUDGES + 1))
        first = next(faults)
        if first and all(faults):
            return Verdict(False, f"{'an overlapped' if way == OVERLAP else 'a captured'} update {first}")
        far = _distances(self._acts(ops, False), self._acts(ops, True))
        if not far["deter"] <= TOLERANCE:
            return Verdict(False, f"a captured action: the recurrent state is off by {far['deter']:.2g}")
        return Verdict(True)

    def _graph_fault(self, ops: Ops, way: str, nudge: int) -> str:
        """How captured updates from one start differ from eager ones; empty if they do not."""
        eager, again, graph = (self._updates(ops, how, nudge) for how in (EAGER, EAGER, way))
        if not torch.equal(eager.pop("generator"), graph.pop("generator")):
            return "draws other random numbers"
        again.pop("generator")
        noise, far = _distances(eager, again), _distances(eager, graph)
        bound = {n: SLACK * max(noise[n], self._yardstick[self.dtype].get(n, 0.0)) + TOLERANCE for n in far}
        wrong = [name for name, d in far.items() if not d <= bound[name]]
        if not wrong:
            return ""
        worst = max(wrong, key=far.__getitem__)
        return f"has {worst} off by {far[worst]:.2g}"

    def milliseconds(self, *settings: tuple[Ops, str]) -> list[float]:
        """Time of an update with each of these ops and ways, measured in turns: the median of a few rounds."""
        runs = [self._begin(ops, self.dtype, way).update for ops, way in settings]
        for run, (_, way) in zip(runs, settings, strict=True):
            for _ in range(2 if way == EAGER else WARMUP + 3):
                run()
        calls = [max(1, min(100, int(ROUND_SECONDS / self._seconds(run, 1)))) for run in runs]
        rounds = [[self._seconds(run, n) for run, n in zip(runs, calls, strict=True)] for _ in range(ROUNDS)]
        return [1e3 * statistics.median(times) for times in zip(*rounds, strict=True)]

    def _seconds(self, run: Callable[[], None], calls: int) -> float:
        self._synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            run()
        self._synchronize()
        return (time.perf_counter() - began) / calls

    def _begin(self, ops: Ops, dtype: torch.dtype, way: str, nudge: int = 0) -> "Run":
        """Updates with the learner back at its start."""
        learner, config = self.learner, self.config
        generator = learner.generator = torch.Generator(self.device)
        learner.load_state_dict(self._start)
        learner.dtype = dtype
        if nudge:
            self._nudge(torch.finfo(dtype).eps / 2, seed=nudge)
        specs = replay_specs(learner.obs_specs, learner.actions)
        replay = Replay(specs, num_envs=1, capacity=len(self._rows), device=self.device, place="device")
        for row in self._rows:
            replay.add(row)
        updates = Updates(learner, partial(learner.step, replay.sample))
        if way != EAGER:
            updates = captured_updates(learner, replay.sample, replay.generators, overlap=way == OVERLAP)

        def run(call: Callable[[], None]) -> None:
            # This run's own: a graph draws only from the generator it was captured with.
            learner.generator = generator
            with using(self.device, ops):
                call()

        def update() -> None:
            replay.stage(config.replay.batch, config.replay.length)
            run(updates)

        return Run(update, partial(run, updates.finish))

    @torch.no_grad()
    def _nudge(self, eps: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _, module in self.learner.modules():
            for parameter in module.parameters():
                noise = 2 * torch.rand(parameter.shape, generator=generator) - 1
                parameter.mul_(1 + eps * noise.to(self.device))

    def _changes(self, ops: Ops, dtype: torch.dtype, nudge: int = 0) -> dict[str, Tensor]:
        """Gradient (as Adam's first moment) of every parameter in one update, in float32 its step, too.

        Adam's first step goes as far for a gradient that is pure rounding as for any other.
        """
        run = self._begin(ops, dtype, EAGER, nudge)
        before = {name: parameter.clone() for name, parameter in self._parameters()}
        run.update()
        if dtype != torch.float32:
            return self._moments()
        return {**self._moments(), **{f"step of {n}": p - before[n] for n, p in self._parameters()}}

    def _updates(self, ops: Ops, way: str, nudge: int) -> dict[str, Tensor]:
        """First moments after a few updates, the last of them replayed, and the state of the generator."""
        run = self._begin(ops, self.dtype, way, nudge)
        for _ in range(WARMUP + 3):
            run.update()
        run.finish()
        return {**self._moments(), "generator": self.learner.generator.get_state()}

    def _acts(self, ops: Ops, graph: bool) -> dict[str, Tensor]:
        """The recurrent state after a few actions, the last two of them replayed."""
        self._begin(ops, self.dtype, EAGER)
        policy = Policy(self.learner, 1, seed=0, graph=graph)
        for row in self._rows[: WARMUP + 2]:
            with using(self.device, ops):
                policy({key: row[key] for key in self.learner.obs_specs}, row["is_first"])
        return {"deter": policy.latent.deter.clone()}

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        for part, module in self.learner.modules():
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    yield f"{part}.{name}", parameter.detach()

    def _moments(self) -> dict[str, Tensor]:
        names = {parameter.data_ptr(): name for name, parameter in self._parameters()}
        return {
            f"gradient of {names[parameter.data_ptr()]}": mean.clone()
            for optimizer in self.learner.optimizers.values()
            for parameter, mean in zip(optimizer.parameters, optimizer.mean, strict=True)
        }

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Run(NamedTuple):
    """A call for each update, and one that completes the last."""

    update: Callable[[], None]
    finish: Callable[[], None]


@contextmanager
def using(device: torch.device, ops: Ops) -> Iterator[None]:
    """In the block, every op runs as in `ops`, and those not named there on their definition; see `Choice.use`."""
    before = Choice(ops).use(device)
    try:
        yield
    finally:
        dispatch.use(device.type, before)


def _part(name: str) -> str:
    """The part a gradient or step belongs to, such as "gradient of behavior.actor"; for a part, itself."""
    what, _, owner = name.rpartition(" ")
    names = owner.split(".")
    return f"{what} {'.'.join(names[: 2 if names[0] == 'behavior' else 1])}"


def _distances(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> dict[str, float]:
    """How far each tensor, and each part, is from what is expected, as a share of that; NaN where not finite."""
    names = list(expected)
    squares = torch.stack(
        [
            torch.stack(
                [(got[n].double() - expected[n].double()).square().sum(), expected[n].double().square().sum()]
            )
            for n in names
        ]
    )
    found: dict[str, tuple[float, float]] = dict(zip(names, squares.tolist(), strict=True))
    for name in names:
        part = _part(name)
        if part != name:
            apart, size = found.get(part, (0.0, 0.0))
            found[part] = apart + found[name][0], size + found[name][1]
    return {name: math.sqrt(apart / max(size, 1e-60)) for name, (apart, size) in found.items()}
