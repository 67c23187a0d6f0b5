"""Learners of one's own: options, other encoders, further modules, an actor that explores, schedules and metrics."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hdfast import train as training
from hdfast.agent.behavior import Actor
from hdfast.agent.custom import with_options
from hdfast.agent.learner import Learner
from hdfast.agent.optimizer import Adam
from hdfast.agent.policy import Policy
from hdfast.agent.world_model import WorldModel
from hdfast.config import Config, parse
from hdfast.runtime.errors import ConfigError
from hdfast.trained import load
from hdfast.tuning.choice import Job
from hdfast.tuning.trials import Trials
from hdfast.variants import variants
from tests.agent_cases import make_batch, make_learner
from tests.loop_cases import (
    door,
    flags,
    lines,
    one_thread,  # noqa: F401
    path_of,
    saved,
    tiny,
    train,
)

OPTIONS = """
from hdfast.agent.learner import Learner
from hdfast.agent.world_model import WorldModel


class Model(WorldModel):
    def more_losses(self, latent, batch, dtype):
        return {"mine": self.scale * batch["reward"].float() ** 0}

    def __init__(self, obs_specs, actions, config):
        super().__init__(obs_specs, actions, config)
        self.scale = config.options["scale"]


class Mine(Learner):
    model_type = Model
    options = {"scale": 1.0, "kind": "a", "on": True, "layers": 2}
