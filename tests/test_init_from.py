"""`--init-from`: a run that begins with the parameters of another."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from hdfast.runtime import checkpoint
from hdfast.runtime.errors import CheckpointError, ConfigError, RunError
from tests import loop_cases
from tests.loop_cases import (
    one_thread,  # noqa: F401
    path_of,
    saved,
    script,
    tiny,
)


def parameters(config):
    """Of the world model and the behaviour, by name."""
    kinds = ("learner.model.", "learner.behavior.")
    return {name: tensor for name, tensor in saved(config).tensors.items() if name.startswith(kinds)}


def test_a_run_can_begin_with_the_parameters_of_another(tmp_path, monkeypatch, capfd):
    """Only parameters are taken: optimizers, replay and counts are new. The run acts with them at once."""
    made = script(monkeypatch)
    first = tiny(tmp_path / "first")
    loop_cases.train(first)
    before = parameters(first)
    assert "begins with" not in capfd.readouterr().out
    second = tiny(tmp_path / "second", init_from=str(path_of(first)), agent_steps=8)
    assert loop_cases.train(second)["updates"] == 0
    begins = capfd.readouterr().out.splitlines()[0]
    assert "new run; replay: " in begins
    assert begins.endswith(f"; it begins with the parameters of {path_of(first)}")
    after = parameters(second)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(int(t) == 0 for name, t in saved(second).tensors.items() if name.endswith("steps"))
    plain = tiny(tmp_path / "plain", agent_steps=8)
    loop_cases.train(plain)
    assert not all(torch.equal(tensor, parameters(plain)[name]) for name, tensor in before.items())
    other = tiny(tmp_path / "other", init_from=str(path_of(plain)), agent_steps=8)
    loop_cases.train(other)
    sent = [np.concatenate(env.sent).tolist() for env in made["train"][1:]]
    assert sent[0] != sent[1]  # the second is of random actions
    assert sent[2] not in sent[:2]
    shutil.rmtree(path_of(first))  # it is needed only at the beginning
    longer = dataclasses.replace(second, agent_steps=40)
    assert loop_cases.train(longer)["updates"] == 15
    assert not all(torch.equal(tensor, before[name]) for name, tensor in parameters(longer).items())


def test_a_run_can_begin_with_an_older_checkpoint_of_another(tmp_path, monkeypatch):
    """Also with one that was copied out of its run, by its name alone."""
    script(monkeypatch)
    first = tiny(tmp_path / "first", eval={"every": 20})  # each evaluation is of a checkpoint
    loop_cases.train(first)
    older = min(path_of(first).glob("checkpoints/*.safetensors"))
    before = {
        name: tensor for name, tensor in checkpoint.load(older).tensors.items() if name in parameters(first)
    }
    assert not all(torch.equal(tensor, parameters(first)[name]) for name, tensor in before.items())
    shutil.copy(older, tmp_path)
    (tmp_path / "config.json").write_text("[]")  # of something else
    (tmp_path / "folder").mkdir()
    shutil.move(tmp_path / older.name, tmp_path / "folder")
    monkeypatch.chdir(tmp_path / "folder")
    for start in (str(older), older.name):
        second = tiny(tmp_path / f"second{len(start)}", init_from=start, agent_steps=8)
        loop_cases.train(second)
        after = parameters(second)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
    for start, details in ((str(older), ("rssm.deter: 16 -> 8",)), (older.name, ())):
        config = tiny(
            tmp_path / "third", init_from=start, rssm={"deter": 8, "unimix": 0.02}
        )  # which is no size
        with pytest.raises(CheckpointError, match=f"{older.name}: the checkpoint does not fit") as error:
            loop_cases.train(config)
        assert tuple(error.value.details[:-1]) == details
    with pytest.raises(CheckpointError, match="there is no such checkpoint; there are 0000000040"):
        loop_cases.train(tiny(tmp_path / "third", init_from=str(older.with_name("1.safetensors"))))
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize(("theirs", "ours"), [("learned", "off"), ("fixed", "learned")])
def test_harmony_may_be_another(tmp_path, monkeypatch, theirs, ours):
    """Its scalars then start as in a new run."""
    script(monkeypatch)
    first = tiny(tmp_path / "first", harmony={"mode": theirs})
    loop_cases.train(first)
    second = tiny(tmp_path / "second", init_from=str(path_of(first)), agent_steps=8, harmony={"mode": ours})
    assert loop_cases.train(second)["updates"] == 0
    before, after = parameters(first), parameters(second)
    sigma = "learner.model.harmonizer.log_sigma"
    own = {sigma, "learner.model.harmonizer._extra_state"}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name not in own)
    assert after.keys() - {sigma} == before.keys() - {sigma}
    assert (sigma in after) == (ours == "learned")
    assert not after.get(sigma, torch.zeros(1)).any()


def test_parameters_to_begin_with_that_are_not_there_or_do_not_fit_are_one_line(tmp_path, monkeypatch):
    script(monkeypatch)
    first = tiny(tmp_path / "first", agent_steps=4)
    loop_cases.train(first)
    for where, options, kind, text in (
        (tmp_path / "no", {}, RunError, "there is no run here"),
        (tmp_path / "first", {}, ConfigError, f"this is not a run, it holds 1; try {path_of(first)}"),
        (path_of(first), {"rssm": {"deter": 8}}, CheckpointError, "the checkpoint does not fit"),
    ):
        with pytest.raises(kind, match=text) as error:
            loop_cases.train(tiny(tmp_path / "second", init_from=str(where), **options))
        assert error.value.details[:1] == (("rssm.deter: 16 -> 8",) if options else ())
        if kind is CheckpointError:
            assert error.value.hint == "--init-from needs a run with the same observations, actions and sizes"
        assert not (tmp_path / "second").exists(), "a run that never began leaves nothing"
    shutil.rmtree(path_of(first) / "checkpoints")
    with pytest.raises(CheckpointError, match="there is no checkpoint yet"):
        loop_cases.train(tiny(tmp_path / "second", init_from=str(path_of(first))))


def test_parameters_of_another_task_that_do_not_fit_say_how_it_differs(tmp_path):
    first = tiny(tmp_path / "first", agent_steps=4)
    loop_cases.train(first)
    env = {"obs": "state", "image_size": 32}
    task = {"suite": "gym", "task": "tests.gym_envs:Blind-v0", "env": env}
    other = tiny(tmp_path / "second", init_from=str(path_of(first)), **task)
    with pytest.raises(CheckpointError, match="the checkpoint does not fit") as error:
        loop_cases.train(other)
    assert {*error.value.details[:4]} == {
        "env.image_size: 64 -> 32",
        'env.obs: "image" -> "state"',
        'suite: "demo" -> "gym"',
        'task: "Catch" -> "tests.gym_envs:Blind-v0"',
    }


def test_what_a_run_began_with_may_be_named_otherwise_or_be_gone_when_it_goes_on(
    tmp_path, monkeypatch, capfd
):
    made = script(monkeypatch)
    first = tiny(tmp_path / "first", agent_steps=20)
    loop_cases.train(first)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    begun = str(path_of(first).relative_to(tmp_path))
    second = tiny(tmp_path / "second", init_from=begun, agent_steps=4)
    loop_cases.train(second)
    acted = len(made["train"])
    for steps, given, warned in (
        (6, str(path_of(first)), False),
        (8, f"./{begun}/", False),
        (10, f"~/{begun}", False),
        (12, None, False),
        (14, str(path_of(second)), True),
    ):
        capfd.readouterr()
        loop_cases.train(dataclasses.replace(second, init_from=given, agent_steps=steps))
        told = f"warning: {path_of(second)}: goes on from its checkpoint, without --init-from {given}; it began with "
        assert capfd.readouterr().err == (f"{told}those of {begun}\n" if warned else "")
    record = json.loads((path_of(second) / "config.json").read_text())
    assert record["config"]["init_from"] == begun
    # It acts without having learned anything yet, just like a run that is always given the same path.
    again = tiny(tmp_path / "again", init_from=begun, agent_steps=4)
    for steps in (4, 6, 8, 10, 12, 14):
        loop_cases.train(dataclasses.replace(again, agent_steps=steps))
    sent = [np.concatenate(env.sent).tolist() for env in made["train"][acted - 1 :]]
    assert sent[:6] == sent[6:]
    shutil.rmtree(path_of(first))
    loop_cases.train(dataclasses.replace(second, init_from=begun, agent_steps=16))


def test_a_run_that_began_by_itself_is_told_that_it_goes_on(tmp_path, monkeypatch, capfd):
    script(monkeypatch)
    config = tiny(tmp_path, agent_steps=4)
    loop_cases.train(config)
    loop_cases.train(dataclasses.replace(config, init_from="elsewhere", agent_steps=6))
    told = "goes on from its checkpoint, without --init-from elsewhere; it began with parameters of its own"
    assert capfd.readouterr().err == f"warning: {path_of(config)}: {told}\n"
    record = json.loads((path_of(config) / "config.json").read_text())
    assert record["config"]["init_from"] is None
