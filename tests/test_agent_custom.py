"""Learners of one's own, by name, and a logger of one's own."""

import itertools
import re
from pathlib import Path

import pytest
import torch

from hdfast import evaluate, loop, sweep
from hdfast import train as training
from hdfast.agent.custom import learner_class
from hdfast.agent.learner import Learner
from hdfast.agent.world_model import WorldModel
from hdfast.config import Config
from hdfast.runtime.errors import ConfigError, HdfastError, MissingLibraryError, RunError
from tests.loop_cases import (
    door,
    lines,
    one_thread,  # noqa: F401
    path_of,
    saved,
    tiny,
    train,
)

README = (Path(__file__).parents[1] / "README.md").read_text()
NUMBER = itertools.count()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Makes a module of some text, and returns its name, which no other test's has."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(text: str) -> str:
        name = f"my_agent_{next(NUMBER)}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return make


@pytest.fixture
def example(module):
    """The learner of the README's example."""
    (text,) = re.findall(r"```python\n(# my_agent\.py\n.*?)```", README, re.DOTALL)
    return f"{module(text)}:MyLearner"


def test_the_example_of_the_readme_learns_and_is_evaluated(tmp_path, example):
    config = tiny(tmp_path / "runs", learner=example, log={"every": 10})
    train(config)
    assert all(line["loss/rewarded"] > 0 for line in lines(config, "metrics") if line["updates"])
    head = {k: v for k, v in saved(config).tensors.items() if k.startswith("learner.model.rewarded.")}
    begun = learner_class(config)
    with evaluate.load(path_of(config)) as trained:
        assert type(trained.policy.learner) is begun
        fresh = begun(
            trained.env.obs_specs,
            trained.env.actions,
            config,
            seed=trained.policy.learner.generator.initial_seed(),
        )
        own = trained.policy.learner.model.state_dict()
        assert len(head) == 6
        for name, tensor in head.items():
            assert torch.equal(own[name.removeprefix("learner.model.")], tensor)
        assert trained.act(trained.env.reset().obs["image"][0]) in range(3)
    assert (
        fresh.parameter_counts()["total"]
        > Learner(trained.env.obs_specs, trained.env.actions, config).parameter_counts()["total"]
    )


def test_more_losses_train_what_they_reach(tmp_path, example):
    """The same parameters but for the new head, after which the encoder differs as well."""
    plain, more = tiny(tmp_path / "plain"), tiny(tmp_path / "more", learner=example)
    train(plain)
    train(more)
    first, second = saved(plain).tensors, saved(more).tensors
    name = next(k for k in first if k.startswith("learner.model.encoder") and k.endswith("weight"))
    assert not torch.equal(first[name], second[name])


def test_the_learner_belongs_to_the_run(tmp_path, example):
    config = tiny(tmp_path / "runs", learner=example)
    train(config)
    with pytest.raises(HdfastError) as error:
        train(tiny(tmp_path / "runs", agent_steps=60))
    assert error.value.details == (f'learner: "{example}" -> null',)
    with pytest.raises(HdfastError) as error:
        train(tiny(tmp_path / "other", init_from=str(path_of(config))))
    assert f'learner: "{example}" -> null' in error.value.details


def test_names_of_learners(module):
    assert learner_class(Config()) is Learner
    name = module(
        "from hdfast.agent.learner import Learner\nclass Mine(Learner): ...\nclass Other: ...\nthing = 3\n"
    )
    mine = learner_class(Config(learner=f"{name}:Mine"))
    assert issubclass(mine, Learner)
    assert mine.model_type is WorldModel
    for learner, kind, text in (
        (name, ConfigError, "expected a module and a class in it; such as my_agent:MyLearner"),
        (f"{name}:", ConfigError, "expected a module and a class in it"),
        (f"{name}:Mien", ConfigError, f"no class 'Mien' in {name}; did you mean 'Mine'?"),
        (
            f"{name}:Other",
            ConfigError,
            f"Other is no subclass of hdfast.agent.learner.Learner in {name}; choose from",
        ),
        (f"{name}:thing", ConfigError, "thing is no subclass of"),
        (
            "no_such.module:A",
            ConfigError,
            "there is no module 'no_such'; install it, or start from the folder that",
        ),
        (f"{module('import no_such_package')}:A", MissingLibraryError, "needs no_such_package; install it"),
        (f"{module('1 / 0')}:A", RunError, "raised ZeroDivisionError: division by zero"),
        (f"{module('raise SystemExit')}:A", RunError, "raised SystemExit"),
    ):
        with pytest.raises(kind) as error:
            learner_class(Config(learner=learner))
        assert str(error.value).startswith(f"--learner {learner}: ")
        assert text in str(error.value)
        if kind is RunError:
            (frame,) = error.value.details
            assert frame.endswith(("in <module>: 1 / 0", "in <module>: raise SystemExit"))


def test_a_wrong_name_leaves_no_directory(tmp_path, monkeypatch, capfd):
    argv = ["--learner", "nowhere:A", "--logdir", str(tmp_path / "runs")]
    for main, between in (
        (training.main, []),
        (sweep.main, ["--"]),
    ):
        code, out, err = door(main, ["--suite", "demo", *between, *argv], monkeypatch, capfd)
        assert (code, out) == (2, "")
        assert err.startswith("error: --learner nowhere:A: there is no module 'nowhere'")
        assert not (tmp_path / "runs").exists()


def test_every_line_of_the_logs_is_told(tmp_path):
    config, told = tiny(tmp_path), []
    loop.run(config, on_line=lambda file, line: told.append((file, line)))
    for file in ("metrics", "scores"):
        mine = [line for name, line in told if name == file]
        written = lines(config, file)
        assert [line["agent_steps"] for line in mine] == [line["agent_steps"] for line in written]
        assert [line.keys() for line in mine] == [line.keys() for line in written]
