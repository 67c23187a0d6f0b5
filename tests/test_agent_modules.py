"""Learners of one's own: further modules and behaviors, an actor that explores, other encoders, schedules, metrics."""

import dataclasses
import inspect
import re

import numpy as np
import pytest
import torch
from torch import nn

from hdfast.agent.behavior import Actor, Behavior
from hdfast.agent.learner import Learner
from hdfast.agent.networks import LatentMLP
from hdfast.agent.optimizer import Adam
from hdfast.agent.policy import Policy
from hdfast.agent.world_model import WorldModel
from hdfast.replay import episodes
from hdfast.runtime.errors import ConfigError
from hdfast.trained import load
from hdfast.tuning.choice import Job
from hdfast.tuning.trials import Trials
from tests.agent_cases import differing, make_batch, make_learner, snapshot
from tests.loop_cases import (
    lines,
    one_thread,  # noqa: F401
    path_of,
    saved,
    tiny,
    train,
)


def of(learner: type[Learner]) -> Learner:
    """That learner, for the environment and the sizes of the others in these tests."""
    plain = make_learner()
    return learner(plain.obs_specs, plain.actions, plain.config)


class Explorer(Learner):
    """Learns a second actor to take action 2, and acts with it in training."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.explorer = Actor(self.actions, self.config).to(self.device)
        self.optimizers["explorer"] = Adam(self.explorer.parameters(), lr=0.03, eps=1e-8, clip=100.0)

    def acting(self, training):
        return self.explorer if training else self.behavior.actor

    def learn_behavior(self, half):
        optimizer = self.optimizers["explorer"]
        logits = self.explorer.mlp(half.latent, self.dtype)["logits"]
        loss = nn.functional.cross_entropy(logits, torch.full((logits.shape[0],), 2))
        optimizer.step(list(torch.autograd.grad(loss, optimizer.parameters)), half.applied)
        super().learn_behavior(half)


def test_an_actor_of_its_own_learns_acts_in_training_and_is_saved(tmp_path, named):
    text = "from tests.test_agent_modules import Explorer\nclass Mine(Explorer): ..."
    config = tiny(tmp_path / "runs", learner=named(text), agent_steps=200)
    train(config)
    tensors = saved(config).tensors
    assert any(name.startswith("learner.optimizer.explorer.mean") for name in tensors)
    with load(path_of(config)) as trained:
        learner = trained.policy.learner
        for name, tensor in learner.explorer.state_dict().items():
            assert torch.equal(tensor, tensors[f"learner.explorer.{name}"])
        step, taken = trained.env.reset(), {}
        for kind in (True, False):
            policy = Policy(learner, 1, seed=0, training=kind)
            taken[kind] = [int(policy(step.obs, step.is_first)[0]) for _ in range(50)]
        assert taken[True].count(2) > 40 > taken[False].count(2)
        other = Job(learner.obs_specs, learner.actions, config, learner.device, learner.dtype).learner()
        other.load_state_dict(saved(config).part("learner."))
        restored = other.state_dict()
        assert all(torch.equal(restored[name], tensors[f"learner.{name}"]) for name in restored)


class Curious(Behavior):
    """Imagines a reward for action 2 alone."""

    def imagine(self, *args):
        trajectory = super().imagine(*args)
        return trajectory._replace(reward=(trajectory.action == 2).float())


def test_a_second_behavior_as_documented(tmp_path, named):
    methods = re.search(r"acts in training::\n\n((?:(?: {4}.*)?\n)+)", inspect.getdoc(Learner))[1]
    learner = named(
        f"from tests.test_agent_modules import Curious, Learner\n\nclass Mine(Learner):\n{methods}"
    )
    config = tiny(
        tmp_path / "runs", learner=learner, agent_steps=500, optimizer={"actor_lr": 0.01}, log={"every": 10}
    )
    train(config)
    rows = np.concatenate([episode["action"] for episode in episodes(path_of(config))])
    assert (rows[-200:] == 2).mean() > 0.6
    line = lines(config, "metrics")[-1]
    assert line["explorer_imagined_reward"] > 0.6
    assert line["explorer_loss_critic"] != line["loss_critic"]
    tensors = saved(config).tensors
    assert tensors["learner.optimizer.explorer_critic.steps"] == tensors["learner.updates"]
    slow = tensors["learner.explorer.slow_updates"], tensors["learner.behavior.slow_updates"]
    assert slow[0] == slow[1] == tensors["learner.updates"]


def test_modules_of_its_own_follow_the_seed_are_counted_and_tried(named):
    learner = named("from tests.test_agent_modules import Explorer\nclass Mine(Explorer): ...")
    plain = make_learner()
    config = dataclasses.replace(plain.config, learner=learner)
    job = Job(plain.obs_specs, plain.actions, config, plain.device, plain.dtype)
    first, again, other = job.learner(3), job.learner(3), job.learner(4)
    weights = [next(one.explorer.parameters()) for one in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    count = sum(p.numel() for p in first.explorer.parameters())
    assert first.parameter_counts()["explorer"] == count
    assert first.parameter_counts()["total"] == plain.parameter_counts()["total"] + count
    changes = Trials(job)._changes({}, torch.float32)
    assert any(name.startswith("gradient of explorer.") for name in changes)


class Headed(WorldModel):
    def __init__(self, obs_specs, actions, config):
        super().__init__(obs_specs, actions, config)
        self.head = LatentMLP(config.rssm.deter, config.rssm.stoch * config.rssm.classes, 8, 1, {"logit": 1})


class More(Explorer):
    model_type = Headed


def test_what_two_learners_share_goes_from_one_to_the_other():
    """What only the taker has stays as it is, and is named; what only the giver has is left out."""
    plain, mine = make_learner(seed=1), of(More)
    before, given = snapshot(mine), plain.state_dict()
    assert mine.load_shared_parameters(given) == ["explorer.mlp", "model.head"]
    kept = {name for name, tensor in snapshot(mine).items() if torch.equal(tensor, before[name])}
    for name, tensor in mine.state_dict().items():
        if name.startswith(("model.head.", "explorer.", "optimizer.")):
            assert name in kept
        elif name.startswith(("model.", "behavior.")):
            assert torch.equal(tensor, given[name])
    back = make_learner(seed=2)
    assert back.load_shared_parameters(mine.state_dict()) == []
    assert differing(snapshot(back), snapshot(plain)) == {"generator"}


@pytest.mark.parametrize("lost", ["model.", "behavior.", "model.rssm.gru", "model.decoder.image.bias"])
def test_what_every_learner_has_must_be_there(lost):
    state = {
        name: tensor for name, tensor in make_learner().state_dict().items() if not name.startswith(lost)
    }
    with pytest.raises(RuntimeError, match="Missing key"):
        make_learner(seed=1).load_shared_parameters(state)


class Loose(Learner):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.alpha = nn.Parameter(torch.zeros(1))
        self.optimizers["alpha"] = Adam([self.alpha], lr=0.1, eps=1e-8, clip=1.0)


class Foreign(Learner):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.optimizers["model"] = torch.optim.AdamW(self.model.parameters())


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (
            "Loose",
            r"Mine.optimizers\['alpha'\]: it learns parameters that would not be saved; put them into an nn",
        ),
        (
            "Foreign",
            r"Mine.optimizers\['model'\]: it is of type AdamW, expected hdfast.agent.optimizer.Adam, or a",
        ),
    ],
)
def test_optimizers_whose_work_would_be_lost_are_refused(kind, told, named):
    learner = named(f"from tests.test_agent_modules import {kind}\nclass Mine({kind}): ...")
    plain = make_learner()
    config = dataclasses.replace(plain.config, learner=learner)
    with pytest.raises(ConfigError, match=told):
        Job(plain.obs_specs, plain.actions, config, plain.device, plain.dtype).learner()


def test_a_run_acts_as_in_training_and_evaluates_otherwise(tmp_path, named):
    text = """
