"""A learner with a replay of random rows: its parts, to be run one by one, and the work that each of them takes.

Axes: N environments that `act` serves, B windows of an update. Images are 64 x 64 x 3; there are six discrete actions.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from hdfast.agent.learner import Learner
from hdfast.agent.policy import Policy
from hdfast.agent.rounding import rounded
from hdfast.agent.updates import captured_updates
from hdfast.config import Config, default_config
from hdfast.envs.base import ArraySpec, DiscreteActions
from hdfast.overrides import apply_overrides
from hdfast.replay import Replay
from hdfast.replay.contents import replay_specs
from hdfast.runtime.device import prepare_device

SIDE = 64
ACTIONS = DiscreteActions(6)
IMAGE = {"image": ArraySpec((SIDE, SIDE, 3), np.dtype(np.uint8))}
ROW = replay_specs(IMAGE, ACTIONS)
PARTS = ("update", "observe", "imagine", "act")
Run = Callable[[], Any]


def config_of(size: str, *, batch: int = 16, length: int = 64, horizon: int = 15) -> Config:
    """The configuration of Atari 100k at a size (B windows of T rows, H imagined steps).

    Raises: ConfigError for a size that does not exist.
    """
    overrides = {"replay": {"batch": batch, "length": length}, "behavior": {"horizon": horizon}}
    return apply_overrides(default_config("atari100k", size), overrides)


def random_row(rng: np.random.Generator, t: int, num_envs: int = 1) -> dict[str, np.ndarray]:
    """Row t of `num_envs` environments with episodes of 100 rows: noise, the worst case for caches and disks."""
    last = np.full(num_envs, t % 100 == 99)
    return {
        "image": rng.integers(256, size=(num_envs, SIDE, SIDE, 3), dtype=np.uint8),
        "action": ACTIONS.sample(rng, num_envs),
        "reward": rng.standard_normal(num_envs, np.float32),
        "is_first": np.full(num_envs, t % 100 == 0),
        "is_last": last,
        "is_terminal": last.copy(),
    }


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Runs every op on one backend inside the block; None leaves the choice to the ops."""
    before = os.environ.pop("HDFAST_BACKEND", None)
    if name is not None:
        os.environ["HDFAST_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("HDFAST_BACKEND", None)
        if before is not None:
            os.environ["HDFAST_BACKEND"] = before


@contextlib.contextmanager
def threads_of_a_run(config: Config, device: torch.device) -> Iterator[None]:
    """Inside the block, as many CPU threads as a run of this configuration has."""
    before = torch.get_num_threads()
    prepare_device(device, config.little_work)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Bench:
    """A learner of one configuration, and the parts of it that a run calls, as functions without arguments.

    rows: how many the replay holds, but at least four windows.
    """

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype, rows: int = 1_000):
        self.config, self.device, self.dtype = config, device, dtype
        self.learner = Learner(IMAGE, ACTIONS, config, device=device, dtype=dtype)
        rows = max(rows, 4 * config.replay.length)
        self.replay = Replay(ROW, num_envs=1, capacity=rows, device=device, place="device")
        rng = np.random.default_rng(0)
        for t in range(rows):
            self.replay.add(random_row(rng, t))

    def sample(self) -> dict[str, torch.Tensor]:
        """A batch as an update reads it."""
        return self.replay.sample(self.config.replay.batch, self.config.replay.length)

    def update(self) -> Run:
        """The whole update, sampling included."""
        return lambda: self.learner.update(self.replay.sample)

    def graph(self, *, overlap: bool = False) -> Run:
        """The whole update as one CUDA graph, captured in the fourth call. Raises: ConfigError without CUDA.

        overlap: halves of two updates run side by side; captured in the fifth call.
        """
        return captured_updates(self.learner, self.replay.sample, self.replay.generators, overlap=overlap)

    def overlap(self) -> Run:
        """`graph` with halves of two updates side by side."""
        return self.graph(overlap=True)

    def observe(self) -> Run:
        """The world model's loss on a batch, and its gradients."""
        learner, batch = self.learner, self.sample()
        uniform = learner.uniform(*batch["reward"].shape, learner.config.rssm.stoch)
        parameters = list(learner.model.parameters())

        def run() -> None:
            with rounded(learner.optimizers["model"], learner.dtype):  # as in an update
                loss = learner.model.loss(batch, uniform, learner.dtype).loss
            torch.autograd.grad(loss, parameters, allow_unused=True)

        return run

    def imagine(self) -> Run:
        """H steps of imagination from every state of a batch."""
        learner, batch = self.learner, self.sample()
        uniform = learner.uniform(*batch["reward"].shape, learner.config.rssm.stoch)
        with torch.no_grad():
            start = learner.model.observe(batch, uniform, learner.dtype).latent.flatten(0, 1).detach()
        cont = torch.ones(start.deter.shape[0], device=self.device)
        draws = learner.draws(cont.shape[0])

        def run() -> None:
            with rounded(learner.optimizers["actor"], learner.dtype):  # as in an update
                learner.behavior.imagine(learner.model, start, cont, draws, learner.dtype)

        return run

    def act(self, num_envs: int = 1, *, graph: bool = False) -> Run:
        """An action for each of N environments, from images on the host to actions on the host."""
        policy = Policy(self.learner, num_envs, seed=0, graph=graph)
        obs, first = {"image": np.zeros((num_envs, SIDE, SIDE, 3), np.uint8)}, np.zeros(num_envs, bool)
        return lambda: policy(obs, first)


def gflop(config: Config, part: str, device: torch.device) -> float:
    """GFLOP of matrix products and convolutions in one run of a part (`act`: for one environment).

    A multiplication and an addition count as two. Counted is what the definition of the model needs (the backend
    `reference`, which gathers rows for one-hot latents instead of multiplying), whatever the timed backend does.

    Raises: ValueError for a part that does not exist.
    """
    if part not in PARTS:
        raise ValueError(f"there is no part {part!r}; the parts are {', '.join(PARTS)}")
    # The rows of every product are proportional to the windows: one window is counted, and multiplied by B.
    one = apply_overrides(config, {"replay": {"batch": 1}})
    return _gflop(one, part, device) * (1 if part == "act" else config.replay.batch)


@functools.cache
def _gflop(config: Config, part: str, device: torch.device) -> float:
    with backend("reference"):
        run = getattr(Bench(config, device, torch.float32), part)()
        with FlopCounterMode(display=False) as counter:
            run()
    return counter.get_total_flops() / 1e9
