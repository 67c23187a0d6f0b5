"""The options of learners of one's own, and what such a learner must not do."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest

from hdfast import train as training
from hdfast.agent.custom import with_options
from hdfast.config import Config, parse
from hdfast.runtime.errors import ConfigError
from hdfast.trained import load
from hdfast.tuning.choice import Job
from hdfast.variants import variants
from tests.agent_cases import make_learner
from tests.loop_cases import (
    door,
    flags,
    lines,
    one_thread,  # noqa: F401
    path_of,
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
