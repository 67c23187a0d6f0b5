"""Learners of one's own, by name, and a logger of one's own."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from hdfast import loop, sweep
from hdfast import train as training
from hdfast.agent.behavior import Behavior
from hdfast.agent.custom import learner_class, source_of, with_options
from hdfast.agent.learner import Learner
from hdfast.agent.world_model import WorldModel
from hdfast.config import Config
from hdfast.runtime.errors import (
    CallbackError,
    ConfigError,
    HdfastError,
    MissingLibraryError,
    NonFiniteError,
    RunError,
)
from hdfast.trained import load
from hdfast.tuning.choice import Job
from hdfast.tuning.choice import path_of as path_of_choice
from tests.agent_cases import make_batch, make_learner
from tests.loop_cases import (
    assert_one_history,
    door,
    flags,
    lines,
    one_thread,  # noqa: F401
    path_of,
    saved,
    tiny,
    train,
)

F32 = torch.float32
README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.fixture
def example(module):
    """The learner of the README's example."""
    (text,) = re.findall(r"```python\n(# my_agent\.py\n.*?)```", README, re.DOTALL)
    return f"{module(text)}:MyLearner"


def test_the_example_of_the_readme_learns_and_is_evaluated(tmp_path, example):
    config = tiny(tmp_path / "runs", learner=example, log={"every": 10})
    train(config)
    logged = [line for line in lines(config, "metrics") if line["updates"]]
    assert all(line["loss/rewarded"] > 0 and "weighted/rewarded" in line for line in logged)
    head = {k: v for k, v in saved(config).tensors.items() if k.startswith("learner.model.rewarded.")}
    begun = learner_class(config)
    with load(path_of(config)) as trained:
        assert type(trained.policy.learner) is begun
        fresh = begun(
            trained.env.obs_specs,
            trained.env.actions,
            with_options(config),
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
    options = r'learner_options: "{\"scale\":1.0}" -> "{}"'
    assert error.value.details == (f'learner: "{example}" -> null', options)
    train(tiny(tmp_path / "other", init_from=str(path_of(config))))  # without the head
    with pytest.raises(HdfastError) as error:
        train(tiny(tmp_path / "third", init_from=str(path_of(config)), rssm={"deter": 8}))
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


@pytest.mark.parametrize(
    ("returned", "kind", "text"),
    [
        ("None", ValueError, "more_losses returned a NoneType, expected a mapping of losses by name"),
        ("{'reward': batch['reward']}", ValueError, "more_losses: 'reward' is the name of another loss"),
        ("{'cont': batch['reward']}", ValueError, "more_losses: 'cont' is the name of another loss"),
        (
            "{'mine': batch['reward'].mean()}",
            ValueError,
            r"'mine' is torch.float32 \(\), expected floats",
        ),
        ("{'mine': batch['reward'].mT}", ValueError, r"\(T, B\) = \(6, 3\)"),
        ("{'mine': batch['is_first']}", ValueError, "'mine' is torch.bool"),
        ("{'mine': 3}", ValueError, "'mine' is int, expected floats"),
    ],
)
def test_losses_that_are_none(returned, kind, text):
    learner = make_learner()
    batch = make_batch(learner)
    learner.model.more_losses = eval(f"lambda latent, batch, dtype: {returned}")
    with pytest.raises(kind, match=text):
        learner.update(lambda *_: batch)


def test_parameters_of_a_behavior_that_nothing_would_train_are_refused():
    class Mine(Behavior):
        def __init__(self, *args):
            super().__init__(*args)
            self.temperature = torch.nn.Parameter(torch.zeros(()))

    class MyLearner(Learner):
        behavior_type = Mine

    plain = make_learner()
    with pytest.raises(
        ValueError, match="Mine: no optimizer would train temperature; put them into its actor or"
    ):
        MyLearner(plain.obs_specs, plain.actions, plain.config)


def test_a_choice_of_kernels_is_for_one_learner(module):
    """What was found right of one may be wrong of another, or of the same after a change."""
    text = "from hdfast.agent.learner import Learner\nclass Mine(Learner): ...\n"
    first, second = (f"{module(text + end)}:Mine" for end in ("", "# changed"))
    plain = make_learner()
    seen = plain.obs_specs, plain.actions
    configs = [dataclasses.replace(plain.config, learner=name) for name in (None, first, second)]
    keys = [Job(*seen, config, plain.device, F32).key for config in configs]
    assert len({path_of_choice(key) for key in keys}) == 3
    assert [source_of(Config(learner=name)) for name in (None, first)] == [None, keys[1]["learner"]]
    assert keys[1]["learner"].split()[1] != keys[2]["learner"].split()[1]


def test_what_a_logger_raises_ends_the_run_with_a_checkpoint(tmp_path):
    config = tiny(tmp_path)

    def on_line(file, line):
        if file == "metrics":
            raise OSError("no connection")

    with pytest.raises(
        CallbackError, match=r"^a line of metrics\.jsonl: on_line raised OSError: no connection$"
    ):
        loop.run(config, on_line=on_line)
    assert saved(config).meta["agent_steps"] == 20
    train(config)
    assert_one_history(config)


def test_what_a_logger_raises_at_one_episode_costs_no_other(tmp_path):
    """Two environments whose episodes end in the same step."""
    config = tiny(tmp_path, agent_steps=20)
    with pytest.raises(CallbackError, match=r"^a line of scores\.jsonl: on_line raised ZeroDivisionError"):
        loop.run(config, on_line=lambda file, line: 1 // 0 if file == "scores" else None)
    written = lines(config, "scores", kind="episode")
    assert len(written) == 2
    train(config)
    assert lines(config, "scores", kind="episode") == written


def test_a_loss_that_is_not_finite_is_named(tmp_path, module):
    name = module(
        "import torch\nfrom hdfast.agent.learner import Learner\nfrom hdfast.agent.world_model import WorldModel\n"
        "class Model(WorldModel):\n"
        "    def more_losses(self, latent, batch, dtype):\n"
        "        return {'mine': batch['reward'] * float('nan')}\n"
        "class Mine(Learner):\n    model_type = Model\n"
    )
    with pytest.raises(NonFiniteError, match="; not finite on it: loss/mine; "):
        train(tiny(tmp_path, learner=f"{name}:Mine", train={"nonfinite_limit": 2}))


@pytest.mark.parametrize(
    ("returned", "code", "told"),
    [
        (
            "{'odd': batch['reward'][..., None]}",
            *(2, "more_losses: 'odd' is torch.float32 (4, 2, 1), expected floats of shape (T, B) = (4, 2)"),
        ),
        ("[1]", 2, "more_losses returned a list, expected a mapping of losses by name"),
        ("{'mean': batch['reward'] * 0 + float(batch['reward'].mean())}", 0, ""),  # not on shapes alone
    ],
)
def test_a_dry_run_looks_at_losses_of_one_s_own(returned, code, told, module, tmp_path, monkeypatch, capfd):
    name = module(
        "from hdfast.agent.learner import Learner\n"
        "from hdfast.agent.world_model import WorldModel\n"
        "class Model(WorldModel):\n"
        "    def more_losses(self, latent, batch, dtype):\n"
        f"        return {returned}\n"
        "class Mine(Learner):\n"
        "    model_type = Model\n"
    )
    argv = [*flags(), "--learner", f"{name}:Mine", "--dry-run"]
    found, _, err = door(training.main, argv, monkeypatch, capfd)
    assert found == code
    if told:
        assert err == f"error: --learner {name}:Mine: {told}\n"
        argv[-1:] = ["--logdir", str(tmp_path)]  # as the run does
        found, _, err = door(training.main, argv, monkeypatch, capfd)
        assert (found, err) == (code, f"error: --learner {name}:Mine: {told}\n")
    else:
        assert err.startswith(
            f"warning: --learner {name}:Mine: its loss does not run on shapes alone (RuntimeError: "
        )


def test_a_dry_run_looks_whether_parameters_fit(tmp_path, example, monkeypatch, capfd):
    config = tiny(tmp_path / "runs")
    train(config)
    argv = [
        *flags(learner=example, logdir=tmp_path / "more"),
        "--init-from",
        str(path_of(config)),
        "--dry-run",
    ]
    code, _, err = door(training.main, argv, monkeypatch, capfd)
    assert code == 0
    (newest,) = path_of(config).glob("checkpoints/*.safetensors")
    told = f"{newest} has no model.rewarded: the new run begins with values of its own"
    assert err == f"warning: {told}\n"
    code, out, err = door(training.main, [*argv, "--rssm.deter", "8"], monkeypatch, capfd)
    assert (code, out) == (3, "")
    assert (
        "the checkpoint does not fit; --init-from needs a run with the same observations, actions and sizes"
        in err
    )


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