from hdfast.agent.learner import Learner
seen = []
class Mine(Learner):
    def acting(self, training):
        seen.append((training, self.updates))
        return self.behavior.actor
"""
    learner = named(text)
    train(tiny(tmp_path / "runs", learner=learner))
    seen = __import__(learner.partition(":")[0]).seen
    assert {training for training, _ in seen} == {True, False}
    assert {updates for training, updates in seen if not training} == {max(updates for _, updates in seen)}


class Pooled(nn.Module):
    """An image encoder of another width."""

    def __init__(self, resolution, channels, depth):
        super().__init__()
        self.outputs = 10
        self.out = nn.Linear(channels, self.outputs)

    def forward(self, image, dtype):
        return self.out(image.float().mean((1, 2)) / 255).to(dtype)


def test_another_encoder_of_another_width_learns():
    class Model(WorldModel):
        image_encoder_type = Pooled

    class Mine(Learner):
        model_type = Model

    learner = of(Mine)
    before = learner.model.encoder["image"].out.weight.clone()
    batch = make_batch(learner)
    learner.update(lambda *_: batch)
    assert int(learner.skipped) == 0
    assert not torch.equal(before, learner.model.encoder["image"].out.weight)


def test_an_encoder_whose_width_is_not_what_it_says_is_named():
    class Wrong(Pooled):
        def forward(self, image, dtype):
            return super().forward(image, dtype)[:, 1:]

    class Model(WorldModel):
        image_encoder_type = Wrong

    class Mine(Learner):
        model_type = Model

    learner = of(Mine)
    batch = make_batch(learner)
    with pytest.raises(ValueError, match="the encoder gives 18 numbers a row, its `outputs` say 19"):
        learner.update(lambda *_: batch)


def test_a_schedule_is_computed_from_the_optimizer_s_steps():
    class Mine(Learner):
        def learn_model(self, sample, wait=lambda: None):
            optimizer = self.optimizers["model"]
            optimizer.lr = 0.01 * ((optimizer.steps - 1) / 2).clamp(0, 1)  # 0 in the first two updates
            return super().learn_model(sample, wait)

    learner = of(Mine)
    batch, weights = make_batch(learner), []
    for _ in range(3):
        weights.append(next(learner.model.rssm.parameters()).clone())
        learner.update(lambda *_: batch)
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], next(learner.model.rssm.parameters()))


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        ("{'mine': 0.5}", "metric 'mine' is float, expected a tensor without axes"),
        ("{'mine': torch.ones(3)}", r"metric 'mine' is of shape \(3,\), expected a tensor without axes"),
        ("{'mine': half.cont.mean()} if learner.updates else {}", "in all updates, got only at times: mine"),
        ("{} if learner.updates else {'mine': half.cont.mean()}", "in all updates, got only at times: mine"),
    ],
)
def test_metrics_that_cannot_be_averaged_are_named(metrics, told):
    class Mine(Learner):
        def learn_behavior(self, half):
            more = eval(metrics, {"learner": self, "half": half, "torch": torch})
            super().learn_behavior(half._replace(metrics=half.metrics | more))

    learner = of(Mine)
    batch = make_batch(learner)

    def learn():
        for _ in range(2):
            learner.update(lambda *_: batch)

    with pytest.raises(ValueError, match=told):
        learn()