"""


@pytest.fixture
def named(module):
    """Makes a module of some text, and returns the name of its class Mine."""
    return lambda text: f"{module(text)}:Mine"


def of(learner: type[Learner]) -> Learner:
    """That learner, for the environment and the sizes of the others in these tests."""
    plain = make_learner()
    return learner(plain.obs_specs, plain.actions, plain.config)


def test_options_reach_the_modules_and_belong_to_the_run(tmp_path, named):
    learner = named(OPTIONS)
    for scale, options in ((1.0, "{}"), (0.25, '{"scale": 0.25}')):
        config = tiny(tmp_path / str(scale), learner=learner, learner_options=options, log={"every": 10})
        train(config)
        assert {line["loss/mine"] for line in lines(config, "metrics") if line["updates"]} == {scale}
        kept = json.loads((path_of(config) / "config.json").read_text())["config"]["learner_options"]
        assert kept == f'{{"kind":"a","layers":2,"on":true,"scale":{scale}}}'
    with load(path_of(config)) as trained:
        assert trained.policy.learner.model.scale == 0.25
    with pytest.raises(ConfigError, match="another config") as error:
        train(tiny(tmp_path / "0.25", learner=learner, agent_steps=60))
    assert [line.partition(":")[0] for line in error.value.details] == ["learner_options"]
    train(tiny(tmp_path / "0.25", learner=learner, learner_options='{"scale": 0.25}', agent_steps=60))


def test_options_are_checked_before_a_run_begins(tmp_path, named, monkeypatch, capfd):
    learner = named(OPTIONS)
    for text, told in (
        (
            '{"scael": 2.0}',
            """--learner-options {"scael":2.0}: Mine has no option 'scael'; did you mean 'scale'?""",
        ),
        ('{"scale": "2"}', """--learner-options {"scale":"2"}: scale is '2'; expected float, such as 1.0"""),
        ('{"layers": 2.5}', """--learner-options {"layers":2.5}: layers is 2.5; expected int, such as 2"""),
        (
            '{"layers": true}',
            """--learner-options {"layers":true}: layers is True; expected int, such as 2""",
        ),
        ("[1]", """--learner-options [1] is no JSON object; expected an object such as --learner-options"""),
        ("{", "--learner-options { is no JSON: "),
    ):
        argv = [*flags(learner=learner, logdir=tmp_path / "runs"), "--learner-options", text]
        code, out, err = door(training.main, argv, monkeypatch, capfd)
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {told}")
        assert not (tmp_path / "runs").exists()
    with pytest.raises(ConfigError, match="--learner-options has no effect without --learner; name the"):
        parse(["--learner-options", '{"scale": 2.0}'])
    odd = named(OPTIONS.replace("2}", "object()}"))
    with pytest.raises(ConfigError, match=r"Mine\.options: .* not JSON serializable; JSON's types can be"):
        with_options(Config(learner=odd))


def test_options_may_be_in_a_file_be_varied_and_tell_kernels_apart(tmp_path, named):
    learner = named(OPTIONS)
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"learner": learner, "learner_options": {"scale": 2}}))
    config = parse(["--config", str(file)])
    assert config.options == {"scale": 2}
    assert with_options(config).options == {"scale": 2, "kind": "a", "on": True, "layers": 2}
    one, other = variants(['learner-options={"scale":0.1,"layers":1},{"scale":1.0}'])
    assert one.flags == ("--learner-options", '{"scale":0.1,"layers":1}')
    assert other.flags == ("--learner-options", '{"scale":1.0}')
    plain = make_learner()
    configs = [
        dataclasses.replace(plain.config, learner=learner, learner_options=o.flags[1]) for o in (one, other)
    ]
    jobs = [Job(plain.obs_specs, plain.actions, config, plain.device, plain.dtype) for config in configs]
    assert jobs[0].key != jobs[1].key
    resolved = [dataclasses.replace(job, config=with_options(job.config)) for job in jobs]
    assert [job.key for job in resolved] == [job.key for job in jobs]
    assert [job.learner().config.options["scale"] for job in jobs] == [0.1, 1.0]


@pytest.mark.parametrize("method", ["update", "step"])
def test_methods_that_training_may_not_call_are_not_overridden(method, named):
    text = (
        f"from hdfast.agent.learner import Learner\nclass Mine(Learner):\n    def {method}(self, sample): ..."
    )
    with pytest.raises(
        ConfigError, match=f"Mine overrides {method}, which training may not call; override learn_"
    ):
        with_options(Config(learner=named(text)))


def test_a_run_that_goes_on_with_an_edited_learner_says_so(tmp_path, named, capfd):
    learner = named(OPTIONS)
    config = tiny(tmp_path / "runs", learner=learner)
    train(config)
    Path(tmp_path, f"{learner.partition(':')[0]}.py").write_text(OPTIONS + "# another\n")
    capfd.readouterr()
    train(dataclasses.replace(config, agent_steps=60))
    warned = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 1
    assert f'{path_of(config)}: goes on with another learner: "{learner} ' in warned[0]


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
    text = "from tests.test_agent_options import Explorer\nclass Mine(Explorer): ..."
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


def test_modules_of_its_own_follow_the_seed_are_counted_and_tried(named):
    learner = named("from tests.test_agent_options import Explorer\nclass Mine(Explorer): ...")
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
    learner = named(f"from tests.test_agent_options import {kind}\nclass Mine({kind}): ...")
    plain = make_learner()
    config = dataclasses.replace(plain.config, learner=learner)
    with pytest.raises(ConfigError, match=told):
        Job(plain.obs_specs, plain.actions, config, plain.device, plain.dtype).learner()


def test_a_run_goes_on_with_a_learner_that_has_another_option(tmp_path, named):
    learner = named(OPTIONS)
    begun = {"learner": learner, "learner_options": '{"scale": 2}'}
    config = tiny(tmp_path / "runs", **begun)
    train(config)
    more = OPTIONS.replace('"layers": 2', '"layers": 2, "sizes": (1, 2), "free": None')
    changed = named(more).partition(":")[0]
    Path(tmp_path, f"{learner.partition(':')[0]}.py").write_text(more)
    sys.modules[learner.partition(":")[0]] = importlib.import_module(changed)
    assert with_options(Config(learner=learner)).options["sizes"] == [1, 2]
    train(tiny(tmp_path / "runs", agent_steps=60, **begun))
    with load(path_of(config)) as trained:
        assert trained.policy.learner.config.options["sizes"] == [1, 2]
    with pytest.raises(ConfigError, match="another config"):
        train(
            tiny(
                tmp_path / "runs", agent_steps=80, learner=learner, learner_options='{"free": 3, "scale": 2}'
            )
        )


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
