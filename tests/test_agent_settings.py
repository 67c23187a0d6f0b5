"""Every number that learning is told reaches what it says, and nothing else."""

import pytest
import torch

from hdfast.config import Config
from hdfast.flags import field_names
from tests.agent_cases import differing, make_batch, make_learner, one_thread, snapshot  # noqa: F401

ALL = {"model", "actor", "critic", "slow_critic", "return_range"}
# Another value, the mode of harmony in which it counts, and the parts that one update then leaves otherwise. What
# changes the world model changes all, for the others learn in it.
SETTINGS = {
    "rssm.unimix": (0.3, "learned", ALL),
    "harmony.reward": (3.0, "fixed", ALL),
    "harmony.image": (3.0, "fixed", ALL),
    "harmony.kl": (3.0, "fixed", ALL),
    "loss.dyn": (0.05, "learned", ALL),
    "loss.rep": (0.7, "learned", ALL),
    "loss.reward": (3.0, "off", ALL),
    "loss.cont": (3.0, "learned", ALL),
    "loss.image": (3.0, "off", ALL),
    "loss.vector": (3.0, "learned", ALL),
    "loss.free_nats": (50.0, "learned", ALL),
    "loss.cont_gradient": (False, "learned", ALL),
    "behavior.horizon": (3, "learned", ALL - {"model"}),
    "behavior.discount_horizon": (9.0, "learned", ALL - {"model"}),
    "behavior.lam": (0.5, "learned", ALL - {"model"}),
    "behavior.entropy": (0.3, "learned", {"actor"}),
    "behavior.slow_rate": (0.5, "learned", {"slow_critic"}),
    "behavior.return_decay": (0.5, "learned", {"actor", "return_range"}),
    "behavior.return_low": (0.5, "learned", {"actor", "return_range"}),
    "behavior.return_high": (0.5, "learned", {"actor", "return_range"}),
    "behavior.return_floor": (1000.0, "learned", {"actor"}),
    "behavior.unimix": (0.3, "learned", ALL - {"model"}),
    "behavior.actor_grad": ("reinforce", "continuous", {"actor"}),
    **{
        f"optimizer.model_{k}": (v, "learned", ALL) for k, v in {"lr": 0.01, "eps": 2.0, "clip": 1e-6}.items()
    },
    **{
        f"optimizer.actor_{k}": (v, "learned", {"actor"})
        for k, v in {"lr": 0.01, "eps": 0.5, "clip": 1e-6}.items()
    },
    **{
        f"optimizer.critic_{k}": (v, "learned", {"critic", "slow_critic"})
        for k, v in {"lr": 0.01, "eps": 0.5, "clip": 1e-6}.items()
    },
}

STEEP = {
    "model_lr": 0.1,
    "model_eps": 1.0,
}  # no first step of Adam's that hangs on the sign of a gradient alone


def updated(mode: str, **settings: dict) -> dict[str, torch.Tensor]:
    """Parameters and return range after one update, of which the slow critic has seen some before.

    mode: of harmony; "continuous" is "learned" with continuous actions.
    """
    continuous = mode == "continuous"
    base = {"harmony": {"mode": "learned" if continuous else mode}, "optimizer": STEEP}
    together = {section: base.get(section, {}) | settings.get(section, {}) for section in base | settings}
    learner = make_learner(continuous, **together)
    learner.behavior.slow_updates.fill_(7)
    learner.behavior.return_range.bounds.copy_(torch.tensor([-50.0, 50.0]))
    batch = make_batch(learner)
    learner.update(lambda *_: batch)
    return snapshot(learner)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_changes_what_it_says(name):
    value, mode, expected = SETTINGS[name]
    section, _, field = name.partition(".")
    changed = differing(updated(mode), updated(mode, **{section: {field: value}}))
    parts = {"model": "model.", **{part: f"behavior.{part}." for part in ALL - {"model"}}}
    assert {part for part, prefix in parts.items() if any(k.startswith(prefix) for k in changed)} == expected


def test_every_setting_of_learning_is_here():
    sections = ("harmony.", "loss.", "behavior.", "optimizer.")
    names = {name for name in field_names(Config()) if name.startswith(sections)}
    assert names | {"rssm.unimix"} == SETTINGS.keys() | {"harmony.mode"}
