"""Small agents and batches for the tests of hdfast.agent.

Axes, time-major as in hdfast: T time, B batch, N rows, S groups, A action width.
"""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from hdfast.agent.learner import Learner
from hdfast.config import Config
from hdfast.envs.base import ArraySpec, ContinuousActions, DiscreteActions
from hdfast.overrides import apply_overrides

IMAGE = ArraySpec((8, 8, 3), np.uint8)
VECTOR = ArraySpec((4,), np.float32)
SPECS = {"image": IMAGE, "state": VECTOR}
SMALL = {
    "replay": {"batch": 3, "length": 6},
    "rssm": {"deter": 16, "units": 12, "stoch": 4, "classes": 5},
    "network": {"units": 10, "layers": 2, "depth": 4, "mlp_layers": 2, "mlp_units": 9, "bins": 41},
    "behavior": {"horizon": 4},
}


def on_one_thread() -> Iterator[None]:
    """Importing one_thread runs a module's tests on one: with small models threads wait longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


one_thread = pytest.fixture(on_one_thread, autouse=True, scope="module")


def small_config(**overrides: dict) -> Config:
    """A config of tiny sizes, with nested overrides on top: small_config(harmony={"mode": "off"})."""
    return apply_overrides(apply_overrides(Config(), SMALL), overrides)


def make_actions(continuous: bool, width: int = 3) -> ContinuousActions | DiscreteActions:
    return ContinuousActions(width) if continuous else DiscreteActions(width)


def make_learner(
    continuous: bool = False, specs=SPECS, seed: int = 0, spread: bool = True, **overrides
) -> Learner:
    """A small learner, in float32 on the CPU unless `dtype` and `device` are given.

    `spread` moves every parameter off its initial value, so that none is zero or one.
    """
    where = {"dtype": overrides.pop("dtype", torch.float32), "device": overrides.pop("device", "cpu")}
    learner = Learner(specs, make_actions(continuous), small_config(**overrides), **where, seed=seed)
    if spread:
        generator = torch.Generator().manual_seed(seed + 1)
        for module in (learner.model, learner.behavior):
            for parameter in module.parameters():
                parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator).to(learner.device)
    return learner


def make_batch(learner: Learner, seed: int = 0) -> dict[str, Tensor]:
    """A random time-major batch for the learner, with episodes that begin inside windows."""
    rng = np.random.default_rng(seed)
    replay, actions = learner.config.replay, learner.actions
    lead = (replay.length, replay.batch)
    model = learner.model
    observations = {
        **model.images,
        **{k: () if k in model.scalars else (n,) for k, n in model.vectors.items()},
    }
    is_first = rng.random(lead) < 0.2
    is_first[0] = True
    batch = {
        "reward": rng.standard_normal(lead).astype(np.float32),
        "is_first": is_first,
        "is_terminal": rng.random(lead) < 0.2,
        "action": rng.integers(actions.count, size=lead, dtype=np.int32)
        if isinstance(actions, DiscreteActions)
        else rng.uniform(-1, 1, (*lead, actions.size)).astype(np.float32),
        "starts": rng.integers(1000, size=replay.batch),
    }
    for key, shape in observations.items():
        if key in model.images:
            batch[key] = rng.integers(256, size=(*lead, *shape), dtype=np.uint8)
        else:
            batch[key] = rng.standard_normal((*lead, *shape)).astype(np.float32)
    return {k: torch.from_numpy(v).to(learner.device) for k, v in batch.items()}


def snapshot(learner: Learner) -> dict[str, Tensor]:
    """A copy of the learner's whole state."""
    return {k: v.clone() for k, v in learner.state_dict().items()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    """Names of the entries that are not bit-identical."""
    return {k for k in a.keys() | b.keys() if k not in a or k not in b or not torch.equal(a[k], b[k])}


def sample_index(logp: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF sample: the number of classes whose cumulative probability is at most `uniform`.

    Args:
        logp: (..., K) log-probabilities.
        uniform: (...) numbers in [0, 1).

    Returns:
        (...) int64 class indices.
    """
    below = (logp.exp().cumsum(-1) <= uniform[..., None]).sum(-1)
    return below.clamp(max=logp.shape[-1] - 1)
